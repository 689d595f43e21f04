"""Our muxer in whole libp2p hosts: against itself and against the library's own in another process."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator

import libp2p.stream_muxer.muxer_multistream as multistream
import pytest
import trio
import trio.testing
from libp2p.host.ping import PingService
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from p2pnode.net import yamux as adapter
from p2pnode.net.yamux import Yamux, YamuxStream, next_batch
from tests.net.peers.yamux_peer import make_host
from tests.net.test_noise import secured

MIB = 1 << 20


@pytest.fixture(autouse=True)
def restore_the_librarys_muxer() -> object:
    before = multistream.Yamux
    yield
    multistream.Yamux = before


@contextlib.asynccontextmanager
async def peer(kind: str) -> AsyncIterator[tuple[PeerInfo, subprocess.Popen[str]]]:
    """A host in another process."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.net.peers.yamux_peer", kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    ) as process:
        try:
            assert process.stdout is not None
            line = await trio.to_thread.run_sync(process.stdout.readline)
            yield info_from_p2p_addr(Multiaddr(line.strip())), process
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def connected(kind: str) -> AsyncIterator[tuple[object, PeerInfo, Yamux, subprocess.Popen[str]]]:
    """Our host, connected to a peer of `kind`."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    async with peer(kind) as (info, process):
        host = make_host("ours")
        with trio.fail_after(50):
            async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
                await host.connect(info)
                (conn,) = host.get_network().get_connections(info.peer_id)
                assert type(conn.muxed_conn) is Yamux
                yield host, info, conn.muxed_conn, process
                with trio.move_on_after(3, shield=True):
                    await host.close()


@contextlib.asynccontextmanager
async def muxed() -> AsyncIterator[tuple[Yamux, Yamux]]:
    """Two of our muxers over real sockets in this process."""
    client, server, _, _ = await secured()
    a, b = Yamux(client, server.get_local_peer()), Yamux(server, client.get_local_peer())
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.start)
            nursery.start_soon(b.start)
            await a.event_started.wait()
            await b.event_started.wait()
            yield a, b
            nursery.start_soon(a.close)
            nursery.start_soon(b.close)


async def echo_all(stream: object, size: int) -> None:
    block = os.urandom(65536)
    muxed_stream = stream.muxed_stream

    async def send() -> None:
        for _ in range(size // len(block)):
            await muxed_stream.write(block)
        await muxed_stream.close_write()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        got = 0
        while got < size:
            part = await muxed_stream.read(65536)
            at = got % len(block)
            expected = (block + block)[at : at + len(part)]
            assert part == expected
            got += len(part)
        with pytest.raises(MuxedStreamEOF):
            await muxed_stream.read(1)


def test_the_library_still_uses_the_name_that_is_replaced() -> None:
    from libp2p.stream_muxer.muxer_multistream import MuxerMultistream

    assert "Yamux" in MuxerMultistream.new_conn.__code__.co_names
    adapter.install()
    assert multistream.Yamux is Yamux


@pytest.mark.parametrize("kind", ["ours", "stock"])
async def test_echo_both_ways_at_once(kind: str) -> None:
    async with connected(kind) as (host, info, _, _):
        stream = await host.new_stream(info.peer_id, ["/echo"])
        await echo_all(stream, 64 * MIB if kind == "ours" else 16 * MIB)


@pytest.mark.parametrize("kind", ["ours", "stock"])
async def test_ping_identify_and_200_streams_at_a_time(kind: str) -> None:
    async with connected(kind) as (host, info, conn, _):
        assert (await PingService(host).ping(info.peer_id, 2))[0] >= 0
        identify = await host.new_stream(info.peer_id, ["/ipfs/id/1.0.0"])
        message = b""
        with contextlib.suppress(StreamEOF):
            while True:
                message += await identify.read(4096)
        assert b"/echo" in message and b"/ipfs/ping/1.0.0" in message
        done = 0

        async def one(number: int) -> None:
            nonlocal done
            stream = await host.new_stream(info.peer_id, ["/echo"])
            text = number.to_bytes(4, "big") * 500
            await stream.write(text)
            await stream.close_write()
            got = b""
            with contextlib.suppress(StreamEOF):
                while True:
                    got += await stream.read(4096)
            assert got == text
            done += 1

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one, number)
        assert done == 200
        assert conn.rtt is not None and 0 < conn.rtt < 10


@pytest.mark.parametrize("kind", ["ours", "stock"])
async def test_half_close_and_reset_in_the_middle(kind: str) -> None:
    async with connected(kind) as (host, info, _, _):
        sink = await host.new_stream(info.peer_id, ["/sink"])
        doomed = await host.new_stream(info.peer_id, ["/echo"])
        await doomed.write(bytes(100_000))
        await doomed.read(1000)
        await doomed.reset()
        with pytest.raises(StreamReset):
            await doomed.read(1)
        await sink.muxed_stream.send_parts([bytes(500_000), b"", memoryview(bytes(1_500_000))])
        await sink.close_write()
        assert int.from_bytes(await sink.read(8), "big") == 2_000_000


@pytest.mark.parametrize("kind", ["ours", "stock"])
async def test_stream_to_a_reader_that_never_reads_holds_up_nobody(kind: str) -> None:
    async with connected(kind) as (host, info, _, _):
        stuck = await host.new_stream(info.peer_id, ["/silent"])
        with trio.move_on_after(0.5) as scope:
            while True:
                await stuck.muxed_stream.write(bytes(65536))
        assert scope.cancelled_caught
        await echo_all(await host.new_stream(info.peer_id, ["/echo"]), MIB)


@pytest.mark.parametrize("kind", ["ours", "stock"])
async def test_a_killed_peer_wakes_every_stream_at_once(kind: str) -> None:
    async with connected(kind) as (host, info, conn, process):
        streams = [await host.new_stream(info.peer_id, ["/silent"]) for _ in range(5)]
        woken = 0

        async def wait(stream: object) -> None:
            nonlocal woken
            with pytest.raises(MuxedStreamReset):
                await stream.muxed_stream.read(1)
            woken += 1

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(wait, stream)
                await trio.testing.wait_all_tasks_blocked()
                process.send_signal(signal.SIGKILL)
            await conn.event_closed.wait()
        assert woken == 5
        with pytest.raises(MuxedConnUnavailable):
            await conn.open_stream()
        with pytest.raises(MuxedConnUnavailable):
            await conn.accept_stream()


@pytest.mark.slow
async def test_a_stopped_peer_is_noticed_within_20_seconds() -> None:
    async with connected("ours") as (host, info, _, process):
        stream = await host.new_stream(info.peer_id, ["/silent"])
        process.send_signal(signal.SIGSTOP)
        began = trio.current_time()
        with pytest.raises(MuxedStreamReset, match="silent"):
            await stream.muxed_stream.read(1)
        assert trio.current_time() - began < 21


async def test_bulk_and_streams_from_both_sides_do_not_dead_lock() -> None:
    async with muxed() as (a, b):

        async def serve(conn: Yamux) -> None:
            async def echo(stream: object) -> None:
                with contextlib.suppress(MuxedStreamEOF):
                    while True:
                        await stream.write(await stream.read(100_000))
                await stream.close()

            with contextlib.suppress(MuxedConnUnavailable):
                async with trio.open_nursery() as handlers:
                    while True:
                        handlers.start_soon(echo, await conn.accept_stream())

        async def use(conn: Yamux) -> None:
            stream = await conn.open_stream()

            async def send() -> None:
                for _ in range(32):
                    await stream.write(bytes(MIB // 4))
                await stream.close_write()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                got = 0
                with contextlib.suppress(MuxedStreamEOF):
                    while True:
                        got += sum(map(len, await stream.receive_parts(1 << 20)))
                assert got == 8 * MIB

        async with trio.open_nursery() as servers:
            servers.start_soon(serve, a)
            servers.start_soon(serve, b)
            async with trio.open_nursery() as users:
                for conn in (a, b) * 5:
                    users.start_soon(use, conn)
            servers.cancel_scope.cancel()
        assert a.session.memory == b.session.memory == 0


async def test_cancelled_reads_and_writes_leave_everything_intact() -> None:
    async with muxed() as (a, b):
        out = await a.open_stream()
        into = await b.accept_stream()
        sent = received = 0

        async def send() -> None:
            nonlocal sent
            while sent < 4 * MIB:
                with trio.move_on_after(0.0005):
                    await out.write(sent.to_bytes(4, "big") * 10_000)
                    sent += 40_000
            await out.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            data = bytearray()
            with contextlib.suppress(MuxedStreamEOF):
                while True:
                    with trio.move_on_after(0.0005):
                        data += await into.read(30_000)
            received = len(data)
        assert received == sent
        for at in range(0, sent, 40_000):
            assert data[at : at + 4] == at.to_bytes(4, "big")


async def test_state_errors() -> None:
    async with muxed() as (a, b):
        out = await a.open_stream()
        into = await b.accept_stream()
        await out.close_write()
        with pytest.raises(MuxedStreamClosed):
            await out.write(b"x")
        with pytest.raises(MuxedStreamEOF):
            await into.read()
        await into.reset()
        with pytest.raises(MuxedStreamReset):
            await into.write(b"x")
        with pytest.raises(MuxedStreamReset):
            await out.read(1)
        assert out.is_closed and into.is_closed
        late = await a.open_stream()
        late.set_deadline(0)
        with pytest.raises(MuxedStreamError, match="deadline"):
            await late.read(1)


async def test_closing_delivers_what_was_written_first() -> None:
    async with muxed() as (a, b):
        out = await a.open_stream()
        into = await b.accept_stream()
        await out.write(bytes(200_000))
        await out.close()
        await a.close()
        assert a.is_closed
        await b.event_closed.wait()
        got = 0
        with pytest.raises(MuxedStreamEOF):
            while True:
                got += len(await into.read(50_000))
        assert got == 200_000


async def test_a_mutable_buffer_given_to_write_may_be_reused() -> None:
    async with muxed() as (a, b):
        out = await a.open_stream()
        buffer = bytearray(b"before")
        await out.write(buffer)
        buffer[:] = b"after!"
        assert await (await b.accept_stream()).read(6) == b"before"


async def test_a_violation_ends_the_connection_with_the_right_code() -> None:
    client, server, _, _ = await secured()
    conn = Yamux(server, client.get_local_peer())
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.start)
            await client.write(b"\x07" + bytes(11))
            got = b""
            while b"\0\3\0\0\0\0\0\0\0\0\0\1" not in got:
                got += await client.read()
            await client.close()
        assert conn.is_closed


async def test_the_owner_learns_of_the_end_once() -> None:
    client, server, _, _ = await secured()
    calls = []

    async def on_close() -> None:
        calls.append(conn.is_closed)
        await conn.close()  # as the library's swarm does

    conn = Yamux(server, client.get_local_peer(), on_close=on_close)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.start)
            await conn.event_started.wait()
            assert conn.is_established
            await client.close()
    assert calls == [True]
    assert not conn.is_established


@pytest.mark.parametrize(
    ("batch", "written", "seconds", "expected"),
    [
        (262144, 262144, 0.001, 524288),
        (262144, 100, 0.001, 262144),
        (262144, 262144, 0.02, 131072),
        (1 << 20, 1 << 20, 0, 1 << 20),
        (131072, 131072, 9, 131072),
    ],
)
def test_batches_follow_the_links_speed(batch: int, written: int, seconds: float, expected: int) -> None:
    assert next_batch(batch, written, seconds) == expected


async def test_streams_opened_and_aborted_at_random_are_no_violation() -> None:
    rng = random.Random(1)
    async with muxed() as (a, b):

        async def serve(conn: Yamux) -> None:
            async def handle(stream: YamuxStream) -> None:
                with contextlib.suppress(MuxedStreamError):
                    await stream.write(await stream.read(1000))
                    if rng.random() < 0.5:
                        await stream.reset()
                    await stream.close()

            with contextlib.suppress(MuxedConnUnavailable):
                async with trio.open_nursery() as handlers:
                    while True:
                        handlers.start_soon(handle, await conn.accept_stream())

        async def use(conn: Yamux) -> None:
            for _ in range(150):
                stream = await conn.open_stream()
                with contextlib.suppress(MuxedStreamError):
                    await stream.write(bytes(rng.randrange(1, 300_000)))
                    if rng.random() < 0.5:
                        await stream.read(rng.randrange(1, 1000))
                    if rng.random() < 0.5:
                        await stream.reset()
                    await stream.close()

        async with trio.open_nursery() as servers:
            servers.start_soon(serve, a)
            servers.start_soon(serve, b)
            async with trio.open_nursery() as users:
                for conn in (a, b) * 10:
                    users.start_soon(use, conn)
            assert a.session.closed is None and b.session.closed is None
            servers.cancel_scope.cancel()


class _Weak(bytearray):
    """Can be referred to weakly, unlike its base."""


class _Once:
    """A secured connection that brings one piece, and nothing more."""

    is_initiator = False

    def __init__(self, piece: _Weak) -> None:
        self._batch = [memoryview(piece).toreadonly()]
        self.idle = trio.Event()

    async def read_batch(self) -> list[memoryview]:
        await trio.lowlevel.checkpoint()
        if self._batch:
            return [self._batch.pop()]
        self.idle.set()
        await trio.sleep_forever()
        return []

    async def write_parts(self, frames: object) -> None:
        await trio.lowlevel.checkpoint()

    def round_trip_times(self) -> None:
        return None

    async def close(self) -> None:
        pass


async def test_an_idle_connection_keeps_nothing_of_what_came_last() -> None:
    """That may be 1 MiB on each of 1,000 connections, and is in no budget."""
    piece = _Weak(struct.pack(">BBHII", 0, 2, 1, 0, 7))  # a ping
    last, conn = weakref.ref(piece), _Once(piece)
    del piece
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Yamux(conn, "peer").start)
        with trio.fail_after(5):
            await conn.idle.wait()
        assert last() is None
        nursery.cancel_scope.cancel()

"""Real nodes on loopback."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from p2pnode.errors import NotListening, PeerUnreachable, StreamClosed, UsageError
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.hardening import HANDSHAKE_TIMEOUT, MAX_INBOUND
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.transport import Stream, receive_exactly
from protocols.yamux import frames as yamux
from tests.net.circuits import AGENT, ECHO, echo

DEAD = "/ip4/127.0.0.1/tcp/1"  # refuses


@asynccontextmanager
async def node(identity: Identity | None = None, listen: str | None = "/ip4/127.0.0.1/tcp/0") -> AsyncIterator[Network]:
    async with Network.open(
        identity=identity or Identity.generate(),
        listen=[listen] if listen else [],
        address_book=AddressBook(),
        agent=AGENT,
    ) as network:
        network.handle(ECHO, echo)
        yield network


async def ping(a: Network, b: Network) -> None:
    """Prove that a stream from `a` to `b` works."""
    with trio.fail_after(5):
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"ping")
        assert await receive_exactly(stream, 4) == b"ping"
        await stream.aclose()


def endpoint(network: Network) -> str:
    return network.addrs()[0].split("/p2p/")[0]


class Events:
    """Connect and disconnect calls of a node, awaitable."""

    def __init__(self, network: Network) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[str, str]](100)
        network.on_connect(lambda peer: self._send.send_nowait(("up", peer)))
        network.on_disconnect(lambda peer: self._send.send_nowait(("down", peer)))

    async def next(self, seconds: float = 5) -> tuple[str, str]:
        with trio.fail_after(seconds):
            return await self._receive.receive()

    def none_left(self) -> bool:
        return self._receive.statistics().current_buffer_used == 0


async def test_connect_stream_and_events() -> None:
    async with node() as a, node() as b:
        at_a, at_b = Events(a), Events(b)
        await a.connect(b.peer_id, b.addrs())
        await a.connect(b.peer_id)  # already connected: no address needed
        assert await at_a.next() == ("up", b.peer_id)
        assert await at_b.next() == ("up", a.peer_id)
        [here], [there] = a.connections(), b.connections()
        assert (here.peer, here.direction, here.addr) == (b.peer_id, "out", endpoint(b))
        assert (there.peer, there.direction) == (a.peer_id, "in")
        assert here.since <= trio.current_time()
        assert here.rtt is None or 0 <= here.rtt < 5
        await ping(a, b)
        await ping(b, a)
        await a.disconnect(b.peer_id)
        assert await at_a.next() == ("down", b.peer_id)
        assert await at_b.next() == ("down", a.peer_id)
        assert a.connections() == b.connections() == []
        assert at_a.none_left()
        await ping(a, b)  # the address book remembers


async def test_echo_of_megabytes_over_parallel_streams() -> None:
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())

        async def one(seed: int) -> None:
            data = random.Random(seed).randbytes(2 << 20)
            stream = await a.open_stream(b.peer_id, ECHO)
            assert stream.peer == b.peer_id
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    stream.send_parts, [data[:1000], memoryview(data)[1000:70_000], bytearray(data[70_000:])]
                )
                assert await receive_exactly(stream, len(data)) == data
            await stream.aclose()
            assert await stream.receive_some(1) == b""

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for seed in range(3):
                    nursery.start_soon(one, seed)


async def test_a_buffer_may_be_reused_after_sending() -> None:
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        stream = await a.open_stream(b.peer_id, ECHO)
        buffer = bytearray(b"first")
        await stream.send_parts([buffer, memoryview(buffer)[:2], memoryview(bytes(buffer)).toreadonly()])
        buffer[:] = b"other"
        await stream.send_all(buffer)
        buffer[:] = b"wrong"
        assert await receive_exactly(stream, 17) == b"firstfifirstother"


async def test_a_handler_that_raises_ends_its_own_stream_only(caplog: pytest.LogCaptureFixture) -> None:
    async def bad(stream: Stream) -> None:
        await stream.receive_some(1)
        raise KeyError("a bug")

    async def bad_in_a_nursery(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bad, stream)

    async def refuse(stream: Stream) -> None:
        raise StreamClosed("not today")

    async with node() as a, node() as b:
        for name, handler in (("/test/bad/1", bad), ("/test/worse/1", bad_in_a_nursery), ("/test/no/1", refuse)):
            b.handle(name, handler)
        await a.connect(b.peer_id, b.addrs())
        kept = await a.open_stream(b.peer_id, ECHO)
        with caplog.at_level(logging.INFO):
            for name in ("/test/bad/1", "/test/worse/1", "/test/no/1") * 3:
                with trio.fail_after(5):
                    with pytest.raises(StreamClosed):  # while it is negotiated, if the handler is quick
                        stream = await a.open_stream(b.peer_id, name)
                        await stream.send_all(b"x")
                        assert await stream.receive_some(1) == b"", "a reset is not an end of stream"
        assert "a bug" in caplog.text
        assert "not today" in caplog.text
        await kept.send_all(b"still here")
        assert await receive_exactly(kept, 10) == b"still here"
        assert len(b.connections()) == 1
        await ping(a, b)
        await ping(b, a)


async def test_a_protocol_nobody_speaks_and_one_that_comes_later() -> None:
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        with pytest.raises(StreamClosed, match="/test/later/1"):
            await a.open_stream(b.peer_id, "/test/later/1")
        b.handle("/test/later/1", echo)
        stream = await a.open_stream(b.peer_id, "/test/later/1")
        await stream.send_all(b"x")
        assert await receive_exactly(stream, 1) == b"x"


async def test_a_callback_that_raises_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def bad(peer: str) -> None:
        raise KeyError("callback bug")

    async with node() as a, node() as b:
        b.on_connect(bad)
        b.on_disconnect(bad)
        events = Events(b)
        await a.connect(b.peer_id, b.addrs())
        assert await events.next() == ("up", a.peer_id)
        await ping(a, b)
        await a.disconnect(b.peer_id)
        assert await events.next() == ("down", a.peer_id)
    assert "callback bug" in caplog.text


async def test_dead_addresses_first_still_connect_fast() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts by its backlog and never says a word
        mute = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        async with node() as a, node() as b:
            start = trio.current_time()
            await a.connect(b.peer_id, [DEAD, mute, "/ip4/127.0.0.1/udp/1/quic-v1", "rubbish", *b.addrs()])
            assert trio.current_time() - start < 1.5
            assert a.address_book.addrs(b.peer_id)[0] == endpoint(b)
            await ping(a, b)


async def test_unreachable_names_every_address_and_reason() -> None:
    stranger = Identity.generate().peer_id
    async with node() as a, node() as b:
        with pytest.raises(PeerUnreachable) as caught:
            await a.connect(stranger, [DEAD, endpoint(b)])
        assert f"{DEAD}: connection refused" in str(caught.value)
        assert f"{endpoint(b)}: another peer answers there" in str(caught.value)
        with pytest.raises(PeerUnreachable, match="no usable address"):
            await a.connect(stranger)
        with pytest.raises(PeerUnreachable, match="itself"):
            await a.connect(a.peer_id, a.addrs())
        with pytest.raises(UsageError):
            await a.connect("nobody", [DEAD])
        await a.connect(b.peer_id, b.addrs())  # nobody was blacklisted
        assert [c.peer for c in a.connections()] == [b.peer_id]


async def test_connecting_to_whoever_answers() -> None:
    async with node() as a, node() as b, node() as c:
        assert await a.connect_addr(endpoint(b)) == b.peer_id
        assert await a.connect_addr(endpoint(b)) == b.peer_id
        assert len(a.connections()) == 1
        assert await a.connect_addr(c.addrs()[0]) == c.peer_id
        with pytest.raises(PeerUnreachable, match="this node itself answers"):
            await a.connect_addr(endpoint(a))
        with pytest.raises(PeerUnreachable, match="refused"):
            await a.connect_addr(DEAD)
        with pytest.raises(UsageError):
            await a.connect_addr("127.0.0.1:4001")
        await ping(a, b)


async def test_simultaneous_connects_share_one_dial() -> None:
    async with node() as a, node() as b:
        ups = Events(b)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(a.connect, b.peer_id, b.addrs())
        assert len(a.connections()) == 1
        assert await ups.next() == ("up", a.peer_id)
        assert len(b.connections()) == 1


async def test_one_callers_cancellation_does_not_end_the_others_dial() -> None:
    async with node() as a, node() as b:
        done = []

        async def patient() -> None:
            await a.connect(b.peer_id, b.addrs())
            done.append(True)

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(patient)
                scope.cancel()
                await a.connect(b.peer_id, b.addrs())
        assert scope.cancelled_caught
        assert done == [True]


async def test_a_caller_with_a_better_address_is_not_held_to_the_others() -> None:
    async with node() as a, node() as b:
        outcome = {}

        async def connect(addr: str) -> None:
            try:
                await a.connect(b.peer_id, [addr])
                outcome[addr] = True
            except PeerUnreachable:
                outcome[addr] = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, DEAD)
            nursery.start_soon(connect, endpoint(b))
        assert outcome[endpoint(b)]


async def test_the_librarys_own_protocols_dial_as_we_do() -> None:
    async with node() as a, node() as b:
        peer = ID.from_string(b.peer_id)
        with trio.fail_after(3):
            with pytest.raises(SwarmException, match="refused"):
                await a.host.connect(PeerInfo(peer, [Multiaddr(DEAD)]))
            await a.host.connect(PeerInfo(peer, [Multiaddr(DEAD), Multiaddr(endpoint(b))]))
        await ping(a, b)


async def test_peers_learn_each_others_addresses() -> None:
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        with trio.fail_after(5):
            while b.address_book.addrs(a.peer_id) != [endpoint(a)]:  # identify runs in the background
                await trio.sleep(0.01)
        assert b.address_book.peers() == [a.peer_id]


async def test_unspecified_listeners_are_announced_as_real_addresses() -> None:
    async with node(listen="/ip4/0.0.0.0/tcp/0") as a, node() as b:
        assert a.addrs()
        for addr in a.addrs():
            assert "0.0.0.0" not in addr
            assert addr.endswith(f"/p2p/{a.peer_id}")
        assert [str(addr) for addr in a.host.get_addrs()] == a.addrs()
        await b.connect(a.peer_id, a.addrs())
        await ping(b, a)


async def test_announced_addresses() -> None:
    identity = Identity.generate()
    async with Network.open(
        identity=identity,
        listen=["/ip4/127.0.0.1/tcp/0"],
        address_book=AddressBook(),
        announce=["/dns4/node.example/tcp/4001"],
        agent=AGENT,
    ) as a:
        assert a.addrs()[-1] == f"/dns4/node.example/tcp/4001/p2p/{identity.peer_id}"


async def test_the_port_of_another_node_is_an_error_that_names_it() -> None:
    async with node() as a:
        with pytest.raises(NotListening, match=f"{endpoint(a)}.*in use"):
            async with node(listen=endpoint(a)):
                pass
        with pytest.raises(NotListening, match="cannot assign"):
            async with node(listen="/ip4/198.51.100.1/tcp/0"):
                pass
        with pytest.raises(UsageError):
            async with node(listen="/ip4/127.0.0.1/udp/0/quic-v1"):
                pass
        async with node() as b:  # and the first is none the worse
            await b.connect(a.peer_id, a.addrs())
            await ping(b, a)


def test_closing_frees_port_sockets_and_time() -> None:
    before = len(os.listdir("/proc/self/fd"))
    where = []

    async def main() -> None:
        async with node() as a:
            where.append(endpoint(a))
            async with node() as b, node() as c:
                await a.connect(b.peer_id, b.addrs())
                await c.connect(a.peer_id, a.addrs())
                await a.open_stream(b.peer_id, ECHO)
                closing = trio.current_time()
            assert trio.current_time() - closing < 2
        async with node(listen=where[0]) as again:
            assert endpoint(again) == where[0]

    trio.run(main)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_exceptions_and_cancellation_pass_through_plainly(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError):
        async with node() as a, node() as b:
            await a.connect(b.peer_id, b.addrs())
            raise KeyError("mine")
    with trio.move_on_after(0.2) as scope:
        async with node() as a, node() as b:
            await a.connect(b.peer_id, b.addrs())
            await trio.sleep_forever()
    assert scope.cancelled_caught
    for delay in (0, 0.001, 0.003, 0.01):  # while it is starting
        start = trio.current_time()
        with trio.move_on_after(delay):
            async with node():
                await trio.sleep_forever()
        assert trio.current_time() - start < 2
    assert capfd.readouterr().err == ""


async def test_a_closed_network_refuses_at_once() -> None:
    async with node() as b:
        async with node() as a:
            pass
        with trio.fail_after(1), pytest.raises(PeerUnreachable, match="closing"):
            await a.connect(b.peer_id, b.addrs())


CHILD = """
import sys, trio
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network

async def hold(stream):
    await stream.send_all(b"x")
    await trio.sleep_forever()

async def main():
    async with Network.open(identity=Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"],
                            address_book=AddressBook(), agent="child") as network:
        network.handle("/test/hold/1", hold)
        print(network.addrs()[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_a_killed_peer_is_noticed_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            addr = (await trio.to_thread.run_sync(child.stdout.readline)).strip()
            async with node() as a:
                events = Events(a)
                peer = await a.connect_addr(addr)
                stream = await a.open_stream(peer, "/test/hold/1")
                assert await stream.receive_some(1) == b"x"
                assert await events.next() == ("up", peer)
                child.send_signal(signal.SIGKILL)
                with trio.fail_after(2):
                    with pytest.raises(StreamClosed):
                        await stream.receive_some(1)
                    assert await events.next() == ("down", peer)
                with pytest.raises(PeerUnreachable):
                    await a.open_stream(peer, "/test/hold/1")
        finally:
            child.kill()


async def test_a_stream_is_opened_on_a_new_connection_as_soon_as_the_old_one_has_ended() -> None:
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        (conn,) = a.connections_book.of(b.peer_id)
        conn.muxed_conn._lost("a test cut it")  # what the reader does; the library hears of it some turns later
        assert not conn.is_closed and not a.connections_book.live(b.peer_id)
        await ping(a, b)


async def test_a_stream_is_opened_on_a_new_connection_when_the_peer_takes_no_new_ones_on_the_old() -> None:
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        old = await a.open_stream(b.peer_id, ECHO)
        (conn,) = a.connections_book.of(b.peer_id)
        conn.muxed_conn._dispatch(conn.muxed_conn.session.receive(yamux.control(yamux.TYPE_GO_AWAY, 0, 0, 0), 0.0))
        await ping(a, b)
        await old.send_all(b"still")
        assert await receive_exactly(old, 5) == b"still" and not conn.is_closed
        await a.disconnect(b.peer_id)
        assert conn.is_closed


async def test_what_fails_at_once_lets_others_run() -> None:
    async with node() as a:
        for call in (a.connect, a.connect_addr, partial(a.open_stream, protocol=ECHO)):
            with trio.testing.assert_checkpoints(), pytest.raises((PeerUnreachable, UsageError)):
                await call("nobody")
        with trio.testing.assert_checkpoints(), pytest.raises(StreamClosed):
            await a.open_relayed(Identity.generate().peer_id, ECHO)


async def test_a_frozen_peer_holds_up_neither_streams_nor_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pnode.net.network.OPEN_STREAM_TIMEOUT", 0.3)
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            addr = (await trio.to_thread.run_sync(child.stdout.readline)).strip()
            with trio.move_on_after(10) as scope:
                async with node() as a, trio.open_nursery() as nursery:
                    peer = await a.connect_addr(addr)
                    streams = [await a.open_stream(peer, "/test/hold/1") for _ in range(4)]
                    child.send_signal(signal.SIGSTOP)
                    for stream in streams:  # more than the socket buffers hold
                        nursery.start_soon(stream.send_all, bytes(16 << 20))
                    with pytest.raises(StreamClosed, match="did not open"):
                        await a.open_stream(peer, ECHO)
                    closing = trio.current_time()
                    nursery.cancel_scope.cancel()
            assert trio.current_time() - closing < 2.2
            assert not scope.cancelled_caught
        finally:
            child.kill()


@pytest.mark.slow
async def test_a_frozen_peer_is_noticed_within_25_seconds() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            addr = (await trio.to_thread.run_sync(child.stdout.readline)).strip()
            async with node() as a:
                events = Events(a)
                peer = await a.connect_addr(addr)
                assert await events.next() == ("up", peer)
                child.send_signal(signal.SIGSTOP)
                assert await events.next(25) == ("down", peer)
        finally:
            child.kill()


async def test_garbage_and_silence_on_the_port_do_not_matter() -> None:
    async with node() as a, node() as b:
        port = int(endpoint(a).rsplit("/", 1)[1])
        streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(200)]
        for number, stream in enumerate(streams):
            if number % 2:
                with_garbage = random.Random(number).randbytes(4096)
                await stream.send_all(b"\x13/multistream/1.0.0\n" + with_garbage if number % 4 == 1 else with_garbage)
        await b.connect(a.peer_id, a.addrs())
        await ping(b, a)
        for stream in streams:
            await stream.aclose()
        await ping(a, b)


async def _come_and_go(server: Network, times: int) -> None:
    limit = trio.CapacityLimiter(4)

    async def visit() -> None:
        async with limit, node(listen=None) as visitor:
            await visitor.connect(server.peer_id, server.addrs())

    async with trio.open_nursery() as nursery:
        for _ in range(times):
            nursery.start_soon(visit)


async def test_slots_are_given_back() -> None:
    async with node() as server:
        limiter = server.host.get_network()._inbound_limiter
        await _come_and_go(server, 12)
        with trio.fail_after(5):
            while limiter.borrowed_tokens or server.connections():
                await trio.sleep(0.01)
        assert limiter.total_tokens == MAX_INBOUND


@pytest.mark.slow
async def test_hundreds_of_identities_do_not_exhaust_the_node() -> None:
    async with node() as server:
        await _come_and_go(server, MAX_INBOUND + 50)
        async with node() as last:
            await last.connect(server.peer_id, server.addrs())
            await ping(last, server)


@pytest.mark.slow
async def test_a_flood_of_silent_connections_passes() -> None:
    async with node() as a, node() as b:
        port = int(endpoint(a).rsplit("/", 1)[1])
        flood = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(MAX_INBOUND + 50)]
        await a.connect(b.peer_id, b.addrs())  # all inbound slots are taken, but we can dial
        await ping(a, b)
        await a.disconnect(b.peer_id)
        await trio.sleep(HANDSHAKE_TIMEOUT + 0.5)
        await b.connect(a.peer_id, a.addrs())
        await ping(b, a)
        for stream in flood:
            await stream.aclose()


async def test_cancelling_at_random_moments_leaves_the_connection_usable() -> None:
    chance = random.Random(7)
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        events = Events(a)
        stream = await a.open_stream(b.peer_id, ECHO)
        # Reads lose nothing.
        data = chance.randbytes(1 << 18)
        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            with trio.fail_after(20):
                while len(received) < len(data):
                    with trio.move_on_after(chance.random() * 0.003):
                        received += await stream.receive_some(5000)
        assert received == data
        # Opening leaves no stream behind: there are 256 places on a connection.
        for _ in range(300):
            with trio.move_on_after(chance.random() * 0.012):
                opened = await a.open_stream(b.peer_id, ECHO)
                with trio.CancelScope(shield=True):
                    await opened.reset()
        await ping(a, b)
        await ping(b, a)
        assert events.none_left(), "the connection was lost"


async def test_cancelling_connect_leaves_nothing_behind() -> None:
    chance = random.Random(8)
    async with node() as a, node() as b:
        for _ in range(60):
            with trio.move_on_after(chance.random() * 0.012):
                await a.connect(b.peer_id, b.addrs())
            with trio.fail_after(5):
                await a.disconnect(b.peer_id)
        await a.connect(b.peer_id, b.addrs())
        await ping(a, b)
        with trio.fail_after(5):
            while len(b.connections()) != 1 or len(a.connections()) != 1:
                await trio.sleep(0.01)

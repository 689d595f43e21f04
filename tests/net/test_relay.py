"""A relay between real nodes on loopback."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.envelope import unmarshal_envelope
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, StopMessage, Voucher
from libp2p.utils.varint import encode_uvarint

from p2pnode.errors import PeerUnreachable, RelayRefused, StreamClosed
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.relay import server
from p2pnode.net.relay.client import CircuitConnection, accept_circuits, dial, reserve
from p2pnode.net.relay.server import RelayServer
from p2pnode.net.relay.voucher import make_voucher
from p2pnode.net.relay.wire import (
    HOP,
    MAX_MESSAGE,
    STOP,
    hop_status,
    peer_bytes,
    peer_text,
    receive_message,
    send_message,
)
from p2pnode.net.transport import Stream, receive_exactly
from protocols.errors import FrameError
from protocols.relay import RelayLimits, Status
from tests.net.circuits import ECHO, anywhere, connect_through, echo_through, node, relay_node, until

MIB = 1 << 20


@asynccontextmanager
async def triangle(limits: RelayLimits | None = None) -> AsyncIterator[tuple[Network, Network, Network, RelayServer]]:
    """Source, target and relay; the target cannot be dialled and has a reservation."""
    async with relay_node(limits) as (relay, relaying), node(listen=None) as target, node(listen=None) as source:
        for network in (target, source):
            await network.connect(relay.peer_id, relay.addrs())
        await reserve(target, relay.peer_id)
        yield source, target, relay, relaying


async def ask(source: Network, relay: Network, request: HopMessage) -> HopMessage:
    with trio.fail_after(5):
        hop = await source.open_stream(relay.peer_id, HOP)
        await send_message(hop, request)
        answer = await receive_message(hop, HopMessage)
        await hop.aclose()
    assert isinstance(answer, HopMessage)
    assert answer.type == HopMessage.STATUS
    return answer


def raw_acceptor(network: Network) -> trio.MemoryReceiveChannel[CircuitConnection]:
    """The circuits that reach `network`, as they are."""
    send, receive = trio.open_memory_channel[CircuitConnection](100)

    async def on_inbound(raw: CircuitConnection, source: str, relay: str) -> None:
        send.send_nowait(raw)

    accept_circuits(network, on_inbound, anywhere)
    return receive


# -- circuits


async def test_two_nodes_that_cannot_be_dialled_exchange_through_a_relay() -> None:
    async with triangle() as (source, target, relay, relaying):
        with pytest.raises(PeerUnreachable):
            await source.connect(target.peer_id)
        await connect_through(source, relay, target)
        await echo_through(source, target, random.Random(1).randbytes(4 * MIB))
        await echo_through(target, source, random.Random(2).randbytes(MIB))
        assert relaying.statistics().circuits == 1
        assert relaying.statistics().bytes_relayed > 10 * MIB
        [there] = [conn for conn in source.connections() if conn.peer == target.peer_id]
        assert there.addr == f"{relay.addrs()[0]}/p2p-circuit"
        [here] = [conn for conn in target.connections() if conn.peer == source.peer_id]
        assert here.addr == f"{relay.addrs()[0]}/p2p-circuit"
        stream = await source.open_stream(target.peer_id, ECHO)
        assert stream.relayed  # type: ignore[attr-defined]
        await source.disconnect(target.peer_id)
        await until(lambda: relaying.statistics().circuits == 0)
        assert [conn.peer for conn in target.connections()] == [relay.peer_id]


async def test_one_circuits_end_ends_no_other() -> None:
    async with triangle() as (source, target, relay, relaying), node(listen=None) as other:
        await other.connect(relay.peer_id, relay.addrs())
        await connect_through(other, relay, target)
        stream = await other.open_stream(target.peer_id, ECHO)
        for _ in range(3):
            await connect_through(source, relay, target)
            await echo_through(source, target)
            await source.disconnect(target.peer_id)
            await until(lambda: relaying.statistics().circuits == 1)
            await stream.send_all(b"still here")
            assert await receive_exactly(stream, 10) == b"still here"
        assert len(target.connections()) == 2


async def test_half_close_is_forwarded_and_what_was_sent_before_it_arrives() -> None:
    data = random.Random(3).randbytes(3 * MIB)
    async with triangle() as (source, target, relay, relaying):
        circuits = raw_acceptor(target)
        out = await dial(source, relay.peer_id, target.peer_id)
        inside = await circuits.receive()
        assert (out.is_initiator, inside.is_initiator) == (True, False)
        assert (out.peer, inside.peer) == (target.peer_id, source.peer_id)

        async def send_and_end() -> None:
            await out.write(data[:MIB])
            await out.send_parts([data[MIB : 2 * MIB], memoryview(data)[2 * MIB :]])
            await server.send_eof(out._stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end)
            got = bytearray()
            with trio.fail_after(10):
                while piece := await inside.read(100_000):
                    got += piece
            assert got == data
        assert relaying.statistics().circuits == 1
        with trio.fail_after(10):
            await inside.write(b"the other way is open")
            assert b"".join(await out.receive_parts(100)) == b"the other way is open"
            await inside.close()
            assert await out.read(1) == b""
        await out.close()
        await until(lambda: relaying.statistics().circuits == 0)


async def test_what_was_sent_before_both_ends_arrives_late() -> None:
    """The circuit is over for the relay while most of the data is still on its way."""
    data = random.Random(4).randbytes(MIB)
    async with triangle() as (source, target, relay, relaying):
        circuits = raw_acceptor(target)
        out = await dial(source, relay.peer_id, target.peer_id)
        inside = await circuits.receive()
        await server.send_eof(inside._stream)
        with trio.fail_after(10):
            assert await out.read(1) == b""
            await out.write(data)
            await out.close()
            await until(lambda: relaying.statistics().circuits == 0)
            got = bytearray()
            while piece := await inside.read(10_000):
                got += piece
        assert got == data


async def test_a_reset_is_forwarded() -> None:
    async with triangle() as (source, target, relay, relaying):
        circuits = raw_acceptor(target)
        out = await dial(source, relay.peer_id, target.peer_id)
        inside = await circuits.receive()
        await out.write(b"x")
        assert await inside.read(1) == b"x"
        await inside.abort()
        with trio.fail_after(5), pytest.raises(Exception, match="closed"):
            await out.read(1)
        await until(lambda: relaying.statistics().circuits == 0)


async def test_a_killed_relay_ends_its_circuits_at_both_ends() -> None:
    async with node(listen=None) as target, node(listen=None) as source:
        async with relay_node() as (relay, _):
            for network in (target, source):
                await network.connect(relay.peer_id, relay.addrs())
            await reserve(target, relay.peer_id)
            await connect_through(source, relay, target)
            stream = await source.open_stream(target.peer_id, ECHO)
            await stream.send_all(b"x")
            assert await receive_exactly(stream, 1) == b"x"
        with trio.fail_after(5), pytest.raises(StreamClosed):
            await stream.receive_some(1)
        await until(lambda: source.connections() == target.connections() == [])


# -- refusals


async def test_refusals_have_their_names() -> None:
    async with triangle(RelayLimits(max_reservations=1, max_circuits=1)) as (source, target, relay, relaying):
        with pytest.raises(RelayRefused, match="takes no more reservations") as refused:
            await reserve(source, relay.peer_id)
        assert refused.value.status == Status.RESERVATION_REFUSED
        with pytest.raises(RelayRefused, match="the target has no reservation") as refused:
            await dial(source, relay.peer_id, Identity.generate().peer_id)
        assert refused.value.status == Status.NO_RESERVATION
        await connect_through(source, relay, target)
        with pytest.raises(RelayRefused, match="limits are reached") as refused:
            await dial(source, relay.peer_id, target.peer_id)
        assert refused.value.status == Status.RESOURCE_LIMIT_EXCEEDED
        await echo_through(source, target)
        await source.disconnect(target.peer_id)
        await until(lambda: relaying.statistics().circuits == 0)
        target.handle(STOP, _refuse_circuits)
        with pytest.raises(RelayRefused, match="cannot reach the target") as refused:
            await dial(source, relay.peer_id, target.peer_id)
        assert refused.value.status == Status.CONNECTION_FAILED
        assert relaying.statistics().circuits == 0, "a circuit that failed keeps its place"
        with pytest.raises(StreamClosed, match="does not speak"):
            await reserve(relay, target.peer_id)


async def _refuse_circuits(stream: Stream) -> None:
    await receive_message(stream, StopMessage)
    await send_message(stream, StopMessage(type=StopMessage.STATUS, status=202))


async def test_a_target_that_does_not_answer_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECT_TIMEOUT", 0.2)
    async with triangle() as (source, target, relay, relaying):
        target.handle(STOP, lambda stream: trio.sleep_forever())
        with trio.fail_after(3), pytest.raises(RelayRefused, match="cannot reach"):
            await dial(source, relay.peer_id, target.peer_id)
        await until(lambda: relaying.statistics().circuits == 0)


async def test_who_has_left_has_no_reservation() -> None:
    async with triangle() as (source, target, relay, relaying):
        await target.disconnect(relay.peer_id)
        await until(lambda: relaying.statistics().reservations == 0)
        with pytest.raises(RelayRefused, match="no reservation"):
            await dial(source, relay.peer_id, target.peer_id)


async def test_no_relay_behind_a_relay() -> None:
    async with triangle() as (source, target, relay, _), trio.open_nursery() as nursery:
        nursery.start_soon(RelayServer(target, RelayLimits()).run)
        await connect_through(source, relay, target)
        with pytest.raises(RelayRefused, match="itself reached through a relay"):
            await reserve(source, target.peer_id)
        with pytest.raises(RelayRefused, match="itself reached through a relay"):
            await dial(source, target.peer_id, relay.peer_id)
        for request in (
            HopMessage(type=HopMessage.RESERVE),
            HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=peer_bytes(relay.peer_id))),
        ):
            assert (await ask(source, target, request)).status == Status.PERMISSION_DENIED
        nursery.cancel_scope.cancel()


async def test_a_stopped_relay_refuses() -> None:
    async with node() as relay, node() as other:
        relaying = RelayServer(relay, RelayLimits())
        await other.connect(relay.peer_id, relay.addrs())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relaying.run)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await reserve(other, relay.peer_id)
            nursery.cancel_scope.cancel()
        with pytest.raises(RelayRefused, match="does not permit"):
            await reserve(other, relay.peer_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relaying.run)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await reserve(other, relay.peer_id)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        bytes([0x81, 0x20]) + b"x" * (MAX_MESSAGE + 1),
        b"\x05\xff\xff\xff\xff\xff",
        b"\x00",  # an empty message: no type
        b"\x02\x08\x01",  # CONNECT without a peer
        b"\x05\x08\x01\x12\x01\x0a",  # CONNECT with half a peer
        b"\x06\x08\x01\x12\x02\x0a\x00",  # CONNECT to nobody
    ],
)
async def test_malformed_requests_are_refused_as_such(garbage: bytes) -> None:
    async with triangle() as (source, target, relay, _):
        hop = await source.open_stream(relay.peer_id, HOP)
        await hop.send_all(garbage)
        with trio.fail_after(5):
            answer = await receive_message(hop, HopMessage)
        assert answer.status == Status.MALFORMED_MESSAGE
        await connect_through(source, relay, target)
        await echo_through(source, target)


async def test_unexpected_requests_and_answers() -> None:
    async with triangle() as (source, target, relay, _):
        assert (await ask(source, relay, hop_status(Status.OK))).status == Status.UNEXPECTED_MESSAGE
        unknown = HopMessage()
        unknown.ParseFromString(b"\x08\x63")
        assert (await ask(source, relay, unknown)).status == Status.UNEXPECTED_MESSAGE
        stop = await relay.open_stream(target.peer_id, STOP)
        await send_message(stop, StopMessage(type=StopMessage.STATUS))
        assert (await receive_message(stop, StopMessage)).status == Status.UNEXPECTED_MESSAGE
        stop = await relay.open_stream(target.peer_id, STOP)
        await send_message(stop, StopMessage(type=StopMessage.CONNECT))
        assert (await receive_message(stop, StopMessage)).status == Status.MALFORMED_MESSAGE


async def test_a_relay_that_lies_is_a_named_error() -> None:
    answer = b""

    async def lie(stream: Stream) -> None:
        await receive_message(stream, HopMessage)
        await stream.send_all(answer)

    async with node() as relay, node() as other:
        relay.handle(HOP, lie)
        await other.connect(relay.peer_id, relay.addrs())
        for lies in (b"", b"\x05abc", b"\x03\xff\xff\xff", b"\x02\x08\x00", b"\xff\xff\xff\xff"):
            answer = lies
            with trio.fail_after(5):
                with pytest.raises(StreamClosed):
                    await reserve(other, relay.peer_id)
                with pytest.raises(StreamClosed):
                    await dial(other, relay.peer_id, Identity.generate().peer_id)
        answer = b"\x05\x08\x02\x28\xe7\x07"  # STATUS 999
        with pytest.raises(RelayRefused, match="status 999"):
            await reserve(other, relay.peer_id)
        # OK, with an expiry in the past and addresses that are none, or lead to somebody else.
        message = hop_status(Status.OK)
        message.reservation.expire = 12345
        message.reservation.addrs.extend([b"", b"\xff\xff", b"\x04\x7f\0\0\x01\x06\x10", b"x" * 90])
        answer = encode_uvarint(message.ByteSize()) + message.SerializeToString()
        reservation = await reserve(other, relay.peer_id)
        assert list(reservation.addrs) == relay.addrs()
        assert 60 < reservation.expires - trio.current_time() < 3600


class Bytes:
    """A stream of which only reading is real: so many bytes, in pieces."""

    peer = "somebody"

    def __init__(self, data: bytes, piece: int) -> None:
        self.data = data
        self._piece = piece

    async def receive_some(self, max_bytes: int) -> bytes:
        size = min(max_bytes, self._piece)
        data, self.data = self.data[:size], self.data[size:]
        return data


@given(
    st.one_of(st.binary(max_size=300), st.builds(lambda b: encode_uvarint(len(b)) + b, st.binary(max_size=300))),
    st.integers(1, 100),
)
def test_no_bytes_break_the_reader(data: bytes, piece: int) -> None:
    async def read() -> None:
        stream = cast(Stream, Bytes(data, piece))
        for kind in (HopMessage, StopMessage):
            with contextlib.suppress(FrameError, StreamClosed):
                message = await receive_message(stream, kind)
                peer_text(message.peer.id)

    trio.run(read)


@given(st.binary(max_size=200), st.binary(max_size=50), st.integers(1, 100))
def test_the_reader_takes_its_message_and_no_more(peer: bytes, rest: bytes, piece: int) -> None:
    message = StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=peer))
    stream = Bytes(encode_uvarint(message.ByteSize()) + message.SerializeToString() + rest, piece)

    async def read() -> None:
        assert await receive_message(cast(Stream, stream), StopMessage) == message

    trio.run(read)
    assert stream.data == rest


# -- reservations


async def test_what_a_reservation_says() -> None:
    limits = RelayLimits(reservation_ttl=1000.0, circuit_bytes=5 * MIB, circuit_seconds=300.0)
    async with triangle(limits) as (source, target, relay, _):
        reservation = await reserve(target, relay.peer_id)
        assert reservation.relay == relay.peer_id
        assert list(reservation.addrs) == relay.addrs()
        assert reservation.circuit_addrs() == [f"{relay.addrs()[0]}/p2p-circuit"]
        assert 990 < reservation.expires - trio.current_time() <= 1001
        assert (reservation.limit.bytes, reservation.limit.seconds) == (5 * MIB, 300)
        circuits = raw_acceptor(target)
        raw = await dial(source, relay.peer_id, target.peer_id)
        assert raw.limit == (await circuits.receive()).limit == reservation.limit
        answer = await ask(source, relay, HopMessage(type=HopMessage.RESERVE))
        expires = answer.reservation.expire
        assert voucher(answer.reservation.voucher) == (relay.peer_id, source.peer_id, expires)
        assert 990 < expires - time.time() <= 1000


def voucher(data: bytes) -> tuple[str, str, int]:
    """The relay that signed it, the peer that it is for, and its end: as those read it who check, such as go-libp2p."""
    envelope = unmarshal_envelope(data)
    envelope.validate("libp2p-relay-rsvp")
    assert envelope.payload_type == b"\x03\x02"
    said = Voucher.FromString(envelope.raw_payload)
    assert said.relay == ID.from_pubkey(envelope.public_key).to_bytes()
    return peer_text(said.relay), peer_text(said.peer), said.expiration


def test_vouchers() -> None:
    relay, other = Identity.generate(), Identity.generate()
    data = make_voucher(relay, other.peer_id, 1234567890)
    assert voucher(data) == (relay.peer_id, other.peer_id, 1234567890)
    with pytest.raises(ValueError, match="signature"):
        voucher(data[:-3] + b"abc")


# -- limits and abuse


async def test_limits_end_the_circuit_that_passes_them() -> None:
    async with triangle(RelayLimits(circuit_bytes=MIB)) as (source, target, relay, relaying):
        circuits = raw_acceptor(target)
        kept = await dial(source, relay.peer_id, target.peer_id)
        await circuits.receive()
        greedy = await dial(source, relay.peer_id, target.peer_id)
        inside = await circuits.receive()
        got = 0
        with trio.fail_after(5), pytest.raises(Exception, match="closed"):
            await greedy.write(bytes(MIB))
            await greedy.write(bytes(MIB))
            while True:
                got += len(await inside.read(MIB))
        assert got <= MIB
        assert relaying.statistics().circuits == 1
        await kept.write(b"x")
    async with triangle(RelayLimits(circuit_seconds=0.3)) as (source, target, relay, relaying):
        circuits = raw_acceptor(target)
        began = trio.current_time()
        out = await dial(source, relay.peer_id, target.peer_id)
        inside = await circuits.receive()
        for end in (out, inside):  # also when nothing moves
            with trio.fail_after(5), pytest.raises(Exception, match="closed"):
                await end.read(1)
        assert 0.25 < trio.current_time() - began < 2
        await dial(source, relay.peer_id, target.peer_id)  # and a new one may follow
        assert relaying.statistics().circuits_opened == 2


async def test_idle_circuits_make_room() -> None:
    limits = RelayLimits(max_circuits=3, max_circuits_per_peer=3, idle=0.0)
    async with triangle(limits) as (source, target, relay, relaying), node(listen=None) as other:
        await other.connect(relay.peer_id, relay.addrs())
        circuits = raw_acceptor(target)
        held = [await dial(source, relay.peer_id, target.peer_id) for _ in range(3)]
        for _ in held:
            await circuits.receive()
        accept_circuits(target, target.connector.accept_circuit, anywhere)
        await connect_through(other, relay, target)
        await echo_through(other, target)
        assert relaying.statistics().circuits_evicted >= 1
        with trio.fail_after(5), pytest.raises(Exception, match="closed"):
            await held[0].read(1)


@pytest.mark.slow
async def test_1000_reservation_requests_leave_the_others_served() -> None:
    async with triangle() as (source, target, relay, relaying), node(listen=None) as pest:
        await pest.connect(relay.peer_id, relay.addrs())
        await connect_through(source, relay, target)
        refused = 0
        slowest = 0.0
        finished = trio.Event()

        async def pester() -> None:
            nonlocal refused
            for _ in range(50):
                try:
                    await reserve(pest, relay.peer_id)
                except StreamClosed:  # more than the relay answers to one peer at a time
                    refused += 1

        async def others() -> None:
            nonlocal slowest
            while not finished.is_set():
                began = trio.current_time()
                await echo_through(source, target)
                slowest = max(slowest, trio.current_time() - began)

        with trio.fail_after(50):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(others)
                async with trio.open_nursery() as pests:
                    for _ in range(20):
                        pests.start_soon(pester)
                finished.set()
        assert relaying.statistics().reservations == 2
        assert slowest < 2
        assert not relaying._requests


async def test_silent_requests_are_bounded_per_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 0.5)
    async with triangle() as (source, target, relay, relaying), node(listen=None) as pest:
        await pest.connect(relay.peer_id, relay.addrs())
        silent = []
        for _ in range(server.MAX_REQUESTS):
            silent.append(await pest.open_stream(relay.peer_id, HOP))
        await until(lambda: relaying._requests[pest.peer_id] == server.MAX_REQUESTS)
        with pytest.raises(StreamClosed):
            await reserve(pest, relay.peer_id)
        await connect_through(source, relay, target)
        await echo_through(source, target)
        await until(lambda: pest.peer_id not in relaying._requests)
        await reserve(pest, relay.peer_id)


async def test_a_sender_past_its_share_slows_only_itself() -> None:
    """One floods at full speed, to somebody who reads; the other's round trips stay short."""
    async with (
        triangle(RelayLimits(bandwidth=4_000_000)) as (source, target, relay, _),
        node(listen=None) as pest,
        node(listen=None) as sink,
    ):
        circuits = raw_acceptor(sink)
        for network in (pest, sink):
            await network.connect(relay.peer_id, relay.addrs())
        await reserve(sink, relay.peer_id)
        await connect_through(source, relay, target)
        out = await dial(pest, relay.peer_id, sink.peer_id)
        inside = await circuits.receive()
        flooded = 0

        async def flood() -> None:
            block = bytes(1 << 18)
            while True:
                await out.write(block)

        async def drain() -> None:
            nonlocal flooded
            while data := await inside.read(MIB):
                flooded += len(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            nursery.start_soon(drain)
            await until(lambda: flooded > 400_000)
            began, before = trio.current_time(), flooded
            for _ in range(10):
                await echo_through(source, target, bytes(2000))
            trips = trio.current_time() - began
            await trio.sleep_until(began + 2)
            rate = (flooded - before) / (trio.current_time() - began)
            nursery.cancel_scope.cancel()
        assert trips < 2, "the modest one waited for the greedy one"
        assert 2_500_000 < rate < 5_000_000


async def test_a_reader_that_stalls_holds_little_and_only_its_own() -> None:
    async with triangle() as (source, target, relay, relaying), node(listen=None) as other:
        await other.connect(relay.peer_id, relay.addrs())
        circuits = raw_acceptor(target)
        stalled = []
        for _ in range(4):
            stalled.append(await dial(source, relay.peer_id, target.peer_id))
            await circuits.receive()
        sent = 0

        async def flood(raw: CircuitConnection) -> None:
            nonlocal sent
            while True:
                await raw.write(bytes(1 << 16))
                sent += 1 << 16

        accept_circuits(target, target.connector.accept_circuit, anywhere)
        await connect_through(other, relay, target)
        async with trio.open_nursery() as nursery:
            for raw in stalled:
                nursery.start_soon(flood, raw)
            before = -1
            with trio.fail_after(10):
                while before != sent:  # until flow control has stopped them all
                    before = sent
                    await trio.sleep(0.2)
            assert relaying.statistics().bytes_relayed < 4 * 4 * MIB
            await echo_through(other, target, bytes(MIB))
            nursery.cancel_scope.cancel()

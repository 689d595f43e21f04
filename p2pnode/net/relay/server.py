"""The relay: answers HOP requests and carries circuits. `protocols.relay.RelayTable` decides, this file acts.

    server = RelayServer(network, RelayLimits(bandwidth=12_500_000), identity)
    nursery.start_soon(server.run)

A circuit is two streams and two copying tasks. What it holds is bounded by the flow control of both connections: at
most a window unread, 256 KiB in the hands of a task and 1 MiB queued, in each direction.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import multiaddr
import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Reservation, StopMessage

from p2pnode.errors import PeerUnreachable, StreamClosed
from p2pnode.net.identity import Identity
from p2pnode.net.relay.voucher import make_voucher
from p2pnode.net.relay.wire import (
    HOP,
    STOP,
    connection_lost,
    hop_status,
    limit_message,
    network_stream,
    peer_bytes,
    peer_text,
    receive_message,
    remote_ip,
    send_eof,
    send_message,
)
from p2pnode.net.streams import NetworkStream
from p2pnode.net.transport import Stream, Transport
from protocols.errors import FrameError
from protocols.relay import FairBandwidth, Opened, Refused, RelayLimits, RelayStatistics, RelayTable, Status

log = logging.getLogger(__name__)

REQUEST_TIMEOUT = 10.0  # s for a request to arrive after its stream
CONNECT_TIMEOUT = 15.0  # s for the target to accept; go-libp2p gives 30
EXPIRY_INTERVAL = 30.0  # s between looks for expired reservations; the table looks itself before it refuses one
MAX_REQUESTS = 16  # of one peer at the same time; established circuits do not count
COPY_SIZE = 256 * 1024
PACED_SIZE = 64 * 1024  # with a bandwidth limit: what one circuit gets in a turn
MAX_ANNOUNCED = 16  # addresses in a reservation; it must fit in one message


@dataclass(slots=True)
class _Circuit:
    """A circuit as the tasks see it."""

    number: int
    scope: trio.CancelScope
    why: str = "it reached its time limit"  # should the scope be cancelled


class RelayServer:
    """Serves as a relay for as long as `run` runs. Needs an `identity` to sign vouchers, which are optional."""

    def __init__(self, network: Transport, limits: RelayLimits, identity: Identity | None = None) -> None:
        self._network = network
        self._limits = limits
        self._identity = identity
        self._table = RelayTable(limits)
        self._circuits: dict[int, _Circuit] = {}
        self._requests: Counter[str] = Counter()
        self._running = False
        self._registered = False
        self._bandwidth = FairBandwidth(limits.bandwidth, trio.current_time()) if limits.bandwidth else None
        self._turns: dict[int, trio.Event] = {}  # tickets of the bandwidth
        self._asked = trio.Event()

    async def run(self) -> None:
        """Serve until cancelled; all circuits end then."""
        if not self._registered:
            self._registered = True
            self._network.handle(HOP, self._serve)
            self._network.on_disconnect(self._table.peer_gone)
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expire)
                if self._bandwidth is not None:
                    nursery.start_soon(self._pace, self._bandwidth)
        finally:
            self._running = False
            for circuit in list(self._circuits.values()):
                circuit.why = "the relay is closing"
                circuit.scope.cancel()

    def statistics(self) -> RelayStatistics:
        return self._table.statistics()

    async def _expire(self) -> None:
        while True:
            await trio.sleep(EXPIRY_INTERVAL)
            self._table.expire(trio.current_time())

    # -- requests

    async def _serve(self, stream: Stream) -> None:
        hop = network_stream(stream)
        if self._requests[hop.peer] >= MAX_REQUESTS:
            log.debug("%s makes more than %d relay requests at a time", hop.peer, MAX_REQUESTS)
            await hop.reset()
            return
        with self._request(hop.peer) as request:
            try:
                with trio.fail_after(REQUEST_TIMEOUT):
                    message = await receive_message(hop, HopMessage)
                if not message.HasField("type"):
                    raise FrameError("a relay message without a type")
                target = peer_text(message.peer.id) if message.type == HopMessage.CONNECT else ""
            except trio.TooSlowError:
                raise StreamClosed(f"peer {hop.peer} sent no request within {REQUEST_TIMEOUT:.0f} s") from None
            except FrameError as exc:
                await self._answer(hop, self._table.refuse(Status.MALFORMED_MESSAGE, str(exc)))
                return
            if not self._running:
                await self._answer(hop, self._table.refuse(Status.PERMISSION_DENIED, "this node is no relay any more"))
            elif message.type not in (HopMessage.RESERVE, HopMessage.CONNECT):
                await self._answer(hop, self._table.refuse(Status.UNEXPECTED_MESSAGE, "neither RESERVE nor CONNECT"))
            elif hop.relayed:
                reason = "a relay is of no use behind another"
                await self._answer(hop, self._table.refuse(Status.PERMISSION_DENIED, reason))
            elif message.type == HopMessage.RESERVE:
                await self._reserve(hop)
            else:
                await self._connect(hop, target, request)

    @contextmanager
    def _request(self, peer: str) -> Iterator[_Request]:
        """Counts a request until it is `done`, or it ends."""
        self._requests[peer] += 1
        request = _Request(self._requests, peer)
        try:
            yield request
        finally:
            request.done()

    async def _answer(self, hop: NetworkStream, refused: Refused) -> None:
        log.debug("refused %s to %s: %s", refused.status.name, hop.peer, refused.reason)
        await send_message(hop, hop_status(refused.status))

    async def _reserve(self, hop: NetworkStream) -> None:
        granted = self._table.reserve(hop.peer, remote_ip(hop), trio.current_time())
        if isinstance(granted, Refused):
            await self._answer(hop, granted)
            return
        if connection_lost(hop):  # `peer_gone` came before
            self._table.peer_gone(hop.peer)
            return
        expires = int(time.time() + self._limits.reservation_ttl)
        reservation = Reservation(expire=expires)
        for addr in [addr for addr in self._network.addrs() if "/p2p-circuit" not in addr][:MAX_ANNOUNCED]:
            reservation.addrs.append(multiaddr.Multiaddr(addr).to_bytes())
        if self._identity is not None:
            reservation.voucher = make_voucher(self._identity, hop.peer, expires)
        reply = hop_status(Status.OK)
        reply.reservation.CopyFrom(reservation)
        await send_message(hop, _with_limit(reply, self._limits))

    async def _connect(self, hop: NetworkStream, target: str, request: _Request) -> None:
        opened = self._table.connect(hop.peer, target, trio.current_time())
        if isinstance(opened, Refused):
            await self._answer(hop, opened)
            return
        circuit = _Circuit(opened.circuit, trio.CancelScope(deadline=opened.ends))
        self._circuits[opened.circuit] = circuit
        self._evict(opened)
        stop: NetworkStream | Refused | None = None
        done = False
        why: object
        try:
            with circuit.scope:
                stop = await self._open_stop(hop.peer, target)
                if isinstance(stop, Refused):
                    await self._answer(hop, stop)
                    return
                await send_message(hop, _with_limit(hop_status(Status.OK), self._limits))
                request.done()
                await self._carry(circuit, hop, stop)
                done = True
            why = circuit.why
        except StreamClosed as exc:
            why = exc
        finally:
            del self._circuits[circuit.number]
            self._table.close(circuit.number)
            if self._bandwidth is not None:
                self._bandwidth.forget(circuit.number)
            if isinstance(stop, NetworkStream) and not done:
                await stop.reset()
        if not done:
            log.debug("circuit %d from %s to %s ended: %s", circuit.number, hop.peer, target, why)
            await hop.reset()

    def _evict(self, opened: Opened) -> None:
        for number in opened.evicted:
            circuit = self._circuits.get(number)
            if circuit is not None:
                circuit.why = "it was idle and another needed its place"
                circuit.scope.cancel()

    async def _open_stop(self, source: str, target: str) -> NetworkStream | Refused:
        """A stream to the target, which has agreed to the circuit."""
        stop: NetworkStream | None = None
        agreed = False
        try:
            if not any(conn.peer == target and not conn.relayed for conn in self._network.connections()):
                raise PeerUnreachable("there is no direct connection to it")
            with trio.fail_after(CONNECT_TIMEOUT):
                stop = network_stream(await self._network.open_stream(target, STOP))
                if stop.relayed:
                    raise PeerUnreachable("there is no direct connection to it")
                message = StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=peer_bytes(source)))
                await send_message(stop, _with_limit(message, self._limits))
                answer = await receive_message(stop, StopMessage)
            if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                raise PeerUnreachable(f"it answered with status {answer.status}")
            agreed = True
            return stop
        except trio.TooSlowError:
            return self._table.refuse(
                Status.CONNECTION_FAILED, f"{target} did not answer within {CONNECT_TIMEOUT:.0f} s"
            )
        except (PeerUnreachable, StreamClosed, FrameError) as exc:
            return self._table.refuse(Status.CONNECTION_FAILED, f"no circuit to {target}: {exc}")
        finally:
            if stop is not None and not agreed:
                await stop.reset()

    # -- circuits

    async def _carry(self, circuit: _Circuit, hop: NetworkStream, stop: NetworkStream) -> None:
        """Copy both ways until both have ended. Raises `StreamClosed`, with both reset, when one breaks."""
        failure: list[StreamClosed] = []

        async def copy(source: NetworkStream, sink: NetworkStream, to_source: bool) -> None:
            try:
                await self._copy(circuit.number, source, sink, to_source)
            except StreamClosed as exc:
                failure.append(exc)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy, hop, stop, False)
            nursery.start_soon(copy, stop, hop, True)
        if failure:
            raise failure[0]
        await stop.aclose()

    async def _copy(self, circuit: int, source: NetworkStream, sink: NetworkStream, to_source: bool) -> None:
        size = PACED_SIZE if self._bandwidth is not None else COPY_SIZE
        while parts := await source.receive_parts(size):
            n_bytes = sum(map(len, parts))
            refused = self._table.moved(circuit, n_bytes, trio.current_time(), to_source=to_source)
            if refused is not None:
                raise StreamClosed(f"circuit {circuit} ended: {refused.reason}")
            if self._bandwidth is not None:
                await self._turn(self._bandwidth, circuit, n_bytes)
            await sink.send_parts(parts)
        await send_eof(sink)

    # -- bandwidth

    async def _turn(self, bandwidth: FairBandwidth, circuit: int, n_bytes: int) -> None:
        """Wait for the turn of these bytes."""
        ticket = bandwidth.ask(circuit, n_bytes)
        turn = self._turns[ticket] = trio.Event()
        self._grant(bandwidth)
        if not turn.is_set():
            self._asked.set()
        try:
            await turn.wait()
        finally:
            if not turn.is_set():
                del self._turns[ticket]
                bandwidth.withdraw(ticket)

    def _grant(self, bandwidth: FairBandwidth) -> None:
        for ticket in bandwidth.grants(trio.current_time()):
            self._turns.pop(ticket).set()

    async def _pace(self, bandwidth: FairBandwidth) -> None:
        while True:
            self._grant(bandwidth)
            wait = bandwidth.wait(trio.current_time())
            if wait is None:
                self._asked = trio.Event()
                await self._asked.wait()
            else:
                await trio.sleep(wait)


class _Request:
    """One request among those of its peer, until `done`."""

    __slots__ = ("_counter", "_peer")

    def __init__(self, counter: Counter[str], peer: str) -> None:
        self._counter: Counter[str] | None = counter
        self._peer = peer

    def done(self) -> None:
        counter, self._counter = self._counter, None
        if counter is not None:
            counter[self._peer] -= 1
            if not counter[self._peer]:
                del counter[self._peer]


def _with_limit(message: HopMessage | StopMessage, limits: RelayLimits) -> HopMessage | StopMessage:
    limit = limit_message(limits)
    if limit is not None:
        message.limit.CopyFrom(limit)
    return message

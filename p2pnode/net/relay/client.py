"""Using a relay: reserve a place at it, be dialled through it, dial through it.

A circuit is a stream to the relay whose bytes are those of a raw connection to another peer: `CircuitConnection` is
what the library's upgrade to Noise and Yamux takes for one. The relay sees only ciphertext.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import multiaddr
import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, StopMessage

from p2pnode.errors import RelayRefused, StreamClosed
from p2pnode.net.addresses import check_peer_id, parse, valid
from p2pnode.net.relay.wire import (
    HOP,
    STOP,
    network_stream,
    peer_bytes,
    peer_text,
    receive_message,
    remote_addr,
    send_message,
    stop_status,
)
from p2pnode.net.streams import NetworkStream
from p2pnode.net.transport import Buffer, Stream, Transport
from protocols.errors import FrameError
from protocols.relay import Status

log = logging.getLogger(__name__)

REQUEST_TIMEOUT = 10.0  # s for the answer to a reservation
DIAL_TIMEOUT = 20.0  # s for the answer to a dial: the relay asks the target, and gives it 15
STOP_TIMEOUT = 10.0  # s for a relay to say what a stream is for
MAX_LIFE = 24 * 3600.0  # s; who grants more has another clock than we
SKEWED_LIFE = 600.0  # s that a reservation is taken to live whose end is in our past, or far in our future
MAX_RELAY_ADDRS = 8

_WORDS = {
    Status.RESERVATION_REFUSED: "it takes no more reservations (from here)",
    Status.RESOURCE_LIMIT_EXCEEDED: "its limits are reached",
    Status.PERMISSION_DENIED: "it does not permit it",
    Status.CONNECTION_FAILED: "it cannot reach the target",
    Status.NO_RESERVATION: "the target has no reservation there",
    Status.MALFORMED_MESSAGE: "it could not read our request",
    Status.UNEXPECTED_MESSAGE: "it did not expect our request",
}


@dataclass(frozen=True, slots=True)
class CircuitLimit:
    """What a relay says it will end a circuit at; 0 is unlimited."""

    bytes: int = 0  # in each direction
    seconds: int = 0

    def __bool__(self) -> bool:
        return bool(self.bytes or self.seconds)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at a relay. `expires` is in seconds of trio's clock."""

    relay: str
    expires: float
    addrs: tuple[str, ...]  # of the relay, each ending in /p2p/<relay>
    limit: CircuitLimit

    def circuit_addrs(self) -> list[str]:
        """Where we are reachable by it: <relay's address>/p2p/<relay>/p2p-circuit."""
        return [f"{addr}/p2p-circuit" for addr in self.addrs]


async def reserve(network: Transport, relay: str) -> Reservation:
    """Reserve a place at `relay`, or renew it.

    Raises `RelayRefused`, `PeerUnreachable`, or `StreamClosed` when it is no relay or does not answer.
    """
    hop = network_stream(await network.open_stream(relay, HOP))
    try:
        if hop.relayed:
            raise RelayRefused(f"relay {relay} is itself reached through a relay", Status.PERMISSION_DENIED)
        with trio.fail_after(REQUEST_TIMEOUT):
            await send_message(hop, HopMessage(type=HopMessage.RESERVE))
            answer = await receive_message(hop, HopMessage)
        _check(answer, relay, "a reservation")
        return Reservation(
            relay=relay,
            expires=trio.current_time() + _life(answer.reservation.expire),
            addrs=_relay_addrs(answer.reservation.addrs, relay, remote_addr(hop)),
            limit=CircuitLimit(answer.limit.data, answer.limit.duration),
        )
    except trio.TooSlowError:
        raise StreamClosed(f"relay {relay} did not answer within {REQUEST_TIMEOUT:.0f} s") from None
    except FrameError as exc:
        raise StreamClosed(f"relay {relay} broke the protocol: {exc}") from exc
    finally:
        await hop.aclose()


async def dial(network: Transport, relay: str, target: str) -> CircuitConnection:
    """A raw connection to `target` through `relay`, at which it has a reservation.

    Raises `RelayRefused`, `PeerUnreachable`, or `StreamClosed` when the relay is none or does not answer.
    """
    check_peer_id(target)
    hop = network_stream(await network.open_stream(relay, HOP))
    answered = False
    try:
        if hop.relayed:
            raise RelayRefused(f"relay {relay} is itself reached through a relay", Status.PERMISSION_DENIED)
        with trio.fail_after(DIAL_TIMEOUT):
            await send_message(hop, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=peer_bytes(target))))
            answer = await receive_message(hop, HopMessage)
        _check(answer, relay, f"a circuit to {target}")
        answered = True
        limit = CircuitLimit(answer.limit.data, answer.limit.duration)
        return CircuitConnection(hop, is_initiator=True, peer=target, limit=limit)
    except trio.TooSlowError:
        raise StreamClosed(f"relay {relay} did not answer within {DIAL_TIMEOUT:.0f} s") from None
    except FrameError as exc:
        raise StreamClosed(f"relay {relay} broke the protocol: {exc}") from exc
    finally:
        if not answered:
            await hop.reset()


def accept_circuits(
    network: Transport,
    on_inbound: Callable[[CircuitConnection, str, str], Awaitable[None]],
    admits: Callable[[str], bool],
) -> None:
    """From now on, accept what relays bring: `await on_inbound(connection, source, relay)` for every circuit.

    It upgrades the connection and returns; when it raises, the circuit is reset. Who the source really is only the
    security handshake on the connection proves. Circuits through a `relay` that is not admitted are refused: any peer
    can say that it is one. May be called once per network.
    """

    async def serve(stream: Stream) -> None:
        stop = network_stream(stream)
        try:
            with trio.fail_after(STOP_TIMEOUT):
                message = await receive_message(stop, StopMessage)
            if message.type != StopMessage.CONNECT or not message.HasField("type"):
                await send_message(stop, stop_status(Status.UNEXPECTED_MESSAGE))
                return
            source = peer_text(message.peer.id)
        except trio.TooSlowError:
            raise StreamClosed(f"relay {stop.peer} said nothing within {STOP_TIMEOUT:.0f} s") from None
        except FrameError:
            await send_message(stop, stop_status(Status.MALFORMED_MESSAGE))
            return
        if stop.relayed or not admits(stop.peer):  # relayed: a circuit within a circuit
            await send_message(stop, stop_status(Status.PERMISSION_DENIED))
            return
        await send_message(stop, stop_status(Status.OK))
        limit = CircuitLimit(message.limit.data, message.limit.duration)
        connection = CircuitConnection(stop, is_initiator=False, peer=source, limit=limit)
        await on_inbound(connection, source, stop.peer)
        await connection.closed.wait()  # the stream is reset or closed when its handler returns

    network.handle(STOP, serve)


class CircuitConnection:
    """A raw connection through a relay, as the library's security upgrade takes it (`IRawConnection`).

    Errors are the library's: `ConnectionClosedError` once the circuit is broken. One reader and one writer at a time.
    """

    def __init__(self, stream: NetworkStream, *, is_initiator: bool, peer: str, limit: CircuitLimit) -> None:
        self.is_initiator = is_initiator
        self.peer = peer  # who the relay says is at the other end
        self.relay = stream.peer
        self.limit = limit
        self.closed = trio.Event()
        self._stream = stream
        through = remote_addr(stream)
        self._addr = f"{through or ''}/p2p/{self.relay}/p2p-circuit"

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes as soon as there are some; `b""` at the end."""
        try:
            return await self._stream.receive_some((1 << 20) if n is None or n < 0 else n)
        except StreamClosed as exc:
            raise ConnectionClosedError(str(exc), transport="p2p-circuit") from exc

    async def receive_parts(self, max_bytes: int) -> Sequence[Buffer]:
        """Like `read`, in the pieces it came in, none of them copied; empty at the end."""
        try:
            return await self._stream.receive_parts(max_bytes)
        except StreamClosed as exc:
            raise ConnectionClosedError(str(exc), transport="p2p-circuit") from exc

    async def write(self, data: Buffer) -> None:
        await self.send_parts([data])

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        """Write several buffers one after the other, by reference where they are immutable."""
        try:
            await self._stream.send_parts(parts)
        except StreamClosed as exc:
            raise ConnectionClosedError(str(exc), transport="p2p-circuit") from exc

    async def close(self) -> None:
        """Half-close, and let go. Idempotent."""
        if not self.closed.is_set():
            self.closed.set()
            await self._stream.aclose()

    async def abort(self) -> None:
        """End both directions at once."""
        self.closed.set()
        await self._stream.reset()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the address of whoever is behind the relay is not known."""
        return None

    def get_transport_addresses(self) -> list[Any]:
        return [multiaddr.Multiaddr(self._addr)]

    def get_connection_type(self) -> Any:
        return ConnectionType.RELAYED


def _check(answer: Any, relay: str, what: str) -> None:
    if answer.type != HopMessage.STATUS:
        raise FrameError("its answer is no STATUS")
    if answer.status == Status.OK:
        return
    words = next((words for status, words in _WORDS.items() if status == answer.status), "")
    raise RelayRefused(f"relay {relay} refused {what}: {words or f'status {answer.status}'}", int(answer.status))


def _life(expires: int) -> float:
    """Seconds that are left until the Unix time `expires`, as far as our clock and the relay's agree."""
    life = expires - time.time()
    return life if 0 < life <= MAX_LIFE else SKEWED_LIFE


def _relay_addrs(raw: Sequence[bytes], relay: str, dialled: str | None) -> tuple[str, ...]:
    """The relay's addresses as it gives them; the one we reached it at, where it gives none that we can use."""
    texts = []
    for data in raw[: 4 * MAX_RELAY_ADDRS]:
        try:
            texts.append(str(multiaddr.Multiaddr(bytes(data))))
        except ValueError:  # all of the library's errors are
            continue
    usable = [text for text in valid(texts, relay, MAX_RELAY_ADDRS) if parse(text).relay is None]
    if not usable and dialled is not None:
        usable = valid([dialled], relay)
    return tuple(f"{text}/p2p/{relay}" for text in usable)

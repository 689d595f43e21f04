"""Messages of Circuit Relay v2 and DCUtR on a stream, and what the ends of a circuit need of it besides."""

from __future__ import annotations

from typing import Any

import base58
from google.protobuf.message import DecodeError
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, StopMessage
from libp2p.utils.varint import encode_uvarint

from p2pnode.errors import StreamClosed
from p2pnode.net.hardening import LIBRARY_ERRORS
from p2pnode.net.streams import NetworkStream
from p2pnode.net.transport import Stream, receive_exactly
from protocols.errors import FrameError
from protocols.relay import RelayLimits, Status

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
MAX_MESSAGE = 4096  # bytes, go-libp2p's maxMessageSize for both protocols
MAX_PEER_ID = 64  # bytes; an Ed25519 id has 38, a SHA-256 one 34


async def send_message(stream: Stream, message: Any) -> None:
    """One message behind its length (unsigned varint)."""
    data: bytes = message.SerializeToString()
    await stream.send_all(encode_uvarint(len(data)) + data)


async def receive_message(stream: Stream, kind: Any) -> Any:
    """The next message; not a byte of what follows it is taken, for that belongs to the circuit.

    Raises `FrameError` for a malformed or too long one, `StreamClosed` when the stream ends first.
    """
    size = shift = 0
    while True:
        byte = (await receive_exactly(stream, 1))[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 14:
            raise FrameError(f"the length of a {kind.DESCRIPTOR.name} is malformed")
    if size > MAX_MESSAGE:
        raise FrameError(f"a {kind.DESCRIPTOR.name} of {size} bytes is longer than {MAX_MESSAGE}")
    try:
        return kind.FromString(await receive_exactly(stream, size))
    except DecodeError as exc:
        raise FrameError(f"what should be a {kind.DESCRIPTOR.name} is no protobuf of that kind") from exc


def peer_text(raw: bytes) -> str:
    """A peer id from a message. Raises `FrameError`."""
    if not 2 < len(raw) <= MAX_PEER_ID:
        raise FrameError(f"a peer id of {len(raw)} bytes")
    text: bytes = base58.b58encode(raw)
    return text.decode("ascii")


def peer_bytes(text: str) -> bytes:
    raw: bytes = base58.b58decode(text)
    return raw


def hop_status(status: Status) -> Any:
    return HopMessage(type=HopMessage.STATUS, status=_wire(status))


def stop_status(status: Status) -> Any:
    return StopMessage(type=StopMessage.STATUS, status=_wire(status))


def _wire(status: Status) -> Any:
    return int(status)  # the generated types know no other enum than their own


def limit_message(limits: RelayLimits) -> Any:
    """What a relay announces of its limits; None when it has none: peers hold back on connections with any."""
    if not limits.circuit_bytes and not limits.circuit_seconds:
        return None
    limit = Limit()
    if limits.circuit_bytes:
        limit.data = limits.circuit_bytes
    if limits.circuit_seconds:
        limit.duration = min(2**32 - 1, max(1, int(limits.circuit_seconds)))
    return limit


def network_stream(stream: Stream) -> NetworkStream:
    assert isinstance(stream, NetworkStream), "circuits need the real network"
    return stream


async def send_eof(stream: NetworkStream) -> None:
    """Half-close: the other side sees the end, and we go on reading (`aclose` would give that up in a minute)."""
    try:
        await stream._muxed.close_write()
    except LIBRARY_ERRORS as exc:
        raise StreamClosed(f"the stream to peer {stream.peer} is closed: {exc}") from exc


def remote_ip(stream: NetworkStream) -> str | None:
    """The IP address at the other end of the connection that carries `stream`, where there is one."""
    address = stream._muxed.get_remote_address()
    return address[0] if address is not None else None


def remote_addr(stream: NetworkStream) -> str | None:
    """The same as a multiaddr."""
    addrs = stream._muxed.muxed_conn.get_transport_addresses()
    return str(addrs[0]) if addrs else None


def connection_lost(stream: NetworkStream) -> bool:
    return stream._muxed.muxed_conn.is_closed

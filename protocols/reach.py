"""Messages of `/p2pnode/reach/1`, by which a node learns whether strangers can connect to it, and their frames.

A frame is a 2-byte big-endian length and that many bytes of canonical CBOR: one message, a map whose "t" names its
type. The opener of a stream sends one request and the other answers with one RESULT; then the stream ends.

    DIAL    -> RESULT    open a new TCP connection to the address you see me at, and this port
    FORWARD -> RESULT    somebody asked me so; please do it in my place, as you have another address

Whoever dials negotiates `/p2pnode/dialback/1` by multistream-select where others negotiate a security protocol, sends
the nonce, and reads one byte, ACCEPTED, from a node that expects this nonce; from any other node nothing. The nonce
proves to the node that it was reached, the byte to the dialler that it reached the node and no one else.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from protocols import dagcbor
from protocols.errors import FrameError

PROTOCOL = "/p2pnode/reach/1"
DIALBACK = "/p2pnode/dialback/1"
HEADER = 2
MAX_FRAME = 256  # bytes of CBOR; the longest message has about 80
NONCE = 32
ACCEPTED = b"\x01"
LOWEST_PORT = 1024  # a FORWARD names an address that its receiver cannot check, so services of the system are taboo


class Outcome(enum.Enum):
    """What came of a dial."""

    REACHED = "reached"
    SILENT = "silent"  # nothing came back: dropped on the way
    CLOSED = "closed"  # a RST came back: nothing listens where this port leads
    STRANGER = "stranger"  # somebody else listens there
    UNREACHABLE = "unreachable"  # the dialler's network knows no way there
    REFUSED = "refused"  # not tried: too many requests, or an address this node does not dial


@dataclass(frozen=True, slots=True)
class Dial:
    port: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Forward:
    ip: bytes  # 4 or 16
    port: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Result:
    outcome: Outcome
    ip: bytes  # that was dialled: the asker's, as the node asked sees it


Message = Dial | Forward | Result


def encode(message: Message) -> bytes:
    """A whole frame."""
    match message:
        case Dial(port, nonce):
            fields: dict[str, Any] = {"t": "dial", "port": port, "nonce": nonce}
        case Forward(ip, port, nonce):
            fields = {"t": "forward", "ip": ip, "port": port, "nonce": nonce}
        case Result(outcome, ip):
            fields = {"t": "result", "outcome": outcome.value, "ip": ip}
    body = dagcbor.encode(fields)
    return len(body).to_bytes(HEADER, "big") + body


def body_size(header: bytes) -> int:
    """How many bytes follow the header. Raises `FrameError`."""
    size = int.from_bytes(header, "big")
    if not 0 < size <= MAX_FRAME:
        raise FrameError(f"a reach frame of {size} bytes")
    return size


def decode(body: bytes) -> Message:
    """The message of a frame's body. Raises `FrameError` or `DecodeError`."""
    fields = dagcbor.decode(body)
    if not isinstance(fields, dict):
        raise FrameError("a reach message that is not a map")
    match fields.get("t"), len(fields):
        case "dial", 3:
            return Dial(_port(fields), _bytes(fields, "nonce", NONCE))
        case "forward", 4:
            return Forward(_bytes(fields, "ip", 4, 16), _port(fields), _bytes(fields, "nonce", NONCE))
        case "result", 3:
            try:
                outcome = Outcome(fields.get("outcome"))
            except ValueError:
                raise FrameError("a reach result with an unknown outcome") from None
            return Result(outcome, _bytes(fields, "ip", 4, 16))
    raise FrameError("a reach message of unknown type, or with fields missing or added")


def _port(fields: dict[str, Any]) -> int:
    port = fields.get("port")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise FrameError("a reach message without a port")
    return port


def _bytes(fields: dict[str, Any], name: str, *sizes: int) -> bytes:
    value = fields.get(name)
    if not isinstance(value, bytes) or len(value) not in sizes:
        raise FrameError(f"a reach message whose {name} has the wrong form")
    return value

"""What a session tells its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocols.yamux.stream import Stream


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream; it waits for `Session.accept`."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamReadable:
    """A stream that had nothing to read has data now, or has ended."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamWritable:
    """A stream's send queue, found full before, has room again."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamReset:
    """A stream was aborted: by the peer, by us, for want of memory, or with its session (which leaves unread data)."""

    stream: Stream
    reason: str


@dataclass(frozen=True, slots=True)
class OpenAllowed:
    """`Session.can_open` was false and is true again."""


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    """The peer accepts no new streams; those that exist go on."""


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The session is over. `code` is a GO_AWAY code, None when the connection was lost without one."""

    code: int | None
    reason: str
    by_peer: bool


Event = StreamOpened | StreamReadable | StreamWritable | StreamReset | OpenAllowed | GoAwayReceived | SessionClosed

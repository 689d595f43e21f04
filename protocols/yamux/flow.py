"""Bounds: memory budgets, limits, and the allowance of frames that achieve nothing."""

from __future__ import annotations

from dataclasses import dataclass

from protocols.yamux.frames import INITIAL_WINDOW


class Budget:
    """Bytes of receive memory, shared: a session's budget draws from the node's.

    Counted are unread bytes and the window a stream was granted beyond the initial 256 KiB, so the sum is an upper
    bound of what peers can make us hold.
    """

    __slots__ = ("_parent", "limit", "used")

    def __init__(self, limit: int, parent: Budget | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._parent = parent

    def take(self, n: int) -> bool:
        """Reserve `n` bytes here and in the parent, or nothing at all."""
        if self.used + n > self.limit or (self._parent is not None and not self._parent.take(n)):
            return False
        self.used += n
        return True

    def give(self, n: int) -> None:
        self.used -= n
        if self._parent is not None:
            self._parent.give(n)

    def child(self, limit: int) -> Budget:
        return Budget(limit, self)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one session. Sizes in bytes, times in seconds."""

    accept_backlog: int = 256  # hashicorp/yamux AcceptBacklog; also how many of ours may wait for an ACK
    max_inbound_streams: int = 512  # open at once; each may hold 256 KiB before it is first read
    max_window: int = 16 * 1024 * 1024  # go-yamux MaxStreamWindowSize
    memory: int = 64 * 1024 * 1024
    ping_interval: float = 10.0
    ping_timeout: float = 10.0  # with the interval: a frozen peer is noticed within 20 s
    stall_timeout: float = 30.0  # a ping unanswered for as long ends the connection of a peer that is not silent ...
    stall_bytes: int = 64 * 1024  # ... but sends less than this meanwhile
    pong_timeout: float = 120.0  # the longest an answer may wait behind data: 5 MB of buffers at 0.4 Mbit/s
    linger: float = 60.0  # how long a stream we closed waits for the peer's FIN before it is reset
    max_control_queue: int = 4096  # answers a peer may make us queue while it does not read
    idle_frames: int = 2048  # burst of frames that achieve nothing ...
    idle_frames_per_second: float = 1000.0  # ... and how fast that allowance comes back
    skipped_ids: int = 1024  # SYNs may overtake each other (go-yamux numbers before it sends), but not by more


class Allowance:
    """Token bucket for frames that are legal but achieve nothing: floods of them are an attack."""

    __slots__ = ("_burst", "_left", "_rate", "_since")

    def __init__(self, burst: int, rate: float, now: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = float(burst)
        self._since = now

    def spend(self, now: float) -> bool:
        """Take one; False when there is none left."""
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now
        self._left -= 1
        return self._left >= 0


# Round trips between two Python event loops take this long however near the peer is: without a floor a loopback
# window would stop growing at a size that leaves the link idle while either side is busy encrypting.
RTT_FLOOR = 0.010


def grown_window(window: int, since_last_update: float, rtt: float | None, limit: int) -> int:
    """The receive window to grant next: doubled when half of it was used up within four round trips (go-yamux's
    rule, which settles at about twice the bandwidth-delay product), else unchanged."""
    if rtt is None or since_last_update > 4 * max(rtt, RTT_FLOOR):
        return window
    return max(window, min(2 * window, max(limit, INITIAL_WINDOW)))

"""What time a peer has: `/p2pnode/time/1`, and how far our own clock is off.

The opener of a stream sends one byte, REQUEST; the other answers with its time, 8 bytes: microseconds since 1970 (UTC),
unsigned, big-endian. Then the stream ends. As in NTP (RFC 5905 section 8), half of the round trip is taken for the way
back, which is wrong by half of it at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from protocols.errors import FrameError

PROTOCOL = "/p2pnode/time/1"
REQUEST = b"\x01"
ANSWER = 8  # bytes
_MICROSECONDS = 1_000_000
_LATEST = 253_402_300_800 * _MICROSECONDS  # the year 10000, which no calendar of a computer has


@dataclass(frozen=True, slots=True)
class Sample:
    """One peer's answer, in seconds. `offset`: what has to be added to our clock to have the peer's."""

    offset: float
    rtt: float


def encode(now: float) -> bytes:
    """The answer at `now`, in seconds since 1970."""
    return min(max(0, round(now * _MICROSECONDS)), _LATEST - 1).to_bytes(ANSWER, "big")


def decode(answer: bytes) -> float:
    """Seconds since 1970. Raises `FrameError`."""
    if len(answer) != ANSWER:
        raise FrameError(f"a time of {len(answer)} bytes")
    value = int.from_bytes(answer, "big")
    if value >= _LATEST:
        raise FrameError("a time after the year 9999")
    return value / _MICROSECONDS


def sample(sent: float, theirs: float, rtt: float) -> Sample:
    """From our time at which the request was sent, the peer's answer, and how long that took."""
    return Sample(theirs - (sent + rtt / 2), rtt)


def median(samples: Sequence[Sample]) -> float | None:
    """The offset that most agree on: fewer than half of the peers cannot move it far. None without samples."""
    return statistics.median(each.offset for each in samples) if samples else None

"""How much peers may have under way to us: what keeps our line busy, not what fills the queue in front of it.

TCP fills whatever queue a slow line has, and every peer that sends adds a window of its own: four initial windows of
256 KiB are 84 ms at 100 Mbit/s, which everybody else on the line waits behind. Only the receiver sees all of them. So
it watches how much longer a round trip takes than it could (the kernel's smoothed and minimal round trip times, which
know nothing of busy processes), and where that is a queue's doing it bounds the windows to the bandwidth-delay product
and 25 ms, shared by those who send. The idea and the target's order of magnitude are LEDBAT's (RFC 6817).
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.yamux.frames import INITIAL_WINDOW

TARGET = 0.025  # s of queue that our own transfers may cause; LEDBAT allows 100 ms, TCP whatever there is
DELAYED = 0.025  # s over the minimal round trip: delayed ACKs alone make up to 20 ms of smoothed round trip
SUSPICIOUS = 0.010  # s from which windows do not grow beyond what the rate needs: the smoothed time lags behind
HOLD = 5.0  # s that windows stay bounded after the last sign of a queue, or they would swing
FAST = 40e6  # bytes/s from which a megabyte in a queue is no longer noticed; there CPUs are the bound, not lines
MIN_WINDOW = 32 << 10
FRESH = 1.0  # s after which somebody who sent nothing counts no more
BUSY_SHARE = 0.05  # of all that arrives; who sends less shares no line


@dataclass(slots=True)
class _Sender:
    at: float
    rate: float = 0.0
    bounded_until: float = float("-inf")


class Downlink:
    """All that arrives at this node. Each connection tells now and then what it received, and is told its window."""

    def __init__(self) -> None:
        self._senders: dict[object, _Sender] = {}

    def measured(self, connection: object, received: int, rtt: float, min_rtt: float, now: float) -> int | None:
        """`connection` received this many bytes since it was here last; its round trip times in seconds.

        Returns the receive window it should have at most, in bytes, all its streams together; None: any.
        """
        sender = self._senders.get(connection)
        if sender is None:
            self._senders[connection] = _Sender(now)
            return None
        elapsed = max(now - sender.at, 1e-3)
        sender.rate += (received / elapsed - sender.rate) * min(1.0, elapsed / FRESH + 0.3)
        sender.at = now
        fresh = [other.rate for other in self._senders.values() if now - other.at <= FRESH]
        total = sum(fresh)
        if total >= FAST:
            return None
        if rtt - min_rtt > DELAYED:
            sender.bounded_until = now + HOLD
        busy = max(1, sum(rate > BUSY_SHARE * total for rate in fresh))
        bound = int(total / busy * (TARGET + min_rtt))
        if now <= sender.bounded_until:
            return max(MIN_WINDOW, bound)
        return max(INITIAL_WINDOW, bound) if rtt - min_rtt > SUSPICIOUS else None

    def forget(self, connection: object) -> None:
        """The connection ended."""
        self._senders.pop(connection, None)

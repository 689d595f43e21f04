"""How many bytes to have in flight with one peer, and how long to wait for them.

window = rate x max(4 x RTT, 0.5 s or 8 MiB): enough to keep the pipe full through scheduling noise, little enough that
a peer that turns slow holds up little and that chunks come about in the order in which they were asked for
(libtorrent's request_queue_time is 3 s; half a second suffices as we ask for chunks of 256 KiB instead of blocks of 16
KiB, and cancels are cheap). What is queued beyond the line's own bytes (`pipe`) the fast peers of a node share, see
`Swarm`. While starting, the window grows by one chunk per chunk received, that is it doubles per
round trip (TCP slow start; libtorrent's peer_connection::received_piece).
"""

from __future__ import annotations

from dataclasses import dataclass

START_WINDOW = 512 << 10  # two chunks of 256 KiB: one on the wire while the next is asked for
MAX_WINDOW = 64 << 20  # 10 Gbit/s x 50 ms
HORIZON = 0.5
HORIZON_BYTES = 8 << 20  # 32 chunks are enough to queue, however fast they come
RATE_INTERVAL = 0.25  # long enough for some chunks at 10 Mbit/s, short enough to follow a link that changes
SMOOTHING = 0.4
TIMEOUT_MIN = 2.0
TIMEOUT_MAX = 60.0


@dataclass(slots=True)
class Window:
    """Rate, round trip and response times of one peer, all measured; seconds, bytes, bytes per second."""

    rate: float = 0.0
    rtt: float = 0.0
    starting: bool = True
    size: float = START_WINDOW
    mean: float = 0.0
    deviation: float = 0.0
    _since: float | None = None
    _bytes: int = 0

    def began(self, now: float) -> None:
        """The first request after an idle time goes out: idle time must not count as slowness."""
        self._since = now
        self._bytes = 0

    def received(self, size: int, waited: float, now: float) -> None:
        """A chunk of `size` bytes came, `waited` seconds after its request or after the chunk before it."""
        error = waited - self.mean
        if not self.mean:
            self.mean, self.deviation = waited, waited / 2
        else:  # Jacobson's estimator with RFC 6298's weights
            self.mean += error / 8
            self.deviation += (abs(error) - self.deviation) / 4
        if self._since is None:
            self._since = now
        self._bytes += size
        if self.starting:
            self.size = min(self.size + size, max(HORIZON_BYTES, self.pipe), MAX_WINDOW)
        elapsed = now - self._since
        if elapsed >= RATE_INTERVAL:
            self._measure(self._bytes / elapsed)
            self._since, self._bytes = now, 0

    def answered(self, seconds: float) -> None:
        """A request that had nothing queued before it was answered after `seconds`: a round trip and one chunk."""
        self.rtt = seconds if not self.rtt else min(self.rtt, seconds)

    def _measure(self, sample: float) -> None:
        if self.starting and sample < self.rate * 1.1:
            self.starting = False  # more in flight no longer brings more
        self.rate = sample if not self.rate else self.rate + SMOOTHING * (sample - self.rate)
        if not self.starting:
            queue = min(self.rate * HORIZON, HORIZON_BYTES)
            self.size = min(max(queue, self.pipe), MAX_WINDOW)

    @property
    def pipe(self) -> float:
        """The bytes that the line itself takes, four times over; without a queue at either end."""
        return max(START_WINDOW, self.rate * 4 * self.rtt)

    def timed_out(self) -> None:
        """The peer stalled: begin again from the smallest window, and grow it again (TCP does so after a time-out)."""
        self.size = START_WINDOW / 2
        self.starting = True
        self.rate /= 2

    @property
    def timeout(self) -> float:
        """Seconds without a byte after which the peer has stalled."""
        return min(max(self.mean + 4 * self.deviation, TIMEOUT_MIN), TIMEOUT_MAX)

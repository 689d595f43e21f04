"""What has moved through the exchange: how much with whom, and whether something moves right now."""

from __future__ import annotations

import math
from dataclasses import dataclass

import trio

QUIET = 1.0  # s without a chunk until background work of the node goes on


@dataclass(frozen=True, slots=True)
class PeerTraffic:
    """Block bytes exchanged with a peer since the node started, and what it waits for."""

    received: int
    sent: int
    waiting: int


class Traffic:
    """Block bytes by peer, and when chunks last moved."""

    def __init__(self) -> None:
        self._received: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._moved = -math.inf

    def received(self, peer: str, size: int) -> None:
        self._received[peer] = self._received.get(peer, 0) + size
        self.expected()

    def sent(self, peer: str, size: int) -> None:
        self._sent[peer] = self._sent.get(peer, 0) + size
        self.expected()

    def expected(self) -> None:
        """Chunks move, or somebody says that some soon will."""
        self._moved = trio.current_time()

    def busy_until(self) -> float:
        """When the node will be quiet if no more chunks move; the clock of trio."""
        return self._moved + QUIET

    def of(self, peer: str, waiting: int) -> PeerTraffic:
        return PeerTraffic(self._received.get(peer, 0), self._sent.get(peer, 0), waiting)

"""What the decision core knows of each peer and each download. Changed by `swarm.Swarm` alone."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from protocols.exchange.events import AddDownload
from protocols.exchange.messages import MAX_IDS
from protocols.exchange.picker import Picker, Random, bit_test
from protocols.exchange.window import Window

FIRST_TIMEOUT = 8.0  # nothing measured yet: a busy seed may serve a hundred others first
SNUB_FIRST = 2.0
CANCELLED_MEMORY = 2 * MAX_IDS  # more than one peer can owe


@dataclass(frozen=True, slots=True)
class DownloadStats:
    """Where a download stands. Byte counts are of blocks, framing not counted."""

    remaining: int
    remaining_bytes: int
    received: dict[str, int]
    duplicate_bytes: int
    banned: dict[str, str]
    peers: int
    in_flight: int
    unavailable: int  # blocks wanted that no connected peer is known to have


@dataclass(slots=True)
class Peer:
    name: str
    near: bool = False
    window: Window = field(default_factory=Window)
    in_flight: dict[bytes, tuple[float, int]] = field(default_factory=dict)  # key -> when asked, bytes
    in_flight_bytes: int = 0
    probe: tuple[bytes, float] | None = None  # a request with nothing before it: measures the round trip
    heard: float = 0.0  # last byte of a block
    answered: float = 0.0  # last whole block
    score: int = 0
    resting_until: float = 0.0
    snub: float = SNUB_FIRST
    has: dict[bytes, tuple[int, bytearray | None]] = field(default_factory=dict)
    holds: set[bytes] = field(default_factory=set)
    lacks: set[bytes] = field(default_factory=set)
    # Downloads whose buckets hold nothing for this peer; what turns up for it later waits in `fresh`.
    dry: set[bytes] = field(default_factory=set)
    fresh: dict[bytes, deque[int]] = field(default_factory=dict)
    cancelled: deque[bytes] = field(default_factory=lambda: deque(maxlen=CANCELLED_MEMORY))

    def can_have(self, download: Download, index: int) -> bool:
        key = download.keys[index]
        if key in self.lacks:
            return False
        if key in self.holds:
            return True
        entry = self.has.get(download.id)
        return entry is not None and bit_test(entry[1])(index)

    def deadline(self) -> float:
        """When the peer counts as stalled; infinite while nothing is asked of it."""
        if not self.in_flight:
            return float("inf")
        first, _ = next(iter(self.in_flight.values()))
        wait = self.window.timeout if self.window.mean else FIRST_TIMEOUT
        return max(first, self.heard) + wait


class Download:
    def __init__(self, event: AddDownload, rng: Random) -> None:
        self.id = event.id
        self.keys = event.keys
        self.sizes = event.sizes
        self.order = event.order
        self.priority = event.priority
        self.index = {key: i for i, key in enumerate(event.keys)}
        self.here = bytearray(event.here)
        self.picker = Picker(len(event.keys), (i for i, h in enumerate(event.here) if not h), rng, event.order)
        self.picker.seeds_only = True
        self.partial_peers = 0
        self.near_seeds = 0
        self.neighbours: set[str] = set()  # who fetch it too
        self.sharers: list[str] = []  # they and we, in order
        self.near_progress: float | None = None  # when neighbours last got something
        self.near_slow_until = float("-inf")
        self.near_copies = array("H", bytes(2 * len(event.keys)))  # of each chunk, at neighbours with a part
        self.remaining = len(self.picker)
        self.remaining_bytes = sum(size for size, h in zip(event.sizes, event.here, strict=True) if not h)
        self.received: dict[str, int] = {}
        self.duplicate_bytes = 0
        self.banned: dict[str, str] = {}
        self.find_at = 0.0
        self.found_at = float("-inf")

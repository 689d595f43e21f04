"""Which chunk of one download to ask a peer for next.

Random until four chunks are there, then rarest first with ties at random (Cohen 2003, "Incentives build robustness in
BitTorrent", section 2.4; libtorrent's piece_picker keeps the same buckets by availability), or in order for somebody
who is reading. Where everybody has everything no chunk is rarer than another, and chunks come nearly in order: whoever
verifies the image can follow closely, and yet several who fetch the same do not ask for the same. Chunks are numbered
in the image's order; what a peer has is a bit field (most significant bit first).
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

RANDOM_FIRST = 4  # libtorrent's initial_picker_threshold
NEARLY = 16  # chunks among which the next is picked at random when they come nearly in order: 4 MiB
SCAN = 256  # chunks looked at per bucket before `Scattered` is the answer; bounds the work per choice


class Random(Protocol):
    """The part of `random.Random` used here; given by the caller so that simulations repeat."""

    def random(self) -> float: ...


class Order(enum.Enum):
    RAREST = "rarest"
    SEQUENTIAL = "sequential"


Has = Callable[[int], bool]


class Scattered(Exception):
    """The peer has few or none of the chunks left: take the list of `Picker.all_of`, once, instead of searching."""


def bit_test(bits: bytes | bytearray | None) -> Has:
    """Whether a bit field has a number; None is a field of ones."""
    if bits is None:
        return lambda index: True
    return lambda index: bool(bits[index >> 3] & (0x80 >> (index & 7)))


class Picker:
    """The chunks of a download that are neither here nor asked for, in buckets by how many peers have them.

    `take` removes a chunk from the buckets, `put_back` returns it (its request failed). All operations but a scan
    past chunks the peer lacks, which is bounded, are O(1).
    """

    def __init__(self, count: int, wanted: Iterable[int], rng: Random, order: Order = Order.RAREST) -> None:
        self.order = order
        self.taken = 0
        self.seeds_only = False  # told by the owner: nobody is known to have only a part
        self._rng = rng
        self._availability = array("H", bytes(2 * count))
        self._buckets: list[list[int]] = [[]]
        self._place = array("l", [-1]) * count  # position within its bucket, -1: not in one
        self._cursor = 0
        self._count = 0
        for index in wanted:
            self._insert(index)

    def __len__(self) -> int:
        """Chunks that may be picked."""
        return self._count

    def __contains__(self, index: int) -> bool:
        return self._place[index] >= 0

    def __iter__(self) -> Iterator[int]:
        for bucket in self._buckets:
            yield from bucket

    def availability(self, index: int) -> int:
        """Peers known to have the chunk, those that have everything not counted."""
        return self._availability[index]

    def _insert(self, index: int) -> None:
        level = self._availability[index]
        while len(self._buckets) <= level:
            self._buckets.append([])
        bucket = self._buckets[level]
        self._place[index] = len(bucket)
        bucket.append(index)
        self._count += 1

    def _remove(self, index: int) -> None:
        bucket = self._buckets[self._availability[index]]
        at = self._place[index]
        last = bucket.pop()
        if last != index:
            bucket[at] = last
            self._place[last] = at
        self._place[index] = -1
        self._count -= 1

    def change(self, index: int, by: int) -> None:
        """One peer more (`by` = 1) or fewer (-1) has the chunk."""
        level = self._availability[index] + by
        if not 0 <= level <= 0xFFFF:
            return
        listed = index in self
        if listed:
            self._remove(index)
        self._availability[index] = level
        if listed:
            self._insert(index)

    def take(self, index: int) -> None:
        self._remove(index)
        self.taken += 1

    def put_back(self, index: int) -> None:
        if index not in self:
            self._insert(index)
            self._cursor = min(self._cursor, index)

    def drop(self, index: int) -> None:
        """The chunk is here: it will not be asked for again."""
        if index in self:
            self._remove(index)

    def pick(self, has: Has) -> int | None:
        """A chunk the peer has, taken; None if the picker is empty.

        Raises `Scattered` if a bounded search finds none.
        """
        if not self._count:
            return None
        if self.order is Order.SEQUENTIAL:
            index = self._next_in_order(has)
        elif self.seeds_only:
            index = self._next_nearly_in_order(has)
        else:
            index = self._rarest(has)
        if index is None:
            raise Scattered
        self.take(index)
        return index

    def all_of(self, has: Has) -> list[int]:
        """All chunks that may be picked and that the peer has, the best to pick first. Walks the whole picker."""
        found = [index for index in self if has(index)]
        return sorted(found) if self.order is Order.SEQUENTIAL else found

    def rarest_of_all(self) -> Sequence[int]:
        """The chunks in the picker that only peers who have everything, or nobody, are known to have."""
        return self._buckets[0]

    def search(self, has: Has, level: int) -> int | None:
        """One of the rarest chunks, of those that fewer than `level` peers are known to have; not taken. Bounded."""
        left = SCAN
        for bucket in self._buckets[:level]:
            size = len(bucket)
            start = int(self._rng.random() * size)
            for step in range(min(size, left)):
                index = bucket[start + step - size]
                if has(index):
                    return index
            left -= min(size, left)
            if not left:
                break
        return None

    def _next_in_order(self, has: Has, skip: int = 0) -> int | None:
        while self._cursor < len(self._place) and self._place[self._cursor] < 0:
            self._cursor += 1
        ahead = range(self._cursor + skip, min(self._cursor + skip + 16 * SCAN, len(self._place)))
        return next((i for i in ahead if self._place[i] >= 0 and has(i)), None)

    def _next_nearly_in_order(self, has: Has) -> int | None:
        # Every third or fourth is the very next one, or some would lag behind for long.
        skip = max(0, int(self._rng.random() * NEARLY * 4 / 3) - NEARLY // 3)
        index = self._next_in_order(has, skip)
        return self._next_in_order(has) if index is None else index

    def _rarest(self, has: Has) -> int | None:
        buckets = self._buckets
        if self.taken < RANDOM_FIRST:
            # At the start rare chunks would all come from the one slow peer that has them.
            buckets = sorted(buckets, key=len, reverse=True)
        for bucket in buckets:
            size = len(bucket)
            start = int(self._rng.random() * size)
            for step in range(min(size, SCAN)):
                index = bucket[start + step - size]
                if has(index):
                    return index
        return None

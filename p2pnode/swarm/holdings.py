"""What this node has of the images that peers follow: the bit fields behind AVAILABILITY and HAVE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from p2pnode.store import Store
from protocols.cid import CID, Codec
from protocols.exchange.messages import Availability

_RAW = CID(Codec.RAW, bytes(32)).to_bytes()[:4]


def chunk_key(digest: bytes) -> bytes:
    """The binary CID of a chunk."""
    return _RAW + digest


def _bits(held: bytearray) -> bytearray:
    """One bit for each byte of 0 or 1, most significant first."""
    if not held:
        return bytearray()
    number = int(held.translate(b"01" + bytes(254)), 2) << -len(held) % 8
    return bytearray(number.to_bytes((len(held) + 7) // 8, "big"))


@dataclass(slots=True)
class Holding:
    """One image: bit number of each chunk key, and the bits (most significant first) of those that are here."""

    index: dict[bytes, int]
    bits: bytearray
    here: int
    new: list[int] = field(default_factory=list)

    def set(self, number: int, value: bool) -> bool:
        """Set one bit; whether that changed it."""
        mask = 0x80 >> (number & 7)
        if bool(self.bits[number >> 3] & mask) == value:
            return False
        self.bits[number >> 3] ^= mask
        self.here += 1 if value else -1
        return True


class Holdings:
    """Loaded from the store when first asked for, then kept up to date by `arrived` and `lost`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._images: dict[CID, Holding] = {}
        self._changes: list[tuple[bytes, bool]] | None = None
        self._loading = trio.Lock()

    async def availability(self, root: CID) -> Availability:
        """What to tell a peer that is interested in `root`."""
        holding = await self._load(root)
        if holding is None:
            return Availability(root, 0)
        count = len(holding.index)
        return Availability(root, count, None if 0 < count == holding.here else bytes(holding.bits))

    async def _load(self, root: CID) -> Holding | None:
        async with self._loading:
            if root not in self._images:
                self._changes = []
                holding = await trio.to_thread.run_sync(self._read, root)
                changes, self._changes = self._changes, None
                if holding is None:
                    return None
                for key, here in changes:  # happened while the store was read
                    if key in holding.index:
                        holding.set(holding.index[key], here)
                self._images[root] = holding
            return self._images[root]

    def _read(self, root: CID) -> Holding | None:
        image = self._store.image(root)
        if image is None:
            return None
        index = {chunk_key(digest): i for i, digest in enumerate(image.chunks)}
        held = self._store.held_of(image)
        return Holding(index, _bits(held), sum(held))

    def arrived(self, keys: Iterable[bytes]) -> bool:
        """Chunks are here now; whether anybody has to be told."""
        return self._change(keys, True)

    def lost(self, keys: Iterable[bytes]) -> bool:
        return self._change(keys, False)

    def _change(self, keys: Iterable[bytes], here: bool) -> bool:
        changed = False
        for key in keys:
            if self._changes is not None:
                self._changes.append((key, here))
            for holding in self._images.values():
                number = holding.index.get(key)
                if number is not None and holding.set(number, here):
                    changed = True
                    if here:
                        holding.new.append(number)
        return changed

    def take_new(self) -> dict[CID, list[int]]:
        """Bit numbers that came since the last call, by image."""
        news = {}
        for root, holding in self._images.items():
            if holding.new:
                news[root], holding.new = holding.new, []
        return news

    def forget(self, root: CID) -> None:
        """Nobody follows the image any more, or it was removed."""
        self._images.pop(root, None)

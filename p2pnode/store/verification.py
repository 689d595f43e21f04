"""Reading a whole image again, to know rather than to believe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from blake3 import blake3

from p2pnode.errors import ChunkUnavailable, NotFound
from p2pnode.store.records import BadObject, VerifyReport
from protocols.cid import CID
from protocols.manifest import ImageObject

if TYPE_CHECKING:
    from p2pnode.store.store import Store


def verify(store: Store, id: CID, progress: Callable[[int, int], None]) -> VerifyReport:
    """See `Store.verify`."""
    image = store.image(id)
    if image is None:
        raise NotFound(f"image {id} is not in this store, or its manifest there is damaged: fetch it again")
    good: set[bytes] = set()
    bad: list[BadObject] = []
    done = 0
    for obj in image.objects:
        fault = _verify_object(store, obj, good, partial(_advance, progress, done, image.size))
        if fault is not None:
            bad.append(fault)
        done += obj.size
    return VerifyReport(id, len(good), sum(image.chunks[digest] for digest in good), tuple(bad))


def _advance(progress: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    progress(before + count, total)


def _verify_object(
    store: Store, obj: ImageObject, good: set[bytes], progress: Callable[[int], None]
) -> BadObject | None:
    hasher = hashlib.sha256() if obj.is_nar else blake3()
    bad: set[bytes] = set()
    done = 0
    for digest, size in zip(obj.layout.digests, obj.layout.sizes, strict=True):
        if digest not in good and digest not in bad:
            store.check_locations(digest)
        try:
            hasher.update(store.read(digest))
            good.add(digest)
        except ChunkUnavailable:
            bad.add(digest)
            good.discard(digest)
        done += size
        progress(done)
    if bad:
        return BadObject(obj.path, len(bad), f"{len(bad)} of its chunks are missing or damaged")
    if hasher.digest() != (obj.nar_hash or obj.file_hash):
        return BadObject(obj.path, 0, "its chunks are good, but its hash is not the one that the manifest promises")
    return None

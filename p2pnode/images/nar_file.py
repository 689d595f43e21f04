"""Kind `store-path` out of a NAR that lies in a file, as binary caches have it, rather than out of the tree itself.

The image is the same that a machine with this path would provide.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace

from p2pnode.errors import StoreError, VerificationFailed
from p2pnode.images.chunker import WINDOW_SIZE, chunk_stream
from p2pnode.nix.cli import FLAT_CA_LIMIT, PathInfo
from p2pnode.nix.content_address import ContentCheck, names_path, proved_by_nar_hash
from p2pnode.nix.nar_reader import NarReader
from p2pnode.nix.storepath import infer_ca
from p2pnode.store import Store
from p2pnode.store.landing import Landing
from p2pnode.store.records import Origin
from protocols.manifest import Chunking, Image, ImageObject, Kind, Layout, encode_image

LANDING_BATCH = 4 << 20  # bytes of chunks that are written in one go


class _Root:
    """NarVisitor: the SHA-256 of the contents, if the NAR is that of one file that is not executable."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._flat = False
        self._depth = 0

    @property
    def flat_sha256(self) -> bytes | None:
        return self._hash.digest() if self._flat else None

    def enter_directory(self, name: bytes) -> None:
        self._depth += 1

    def leave_directory(self) -> None:
        self._depth -= 1

    def begin_file(self, name: bytes, executable: bool, size: int) -> None:
        self._flat = not (self._depth or executable or size > FLAT_CA_LIMIT)

    def file_contents(self, data: memoryview) -> None:
        if self._flat:
            self._hash.update(data)

    def end_file(self) -> None: ...
    def symlink(self, name: bytes, target: bytes) -> None: ...


class _Checked:
    """A `Hasher` that also sees whether its bytes are a NAR that can be unpacked, and have the right contents."""

    def __init__(self, info: PathInfo) -> None:
        self._hash = hashlib.sha256()
        self._root = _Root()
        self._reader = NarReader(self._root, max_size=info.nar_size)
        self._small = info.nar_size <= FLAT_CA_LIMIT
        self._proof = ContentCheck(info) if names_path(info) and not proved_by_nar_hash(info) else None

    def update(self, data: memoryview, /) -> None:
        self._hash.update(data)
        self._reader.feed(data)
        if self._proof is not None:
            self._proof.feed(data)

    def digest(self) -> bytes:
        return self._hash.digest()

    def finish(self) -> bytes | None:
        """Say that the NAR has ended; the hash of the contents of a small plain file."""
        self._reader.close()
        if self._proof is not None:
            self._proof.finish()
        return self._root.flat_sha256 if self._small else None


def read_nar(
    fd: int,
    info: PathInfo,
    chunking: Chunking,
    *,
    advance: Callable[[int], None] = lambda count: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> ImageObject:
    """The object of the NAR in a file, read from its beginning. Blocks.

    Raises VerificationFailed (not the NAR that `info` describes), NarError (one that no Nix would unpack), Cancelled.
    """
    at = 0

    def fill(view: memoryview) -> int:
        nonlocal at
        # One byte more than there has to be, so that a longer file is seen and never read to its end.
        count = os.preadv(fd, [view[: info.nar_size + 1 - at]], at)
        at += count
        return count

    check = _Checked(info)
    window = min(WINDOW_SIZE, info.nar_size + 1)  # most paths are tiny
    chunked = chunk_stream(fill, chunking, check, advance=advance, cancelled=cancelled, window_size=window)
    if at != info.nar_size or chunked.digest != info.nar_hash:
        raise VerificationFailed(f"the NAR of {info.path} does not have the hash and size that it should have")
    return _store_path_object(info, chunked.layout, check.finish())


def known_nar(store: Store, obj: ImageObject, info: PathInfo) -> ImageObject:
    """`obj`, which has the same NAR and is here, as the only object of an image of `info.path`. Blocks.

    Raises ChunkUnavailable.
    """
    if obj.path != info.path.base_name or (obj.ca is not None and not names_path(replace(info, ca=obj.ca))):
        return _store_path_object(info, obj.layout, _flat_sha256(store, obj))
    return replace(_store_path_object(info, obj.layout, None), ca=obj.ca)


def _flat_sha256(store: Store, obj: ImageObject) -> bytes | None:
    """The hash of the contents, if the NAR of an object that is here is that of a small plain file."""
    if obj.size > FLAT_CA_LIMIT:
        return None
    root = _Root()
    reader = NarReader(root, max_size=obj.size)
    for digest in obj.layout.digests:
        reader.feed(memoryview(store.read(digest)))
        if root.flat_sha256 is None:  # the first bytes tell
            return None
    return root.flat_sha256


def _store_path_object(info: PathInfo, layout: Layout, flat: bytes | None) -> ImageObject:
    address = infer_ca(info.path, info.nar_hash, info.references, flat)
    itself = (0,) if info.path in info.references else ()
    ca = None if address is None else str(address)
    return ImageObject(info.path.base_name, info.nar_size, layout, info.nar_hash, None, itself, ca)


def add_store_path(
    store: Store, obj: ImageObject, name: str, origin: Origin, *, path: str | None, complete: bool
) -> Image:
    """Put the image of one store path into the catalog. `complete`: its chunks are all here. Blocks."""
    encoded = encode_image(Kind.STORE_PATH, {}, [obj])
    image = Image(encoded.id, Kind.STORE_PATH, {}, (obj,), tuple(encoded.blocks))
    with store.catalog.transaction():
        store.put_blocks(encoded.blocks)
        store.add_image(image, name=name, origin=origin, complete=complete, path=path)
    return image


def land_nar(store: Store, obj: ImageObject, fd: int, name: str, origin: Origin) -> Image:
    """Copy a NAR, which `read_nar` has read, into the store, less the chunks that are here. Blocks.

    Raises DiskFull, OutputUnwritable, StoreError; OutputExists while the image is being fetched.
    """
    image = add_store_path(store, obj, name, origin, path=None, complete=False)
    landing = store.landing(image)
    try:
        here = dict(zip(image.chunks, store.held(image.chunks), strict=True))
        batch: list[tuple[bytes, tuple[bytes]]] = []
        offset = size = 0
        for digest, length in zip(obj.layout.digests, obj.layout.sizes, strict=True):
            if not here[digest]:
                here[digest] = 1
                batch.append((digest, (os.pread(fd, length, offset),)))
                size += length
            offset += length
            if size >= LANDING_BATCH:
                _accept(landing, batch)
                batch, size = [], 0
        _accept(landing, batch)
    finally:
        landing.close()
    store.mark_complete(image.id, None)
    return image


def _accept(landing: Landing, batch: list[tuple[bytes, tuple[bytes]]]) -> None:
    if not all(landing.accept_many(batch)):
        raise StoreError(f"what is copied to {landing.path} was changed while it was read")

"""Where a fetch writes: one file per image, each chunk at its own place, each byte written once.

The file of a landing is an owned source from its first chunk on, so what has arrived is served, survives a kill, and
needs no second pass when it turns into the output.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from p2pnode.errors import ChunkUnavailable, OutputExists, PathError, StoreError
from p2pnode.nix.file_range import FileRange
from p2pnode.store.catalog import Catalog
from p2pnode.store.records import SourceKind
from p2pnode.store.rename import remove_quietly
from p2pnode.store.space import write_failure
from p2pnode.store.writeback import WriteBehind
from protocols.cid import CID
from protocols.manifest import Image, Kind

if TYPE_CHECKING:
    from p2pnode.store.store import Store

IOV_MAX = 1024  # limits.h: buffers of one pwritev
RUN_BYTES = 8 << 20  # and about so much of data

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

Buffer = bytes | bytearray | memoryview


def partial_path(image: CID, out: Path) -> Path:
    """The hidden file beside `out` that a fetch of `image` writes to. The same each time, so that it resumes."""
    # Names end at 255 bytes, and the suffix takes 26.
    name = os.fsdecode(os.fsencode(out.name)[:220])
    return out.with_name(f".{name}.{str(image)[-8:]}.p2pnode-partial")


def chunk_places(image: Image) -> tuple[dict[bytes, list[int]], int]:
    """Offsets of each chunk in the image's pack, and the pack's size in bytes.

    A `file` image's pack is the file itself; the others' is their distinct chunks, one after the other.
    """
    places: dict[bytes, list[int]] = {}
    offset = 0
    if image.kind is Kind.FILE:
        layout = image.objects[0].layout
        for digest, size in zip(layout.digests, layout.sizes, strict=True):
            places.setdefault(digest, []).append(offset)
            offset += size
    else:
        for digest, size in image.chunks.items():
            places[digest] = [offset]
            offset += size
    return places, offset


class Landing:
    """The file that a fetch writes to. Thread-safe, blocking. Get one from `Store.landing`.

    `path`: the pack, or the hidden partial beside the output.
    """

    def __init__(self, store: Store, catalog: Catalog, image: Image, path: Path, *, partial: bool) -> None:
        """Raises PathError (its directory does not exist, or another process writes to it), OutputUnwritable."""
        self.path = path
        self._store = store
        self._catalog = catalog
        self._image = image
        self._partial = partial
        self._lock = threading.Lock()
        self._sizes = image.chunks
        self._places, self._size = chunk_places(image)
        rows = catalog.sources("image = ? AND path = ?", image.id.to_bytes(), os.fsencode(path))
        existed = os.path.lexists(path)
        if rows and not existed:
            store.forget_source(rows[0].id)
            rows = []
        # The row is committed before the file is made: a file without a row is nobody's.
        self._source = rows[0].id if rows else catalog.add_source(SourceKind.FILE, path, owned=True, image=image.id)
        self._written = set(catalog.source_digests(self._source)) if rows else set[bytes]()
        self._fd = -1
        self._behind = WriteBehind()
        try:
            self._open(resume=bool(rows))
        except BaseException as error:
            if self._fd >= 0:
                os.close(self._fd)
            if not rows:
                catalog.drop_source(self._source)
                if not existed and not isinstance(error, OutputExists):
                    remove_quietly(path)
            raise

    def _open(self, *, resume: bool) -> None:
        try:
            self._fd = os.open(self.path, _FLAGS, 0o666)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputExists(f"{self.path} is being written by another fetch; wait for it to end") from None
            size = os.fstat(self._fd).st_size
            if size and not resume:
                os.ftruncate(self._fd, 0)  # whatever it holds, nothing tells what of it is good
                size = 0
            if size != self._size:
                os.ftruncate(self._fd, self._size)
        except (FileNotFoundError, NotADirectoryError):
            raise PathError(f"{self.path.parent} is not a directory, so nothing can be written into it") from None
        except OSError as error:
            raise write_failure(self.path, error) from error

    def accept(self, digest: bytes, data: Buffer) -> bool:
        """Verify and write one chunk. False: these are not the chunk's bytes, so the sender lied.

        Raises DiskFull, OutputUnwritable, StoreError.
        """
        return self.accept_many([(digest, (data,))])[0]

    def accept_many(self, chunks: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[bool]:
        """Verify and write chunks, each a digest and its data in pieces. Raises as `accept` does; then none of them
        counts as held."""
        good = [self._is_chunk(digest, pieces) for digest, pieces in chunks]
        kept = [chunk for ok, chunk in zip(good, chunks, strict=True) if ok]
        rows = [(digest, self._source, self._places[digest][0], self._sizes[digest]) for digest, _ in kept]
        with self._lock:
            if self._fd < 0:
                raise StoreError(f"{self.path} was closed before everything had arrived")
            if kept:
                self._write(kept)
                self._catalog.defer(rows, sum(length for _, _, _, length in rows))
                self._behind.wrote(self._fd, [(place, length) for _, _, place, length in rows])
                self._written.update(digest for digest, _ in kept)
        return good

    def _is_chunk(self, digest: bytes, pieces: Sequence[Buffer]) -> bool:
        if sum(map(len, pieces)) != self._sizes.get(digest):
            return False
        hasher = blake3()
        for piece in pieces:
            hasher.update(piece)
        return hasher.digest() == digest

    def _write(self, chunks: Iterable[tuple[bytes, Sequence[Buffer]]]) -> None:
        try:
            for place, pieces in _runs(self._parts(chunks)):
                _write_all(self._fd, pieces, place)
        except OSError as error:
            raise write_failure(self.path, error) from error

    def _parts(self, chunks: Iterable[tuple[bytes, Sequence[Buffer]]]) -> list[tuple[int, Sequence[Buffer]]]:
        """What is to be written, and where, in the order of the file."""
        parts: list[tuple[int, Sequence[Buffer]]] = []
        for digest, pieces in chunks:
            places = self._places[digest]
            if not any(memoryview(pieces[0])[:4096]) and all(bytes(piece).count(0) == len(piece) for piece in pieces):
                places = [place for place in places if not self._is_hole(place, self._sizes[digest])]
            parts += ((place, pieces) for place in places)
        parts.sort(key=itemgetter(0))
        return parts

    def _is_hole(self, offset: int, length: int) -> bool:
        """Whether zeros need not be written there. (Damaged bytes may stand where a chunk is fetched again.)"""
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from there to the end
                return True
            raise

    def offset(self, digest: bytes) -> int:
        """Where in the file a chunk of the image has its first place."""
        return self._places[digest][0]

    def place(self, digest: bytes) -> FileRange | None:
        """Where a chunk was written; None if that was not here. Good until `close`, and for those only who check what
        they read: nobody has looked at the bytes since."""
        if digest not in self._written:
            return None
        return FileRange(self._fd, self._places[digest][0], self._sizes[digest])

    def read(self, digest: bytes) -> bytes | None:
        """A chunk that was written here, checked, without a look at the catalog; None if only the store can tell."""
        place = self.place(digest)
        if place is None:
            return None
        try:
            data = place.read()
        except (OSError, StoreError):
            return None
        return data if blake3(data).digest() == digest else None

    def copy_local(self, digests: Iterable[bytes], cancelled: Callable[[], bool] = lambda: False) -> int:
        """Copy those chunks that other sources hold into the partial; bytes copied.

        A pack needs no copies: returns 0. Chunks whose bytes turn out bad are left to be fetched.
        """
        if not self._partial:
            return 0
        present = set(self._catalog.source_digests(self._source))
        wanted = [digest for digest in digests if digest in self._sizes and digest not in present]
        copied = 0
        for digest, here in zip(wanted, self._store.held(wanted), strict=True):
            if cancelled():
                break
            if not here:
                continue
            try:
                data = self._store.read(digest)
            except ChunkUnavailable:
                continue
            if self.accept(digest, data):
                copied += len(data)
        return copied

    def missing(self) -> list[bytes]:
        """The image's chunks that this file does not hold."""
        present = set(self._catalog.source_digests(self._source))
        return [digest for digest in self._sizes if digest not in present]

    def flush(self) -> None:
        """Commit the rows of everything accepted."""
        self._catalog.commit()

    def sync(self) -> None:
        """Commit, and force the file's bytes to the disk. Raises DiskFull, StoreError."""
        self.flush()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise write_failure(self.path, error) from error

    def close(self) -> None:
        """Commit and close; what was accepted stays for the next landing of the image. May be called again.

        A file that holds nothing is removed.
        """
        with self._lock:
            if self._fd < 0:
                return
            try:
                self._catalog.commit()
                if self._is_empty():
                    self._catalog.drop_source(self._source)
                    remove_quietly(self.path)
            finally:  # a full disk must not keep the next landing from the file
                fd, self._fd = self._fd, -1
                os.close(fd)
                self._store.landing_closed(self._image.id)

    def _is_empty(self) -> bool:
        if not self._catalog.sources("id = ? AND owned", self._source):
            return False  # it has become the user's
        return not self._catalog.query("SELECT 1 FROM chunks WHERE source = ? LIMIT 1", self._source)


def _runs(parts: Iterable[tuple[int, Sequence[Buffer]]]) -> Iterator[tuple[int, list[Buffer]]]:
    """Ascending parts of a file, those in one that follow each other: chunks do not end where pages do, and a page, or
    a large folio of them, is best filled at once. Bounded: some chunks have thousands of places in a row."""
    run: list[Buffer] = []
    start = end = 0
    for place, pieces in parts:
        for piece in pieces:
            if place != end or len(run) == IOV_MAX or end - start >= RUN_BYTES:
                if run:
                    yield start, run
                run, start = [], place
            run.append(piece)
            place = end = place + len(piece)
    if run:
        yield start, run


def _write_all(fd: int, pieces: Sequence[Buffer], place: int) -> None:
    """Write up to IOV_MAX pieces one after the other."""
    size = sum(map(len, pieces))
    written = os.pwritev(fd, pieces, place)
    if written < size:  # rare enough to copy
        rest = memoryview(b"".join(pieces))
        while written < size:
            written += os.pwrite(fd, rest[written:], place + written)

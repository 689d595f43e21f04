"""Making objects of files and trees: read once, recorded at once, not read again while unchanged."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from p2pnode.errors import PathError
from p2pnode.images.chunker import blake3_256, check_cancelled, chunk_stream, sha256
from p2pnode.nix.nar_walk import tree_fingerprint
from p2pnode.nix.narmap import NarMap, NarTree
from p2pnode.progress import Progress, Report
from p2pnode.store.imports import ImportKey
from p2pnode.store.records import FileStamp, SourceKind
from p2pnode.store.store import Store
from protocols.manifest import Chunking, ImageObject

# Files written within one tick of a file system's clock may have one ctime: ext4 and XFS count in 1-10 ms, others in
# whole seconds (git's "racy" entries, Documentation/technical/racy-git.txt).
CLOCK_TICK_NS = 2_000_000_000

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(slots=True)
class ImportRun:
    """One import under way. `total`: bytes known to be in it; `new_bytes`: distinct chunks that were not held."""

    store: Store
    chunking: Chunking
    report: Report
    cancelled: Callable[[], bool]
    total: int = 0
    done: int = 0
    new_bytes: int = 0
    reused: bool = True

    def advance(self, count: int) -> None:
        self.done += count
        self.report(Progress("importing", self.done, max(self.total, self.done)))

    def file(self, path: Path, name: str) -> ImageObject:
        """An object of the regular file at `path`. Raises PathError."""
        try:
            fd = os.open(path, _FLAGS)
        except OSError as error:
            raise PathError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from error
        try:
            began, unwritten = time.time_ns(), _nobody_writes(fd)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise PathError(f"{path} is not a regular file")
            stamp = FileStamp.of(status)
            key = self._key(path, repr(stamp).encode())
            self.total = max(self.total, stamp.size)
            known = self._recall(key, SourceKind.FILE, name)
            if known is not None:
                return known
            chunked = chunk_stream(
                lambda view: os.readv(fd, [view]),
                self.chunking,
                blake3_256(),
                advance=self.advance,
                cancelled=self.cancelled,
            )
            size = chunked.layout.size
            after = os.fstat(fd)
            if size != stamp.size or FileStamp.of(after) != stamp:
                raise PathError(f"{path} changed while it was being read; try again when nothing writes to it")
            if unwritten and after.st_ctime_ns == status.st_ctime_ns < began - CLOCK_TICK_NS:
                stamp = replace(stamp, ctime_ns=status.st_ctime_ns)
        except OSError as error:
            raise PathError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from error
        finally:
            os.close(fd)
        obj = ImageObject(name, size, chunked.layout, file_hash=chunked.digest)
        self._remember(key, obj, stamp)
        return obj

    def nar(self, path: Path, name: str, *, registered: bytes | None = None) -> ImageObject:
        """An object of the NAR of the tree at `path`. Raises PathError.

        `registered`: the NAR hash that a Nix store has for the path, which stands for its contents there.
        """
        if registered is None:
            key = self._key(path, tree_fingerprint(path))
        else:
            key = ImportKey.registered(path, self.chunking, registered)
        known = self._recall(key, SourceKind.NAR, name)
        if known is not None:
            return known
        map = NarMap.build(path)
        self.total = max(self.total, self.done + map.size)
        with NarTree(path) as tree:
            pieces = map.pieces(tree)
            rest = memoryview(b"")

            def fill(view: memoryview) -> int:
                nonlocal rest
                if not rest:
                    rest = memoryview(next(pieces, b""))
                count = min(len(rest), len(view))
                view[:count] = rest[:count]
                rest = rest[count:]
                return count

            chunked = chunk_stream(fill, self.chunking, sha256(), advance=self.advance, cancelled=self.cancelled)
        # Every file was looked at again after it was read; this sees names that came and went.
        if tree_fingerprint(path) != map.fingerprint:
            raise PathError(f"{path} changed while it was being read; try again when nothing writes to it")
        obj = ImageObject(name, chunked.layout.size, chunked.layout, nar_hash=chunked.digest)
        if registered is None or chunked.digest == registered:
            self._remember(key if registered is not None else self._key(path, map.fingerprint), obj, map)
        return obj

    def _key(self, path: Path, fingerprint: bytes) -> ImportKey:
        return ImportKey(os.fsencode(path), self.chunking, fingerprint)

    def _recall(self, key: ImportKey, kind: SourceKind, name: str) -> ImageObject | None:
        check_cancelled(self.cancelled)  # here too: a closure may have thousands of small or known objects
        obj = self.store.recall_object(key, kind)
        if obj is None:
            self.reused = False
            return None
        self.total = max(self.total, self.done + obj.size)
        self.advance(obj.size)
        return replace(obj, path=name)

    def _remember(self, key: ImportKey, obj: ImageObject, original: FileStamp | NarMap) -> None:
        chunks = dict(zip(obj.layout.digests, obj.layout.sizes, strict=True))
        held = self.store.held(chunks)
        self.new_bytes += sum(size for size, here in zip(chunks.values(), held, strict=True) if not here)
        self.store.remember_object(key, obj, original)


def _nobody_writes(fd: int) -> bool:
    """Whether no process has the file open for writing, or mapped so; False also where the kernel does not tell.

    What is written through a mapping to a page that is dirty already comes without a new ctime (on tmpfs always);
    whoever opens the file after this changes the ctime with the first write. The kernel gives read leases only where
    there is no writer, and to the owner only (fcntl(2)). It tells of one who comes before we give it back with a
    signal that is ignored.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # the usual one, SIGIO, would end the process
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True

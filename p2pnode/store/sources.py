"""Reading pieces of sources: a small pool of open descriptors, shared by all threads."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from p2pnode import slabs
from p2pnode.errors import ChunkUnavailable, NarError, PathError, StoreError
from p2pnode.nix.nar_walk import tree_fingerprint
from p2pnode.nix.narmap import NarMap, NarTree
from p2pnode.store.records import FileStamp, Source, SourceKind

MAX_OPEN = 64
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # NONBLOCK: a fifo in the file's place must not wait
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux only


class _OpenFile:
    def __init__(self, source: Source) -> None:
        self._path = source.path
        self._stamp = source.stamp
        self._fd = os.open(source.path, _FLAGS)
        status = os.fstat(self._fd)
        self._identity = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise ChunkUnavailable(f"{source.path} is not a regular file any more")

    def read(self, offset: int, length: int) -> tuple[bytes, bool]:
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise ChunkUnavailable(f"{self._path} is shorter than it was")
            data += more
        # The name is looked up again each time: one that was removed or replaced is noticed while we hold it open. And
        # after reading: what was written before shows in it.
        status = os.stat(self._path)
        if (status.st_dev, status.st_ino) != self._identity:
            raise ChunkUnavailable(f"{self._path} was replaced by another file")
        return data, self._stamp is not None and self._stamp.unwritten(status)

    def read_at_hand(self, offset: int, length: int) -> tuple[memoryview, bool] | None:
        if _NOWAIT is None:
            return None
        data = slabs.take(length)
        try:
            if os.preadv(self._fd, [data], offset, _NOWAIT) < length:
                return None
            status = os.stat(self._path)
        except OSError:  # EAGAIN, EOPNOTSUPP; and for whatever else `read` has the words
            return None
        if (status.st_dev, status.st_ino) != self._identity:
            return None
        return data.toreadonly(), self._stamp is not None and self._stamp.unwritten(status)

    def close(self) -> None:
        os.close(self._fd)


class _OpenTree:
    def __init__(self, source: Source, packed: bytes | None) -> None:
        status = os.lstat(source.path)
        self._identity = (status.st_dev, status.st_ino)
        try:
            self._map = NarMap.from_bytes(packed or b"")
        except NarError as error:
            raise ChunkUnavailable(f"the map of {source.path} in the catalog is damaged: {error}") from error
        self._path = source.path
        self._tree = NarTree(source.path)

    def read(self, offset: int, length: int) -> tuple[bytes, bool]:
        status = os.lstat(self._path)
        if (status.st_dev, status.st_ino) != self._identity:
            raise ChunkUnavailable(f"{self._path} was replaced")
        if offset + length > self._map.size:
            raise ChunkUnavailable(f"the map of {self._path} does not reach as far as the chunk")
        return self._map.read(self._tree, offset, length), False

    def read_at_hand(self, offset: int, length: int) -> None:
        return None  # its files may have to be opened first

    def close(self) -> None:
        self._tree.close()


class SourcePool:
    """Opens sources as they are needed and keeps up to `MAX_OPEN` of them, the least recently used go first."""

    def __init__(self, load_map: Callable[[int], bytes | None]) -> None:
        self._load_map = load_map
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenFile | _OpenTree] = OrderedDict()
        self._users: dict[int, int] = {}
        self._doomed: dict[int, list[_OpenFile | _OpenTree]] = {}  # forgotten while in use

    def read(self, source: Source, offset: int, length: int) -> tuple[bytes, bool]:
        """Exactly `length` bytes, and whether they are for certain those that were hashed when the source was added.

        Raises ChunkUnavailable; StoreError when out of descriptors.
        """
        try:
            with self._borrow(source) as reader:
                return reader.read(offset, length)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # says nothing about the chunk
                raise StoreError(f"{source.path} could not be opened: {reason}") from error
            raise ChunkUnavailable(f"{source.path} cannot be read any more: {reason}") from error

    def read_at_hand(self, source: Source, offset: int, length: int) -> tuple[memoryview, bool] | None:
        """As `read`, if the source is open and the bytes are in memory; else None, at once."""
        if source.id not in self._open:
            return None
        try:
            with self._borrow(source) as reader:
                return reader.read_at_hand(offset, length)
        except (OSError, ChunkUnavailable):  # another thread closed it meanwhile, and it does not open again
            return None

    @contextlib.contextmanager
    def _borrow(self, source: Source) -> Iterator[_OpenFile | _OpenTree]:
        id = source.id
        with self._lock:
            reader = self._open.get(id)
            if reader is not None:
                self._open.move_to_end(id)
                self._users[id] = self._users.get(id, 0) + 1
        if reader is None:
            # Outside the lock: unpacking the map of a large tree takes a while.
            fresh = _OpenFile(source) if source.kind is SourceKind.FILE else _OpenTree(source, self._load_map(id))
            with self._lock:
                reader = self._open.setdefault(id, fresh)
                self._users[id] = self._users.get(id, 0) + 1
                self._evict()
            if reader is not fresh:
                fresh.close()
        try:
            yield reader
        finally:
            with self._lock:
                self._users[id] -= 1
                if not self._users[id]:
                    del self._users[id]
                    for doomed in self._doomed.pop(id, ()):
                        doomed.close()

    def _evict(self) -> None:
        if len(self._open) <= MAX_OPEN:
            return
        for id in [id for id in self._open if id not in self._users][: len(self._open) - MAX_OPEN]:
            self._open.pop(id).close()

    def forget(self, source: int) -> None:
        """Close a source, or see to it that its last reader does."""
        with self._lock:
            reader = self._open.pop(source, None)
            if reader is None:
                return
            if source in self._users:
                self._doomed.setdefault(source, []).append(reader)
            else:
                reader.close()

    def close(self) -> None:
        for id in list(self._open):
            self.forget(id)


def changed(source: Source, fingerprint: bytes | None) -> str | None:
    """One sentence if metadata tells that the whole source is not what it was; None if it looks unchanged.

    `fingerprint`: of the tree when it was mapped.
    """
    try:
        if source.kind is SourceKind.NAR:
            if fingerprint is not None and tree_fingerprint(source.path) != fingerprint:
                return f"{source.path} was changed after it was provided"
            return None
        fd = os.open(source.path, _FLAGS)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
    except PathError as error:
        return str(error)
    except FileNotFoundError:
        return f"{source.path} does not exist any more"
    except OSError as error:
        return f"{source.path} cannot be read any more: {os.strerror(error.errno or 0)}"
    if not stat.S_ISREG(status.st_mode):
        return f"{source.path} is not a regular file any more"
    if source.stamp is not None and not source.stamp.same_file(FileStamp.of(status)):
        return f"{source.path} was changed after it was provided"
    return None

"""NAR offset -> framing bytes or (file, offset): a NAR that exists only as the tree it was made of.

Built from metadata alone. A node serves pieces of a NAR straight out of the original with it, so no second copy is
kept; and `dump` writes a whole NAR through it. Contents are never held: 10,000 files take about 3 MB.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from p2pnode.errors import ChunkUnavailable, NarError, StoreError
from p2pnode.nix import nar_format as fmt
from p2pnode.nix.nar_walk import (
    DIRECTORY_FLAGS,
    DIRECTORY_RECORD,
    FILE_FLAGS,
    FILE_RECORD,
    SYMLINK_RECORD,
    AnyPath,
    NodeKind,
    fingerprint_of,
    root_bytes,
    tree_records,
)

PIECE_SIZE = 1 << 20
"""Bytes of what `dump` yields at a time: large enough that per-piece costs vanish, small beside the memory bound."""

MAX_RECORDS = 1 << 28
"""Bytes of unpacked records that `NarMap.from_bytes` takes at most: 256 MiB, some 5 million files."""

_PACKED_HEADER = struct.Struct("<8sQ")  # magic with version, bytes of the unpacked records
_PACKED_MAGIC = b"narmap\x00\x01"

# Runs of literals as they stand between names and contents. A non-root node closes itself and its entry.
_ENTRY_HEAD = fmt.ENTRY + fmt.ENTRY_NAME
_DIRECTORY_NODE = fmt.OPEN + fmt.DIRECTORY
_FILE_NODE = fmt.OPEN + fmt.REGULAR + fmt.CONTENTS
_EXECUTABLE_NODE = fmt.OPEN + fmt.REGULAR + fmt.EXECUTABLE + fmt.CONTENTS
_SYMLINK_NODE = fmt.OPEN + fmt.SYMLINK + fmt.TARGET


class NarTree:
    """The open root of a tree, for reading files below it without ever following a symlink.

    Keeps a few directory descriptors (least recently used go first). May be shared between threads. Nothing is
    opened before it is needed, so making one cannot fail.
    """

    def __init__(self, path: AnyPath, *, max_open: int = 32) -> None:
        self.path = root_bytes(path)
        self._max_open = max(max_open, 2)  # a parent and its child are both needed for a moment
        self._directories: dict[bytes, int] = {}  # relative path -> descriptor, the least recently used first
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor. May be called again; opening afterwards is a ValueError."""
        with self._lock:
            self._closed = True
            for fd in self._directories.values():
                os.close(fd)
            self._directories.clear()

    def open_file(self, directory: bytes, name: bytes) -> int:
        """A read-only descriptor of `directory/name`, owned by the caller. An empty name is the root itself.

        `directory` is relative to the root, components joined by slashes, empty for the root. Raises OSError.
        """
        if not name:
            return os.open(self.path, FILE_FLAGS)
        with self._lock:  # held across open(): another thread may evict the directory's descriptor
            return os.open(name, FILE_FLAGS, dir_fd=self._open_directory(directory))

    def _open_directory(self, path: bytes) -> int:
        cached = self._directories
        fd = cached.pop(path, None)
        if fd is not None:
            cached[path] = fd  # now the most recently used
            return fd
        if self._closed:
            raise ValueError("the tree is closed")
        missing = []
        while path and path not in cached:
            path, _, last = path.rpartition(b"/")
            missing.append(last)
        fd = cached.pop(path, None)
        if fd is None:
            fd = os.open(self.path, DIRECTORY_FLAGS)
        self._keep(path, fd)
        while missing:
            name = missing.pop()
            path = path + b"/" + name if path else name
            fd = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
            self._keep(path, fd)
        return fd

    def _keep(self, path: bytes, fd: int) -> None:
        self._directories[path] = fd
        while len(self._directories) > self._max_open:
            os.close(self._directories.pop(next(iter(self._directories))))


class NarMap:
    """Where every byte of a tree's NAR is found. Immutable.

    `size`: bytes of the NAR. `fingerprint`: what `tree_fingerprint` gave for the tree when the map was built.
    """

    def __init__(self, records: bytes) -> None:
        """From the records of a tree (nar_walk). Raises NarError unless they describe exactly one."""
        self.fingerprint = fingerprint_of(records)
        self._records = records
        self._framing = b""  # all NAR bytes but file contents
        # Per file, in NAR order:
        self._starts = array("Q")  # NAR offset of the contents
        self._cuts = array("Q")  # offset in _framing at which the contents stand
        self._sizes = array("Q")
        self._stamps = array("Q")  # mtime and inode, in turn
        self._parents = array("L")  # index in _directories
        self._names: list[bytes] = []
        # Per directory, the root (b"") first. Not whole paths: 64 long names times many directories is gigabytes.
        self._directories: list[bytes] = []
        self._above = array("L")  # index of the parent; the root's is its own
        self.size = 0
        try:
            self._frame(records)
        except (struct.error, IndexError):
            raise NarError("the description of a tree is cut short") from None

    @classmethod
    def build(cls, path: AnyPath) -> NarMap:
        """Map the tree at `path`. Reads metadata only. Raises PathError as `tree_records` does."""
        return cls(tree_records(path))

    @classmethod
    def from_bytes(cls, data: bytes) -> NarMap:
        """Read what `to_bytes` gave. Raises NarError if it is damaged or past `MAX_RECORDS`."""
        if len(data) < _PACKED_HEADER.size:
            raise NarError("a stored NAR map is cut short")
        magic, size = _PACKED_HEADER.unpack_from(data)
        if magic != _PACKED_MAGIC or size > MAX_RECORDS:
            raise NarError("a stored NAR map is of another version or too large")
        unpacker = zlib.decompressobj()
        try:
            # One byte more than promised shows a stream that is longer; the bound is what matters.
            records = unpacker.decompress(memoryview(data)[_PACKED_HEADER.size :], size + 1)
        except zlib.error:
            raise NarError("a stored NAR map is damaged") from None
        if len(records) != size or not unpacker.eof or unpacker.unused_data:
            raise NarError("a stored NAR map is damaged")
        return cls(records)

    def to_bytes(self) -> bytes:
        """The map in a compact form to be stored: about 30 bytes per file."""
        return _PACKED_HEADER.pack(_PACKED_MAGIC, len(self._records)) + zlib.compress(self._records, 6)

    @property
    def files(self) -> int:
        """Number of regular files."""
        return len(self._starts)

    def read(self, tree: NarTree, offset: int, length: int) -> bytes:
        """`length` bytes of the NAR from `offset` on; together they must lie within `size`.

        Raises ChunkUnavailable if a file is gone, unreadable, no plain file any more or too short. Bytes that changed
        under an unchanged length are not noticed here: the caller checks the chunk's hash. Raises StoreError when
        the process is out of descriptors, which says nothing about the chunk.
        """
        end = offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise ValueError(f"bytes {offset} to {end} of a NAR of {self.size}")
        starts, sizes, cuts, framing = self._starts, self._sizes, self._cuts, self._framing
        index = bisect_right(starts, offset) - 1  # the last file that begins at or before the place
        parts: list[bytes] = []
        while offset < end:
            framing_from = offset
            if index >= 0:
                within = offset - starts[index]
                if within < sizes[index]:
                    count = min(sizes[index] - within, end - offset)
                    parts.append(self._read_file(tree, index, within, count))
                    offset += count
                    within += count
                framing_from = cuts[index] + within - sizes[index]
            index += 1
            framing_to = cuts[index] if index < len(cuts) else len(framing)
            if offset < end:
                part = framing[framing_from : min(framing_to, framing_from + end - offset)]
                parts.append(part)
                offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pieces(self, tree: NarTree, piece_size: int = PIECE_SIZE) -> Iterator[bytearray]:
        """The whole NAR, each file read once. All pieces but the last have `piece_size` bytes.

        A piece is a fresh object which the consumer owns; it is not touched again here. Raises PathError when a
        file is unreadable or is not (size, mtime, inode) what it was when the map was built: then the pieces
        given so far are no NAR.
        """
        piece = bytearray(piece_size)
        view = memoryview(piece)
        filled = 0
        framing = memoryview(self._framing)
        framed = 0
        for index in range(len(self._cuts) + 1):
            framing_to = self._cuts[index] if index < len(self._cuts) else len(framing)
            while framed < framing_to:
                count = min(framing_to - framed, piece_size - filled)
                view[filled : filled + count] = framing[framed : framed + count]
                framed += count
                filled += count
                if filled == piece_size:
                    view.release()
                    yield piece
                    piece = bytearray(piece_size)
                    view = memoryview(piece)
                    filled = 0
            if index == len(self._cuts):
                break
            fd = -1
            try:
                fd = tree.open_file(self._directory_path(self._parents[index]), self._names[index])
                left = self._sizes[index]
                while left:
                    count = os.readv(fd, [view[filled : filled + left]])
                    if not count:
                        raise fmt.changed_error(self._path(tree, index))
                    left -= count
                    filled += count
                    if filled == piece_size:
                        view.release()
                        yield piece
                        piece = bytearray(piece_size)
                        view = memoryview(piece)
                        filled = 0
                self._check_stamp(tree, index, os.fstat(fd))
            except OSError as error:
                raise fmt.read_error(self._path(tree, index), error) from error
            finally:
                if fd >= 0:
                    os.close(fd)
        view.release()
        if filled:
            del piece[filled:]
            yield piece

    def _check_stamp(self, tree: NarTree, index: int, status: os.stat_result) -> None:
        """After the last read, so that a change at any time since the walk is seen."""
        if (
            status.st_size != self._sizes[index]
            or status.st_mtime_ns & (2**64 - 1) != self._stamps[2 * index]
            or status.st_ino != self._stamps[2 * index + 1]
            or not stat.S_ISREG(status.st_mode)
        ):
            raise fmt.changed_error(self._path(tree, index))

    def _read_file(self, tree: NarTree, index: int, offset: int, count: int) -> bytes:
        try:
            fd = tree.open_file(self._directory_path(self._parents[index]), self._names[index])
            try:
                data = os.pread(fd, count, offset)
                while len(data) < count:
                    more = os.pread(fd, count - len(data), offset + len(data))
                    if not more:
                        raise ChunkUnavailable(f"{fmt.shown(self._path(tree, index))} is shorter than it was")
                    data += more
            finally:
                os.close(fd)
        except OSError as error:
            name, reason = fmt.shown(self._path(tree, index)), os.strerror(error.errno or 0)
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise StoreError(f"{name} could not be opened: {reason}") from error
            raise ChunkUnavailable(f"{name} cannot be read any more: {reason}") from error
        return data

    def _path(self, tree: NarTree, index: int) -> bytes:
        parts = (tree.path, self._directory_path(self._parents[index]), self._names[index])
        return b"/".join(part for part in parts if part)

    def _directory_path(self, index: int) -> bytes:
        """Path of a directory relative to the root."""
        parts = []
        while index:
            parts.append(self._directories[index])
            index = self._above[index]
        return b"/".join(reversed(parts))

    def _frame(self, records: bytes) -> None:
        """Check the records and fill in everything that is derived from them."""
        framing: list[bytes] = [fmt.MAGIC]
        framed = len(fmt.MAGIC)
        contents = 0
        # Open directories: index in _directories, and the name of the last entry so far.
        stack: list[tuple[int, bytes]] = []
        at = 0
        while True:
            kind = records[at]
            if kind == NodeKind.LEAVE:
                if not stack:
                    raise NarError("the description of a tree closes a directory that is not open")
                at += 1
                stack.pop()
                literal = fmt.CLOSE + fmt.CLOSE if stack else fmt.CLOSE
                framing.append(literal)
                framed += len(literal)
                if not stack:
                    break
                continue
            size = 0
            target = b""
            name_length = records[at + 1]
            if kind == NodeKind.FILE or kind == NodeKind.EXECUTABLE:
                _, _, size, mtime, inode = FILE_RECORD.unpack_from(records, at)
                at += FILE_RECORD.size
            elif kind == NodeKind.SYMLINK:
                target_length = SYMLINK_RECORD.unpack_from(records, at)[2]
                at += SYMLINK_RECORD.size
                target = records[at + name_length : at + name_length + target_length]
                if len(target) != target_length or fmt.target_fault(target):
                    raise NarError("the description of a tree holds a bad symlink target")
            elif kind == NodeKind.DIRECTORY:
                at += DIRECTORY_RECORD.size
            else:
                raise NarError("the description of a tree holds an unknown kind of node")
            name = records[at : at + name_length]
            at += name_length + len(target)
            if stack:
                directory, last = stack[-1]
                if len(name) != name_length or name <= last or fmt.name_fault(name) or len(stack) >= fmt.MAX_DEPTH:
                    raise NarError("the description of a tree holds a bad name, or is not sorted, or too deep")
                stack[-1] = (directory, name)
                head = _ENTRY_HEAD + fmt.U64[name_length] + name + fmt.PADDING[name_length & 7] + fmt.ENTRY_NODE
                tail = fmt.CLOSE + fmt.CLOSE
            else:
                if name_length:
                    raise NarError("the description of a tree gives its root a name")
                directory = 0
                head = b""
                tail = fmt.CLOSE
            if kind == NodeKind.DIRECTORY:
                stack.append((len(self._directories), b""))
                self._directories.append(name)
                self._above.append(directory)
                literal = head + _DIRECTORY_NODE
            elif kind == NodeKind.SYMLINK:
                literal = head + _SYMLINK_NODE + fmt.nar_string(target) + tail
            else:
                if contents + framed + size > fmt.MAX_SIZE:
                    raise NarError("the description of a tree is larger than any NAR")
                node = _EXECUTABLE_NODE if kind == NodeKind.EXECUTABLE else _FILE_NODE
                literal = head + node + size.to_bytes(8, "little")
                framing.append(literal)
                framed += len(literal)
                self._cuts.append(framed)
                self._starts.append(framed + contents)
                self._sizes.append(size)
                self._stamps.append(mtime)
                self._stamps.append(inode)
                self._parents.append(directory)
                self._names.append(name)
                contents += size
                literal = fmt.PADDING[size & 7] + tail
            framing.append(literal)
            framed += len(literal)
            if not stack:
                break
        if at != len(records):
            raise NarError("the description of a tree goes on after its end")
        if not self._directories:
            self._directories.append(b"")  # the parent of a root that is a file
            self._above.append(0)
        self._framing = b"".join(framing)
        self.size = framed + contents


def dump(path: AnyPath, piece_size: int = PIECE_SIZE) -> Iterator[bytearray]:
    """The NAR of the tree at `path`, byte for byte that of `nix-store --dump`, in pieces as `NarMap.pieces` gives.

    Raises PathError naming the path at fault.
    """
    with NarTree(path) as tree:
        yield from NarMap.build(path).pieces(tree, piece_size)

"""Strict, streaming NAR reader: a push parser without I/O, recursion or unbounded memory.

What it takes is what new Nix takes, less bytes after the end: a NAR that passes is the one NAR of its tree. Nothing
longer than a symlink target is ever buffered; file contents go through as views of the caller's data.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum, auto
from typing import NoReturn, Protocol

from p2pnode.errors import NarError
from p2pnode.nix import nar_format as fmt

Buffer = bytes | bytearray | memoryview


class NarVisitor(Protocol):
    """What a NarReader tells, in the order of the stream. A name is b"" for the root and checked for all others.

    An exception from a method goes through `NarReader.feed` to the caller, and ends the reading.
    """

    def enter_directory(self, name: bytes) -> None: ...

    def leave_directory(self) -> None: ...

    def begin_file(self, name: bytes, executable: bool, size: int) -> None:
        """`size` bytes are promised, not seen: reserve nothing for them."""

    def file_contents(self, data: memoryview) -> None:
        """A view that is good only until the method returns."""

    def end_file(self) -> None: ...

    def symlink(self, name: bytes, target: bytes) -> None: ...


class _State(IntEnum):
    """Which fixed group of bytes comes next. Every group's length is known before its first byte."""

    MAGIC = auto()  # magic, "(" "type"
    TYPE = auto()  # the 16 bytes that tell the three types apart
    DIRECTORY_TYPE = auto()  # the last 8 bytes of "directory"
    REGULAR_FIELD = auto()  # the 16 bytes that tell "executable" from "contents"
    EXECUTABLE = auto()  # the rest of "executable", "", "contents"
    SIZE = auto()  # length of the contents
    CONTENTS = auto()  # no group: contents pass through
    FILE_END = auto()  # padding and ")", twice below a directory
    TARGET_SIZE = auto()  # "target" and its length
    TARGET = auto()  # target, padding and ")", twice below a directory
    ENTRY = auto()  # "entry" or ")"
    NAME_SIZE = auto()  # "(" "name" and its length
    NAME = auto()  # name, padding, "node" "(" "type"
    ENTRY_END = auto()  # ")" of the entry whose directory has ended
    END = auto()  # nothing more
    FAILED = auto()


# Comparing with plain ints is several times faster than looking up members, and this is the loop that counts.
_MAGIC, _TYPE, _DIRECTORY_TYPE, _REGULAR_FIELD, _EXECUTABLE, _SIZE, _CONTENTS, _FILE_END = map(int, list(_State)[:8])
_TARGET_SIZE, _TARGET, _ENTRY, _NAME_SIZE, _NAME, _ENTRY_END, _END, _FAILED = map(int, list(_State)[8:])

_MAGIC_GROUP = fmt.MAGIC + fmt.OPEN
_DIRECTORY_HEAD, _DIRECTORY_TAIL = fmt.DIRECTORY[:16], fmt.DIRECTORY[16:]
_EXECUTABLE_HEAD, _EXECUTABLE_TAIL = fmt.EXECUTABLE[:16], fmt.EXECUTABLE[16:] + fmt.CONTENTS
_NODE_GROUP = fmt.ENTRY_NODE + fmt.OPEN
_CLOSE_TWICE = fmt.CLOSE + fmt.CLOSE


class NarReader:
    """Parses one NAR. `size`: bytes fed so far.

    `max_size`: bytes of the whole NAR at most (or exactly known); a file that promises more is refused at once.
    """

    def __init__(self, visitor: NarVisitor, *, max_size: int = fmt.MAX_SIZE) -> None:
        self.size = 0
        self._visitor = visitor
        self._max_size = max_size
        self._state = _MAGIC
        self._need = len(_MAGIC_GROUP)
        self._pending = bytearray()  # an incomplete group: less than 4.2 KB
        self._last_names: list[bytes] = []  # of each open directory: its last entry
        self._name = b""  # of the node being read
        self._executable = False
        self._left = 0  # bytes of contents, or length of the string, still to come

    def feed(self, data: Buffer) -> None:
        """Take the next bytes, any number of them. Raises NarError; after an error the reader is of no use."""
        view = memoryview(data).cast("B")
        end = len(view)
        at = 0
        base = self.size
        state, need, pending, visitor = self._state, self._need, self._pending, self._visitor
        last_names = self._last_names
        self._state = _FAILED  # unless this call returns
        if state == _FAILED:
            self._fail("fed after an error", base)
        self.size += end
        if self.size > self._max_size:
            self._fail(f"more than the {self._max_size} bytes it may have", base)
        while True:
            if state == _CONTENTS:
                count = min(end - at, self._left)
                if count:
                    visitor.file_contents(view[at : at + count])
                    at += count
                    self._left -= count
                if self._left:
                    break
                state = _FILE_END
            if pending:
                count = min(need - len(pending), end - at)
                pending += view[at : at + count]
                at += count
                if len(pending) < need:
                    break
                group = bytes(pending)
                pending.clear()
            elif end - at < need:
                pending += view[at:]
                break
            else:
                group = bytes(view[at : at + need])
                at += need

            if state == _ENTRY:
                if group == fmt.ENTRY:
                    if len(last_names) >= fmt.MAX_DEPTH:
                        self._fail(f"more than {fmt.MAX_DEPTH - 1} directories inside each other", base + at)
                    state, need = _NAME_SIZE, 40
                elif group == fmt.CLOSE:
                    last_names.pop()
                    visitor.leave_directory()
                    state, need = (_ENTRY_END, 16) if last_names else (_END, 1)
                else:
                    self._fail("'entry' or ')' was expected", base + at)
            elif state == _NAME_SIZE:
                if group[:32] != fmt.ENTRY_NAME:
                    self._fail("'(' 'name' was expected", base + at)
                length = self._left = int.from_bytes(group[32:], "little")
                if not 0 < length <= fmt.MAX_NAME:
                    self._fail(f"a name of {length} bytes", base + at)
                state, need = _NAME, length + (-length & 7) + 48
            elif state == _NAME:
                name = self._name = group[: self._left]
                if group[self._left : -48] != fmt.PADDING[self._left & 7]:
                    self._fail("padding that is not zero", base + at)
                fault = fmt.name_fault(name)
                if fault:
                    self._fail(fault, base + at)
                if name <= last_names[-1]:
                    self._fail(f"the name {name!r} is out of order or there twice", base + at)
                if group[-48:] != _NODE_GROUP:
                    self._fail("'node' '(' 'type' was expected", base + at)
                last_names[-1] = name
                state, need = _TYPE, 16
            elif state == _TYPE:
                if group == fmt.REGULAR:
                    state, need = _REGULAR_FIELD, 16
                elif group == fmt.SYMLINK:
                    state, need = _TARGET_SIZE, 24
                elif group == _DIRECTORY_HEAD:
                    state, need = _DIRECTORY_TYPE, 8
                else:
                    self._fail("an unknown type of node", base + at)
            elif state == _REGULAR_FIELD:
                if group == fmt.CONTENTS:
                    self._executable = False
                    state, need = _SIZE, 8
                elif group == _EXECUTABLE_HEAD:
                    state, need = _EXECUTABLE, len(_EXECUTABLE_TAIL)
                else:
                    self._fail("'contents' was expected", base + at)
            elif state == _EXECUTABLE:
                if group != _EXECUTABLE_TAIL:
                    self._fail("'executable', an empty string and 'contents' were expected", base + at)
                self._executable = True
                state, need = _SIZE, 8
            elif state == _SIZE:
                size = self._left = int.from_bytes(group, "little")
                if size > self._max_size - base - at:
                    self._fail(f"a file of {size} bytes, more than there can be", base + at)
                visitor.begin_file(self._name, self._executable, size)
                state, need = _CONTENTS, (-size & 7) + (32 if last_names else 16)
            elif state == _FILE_END:
                close = _CLOSE_TWICE if last_names else fmt.CLOSE
                if group != bytes(need - len(close)) + close:
                    self._fail("zero padding and ')' were expected after the contents", base + at)
                visitor.end_file()
                state, need = (_ENTRY, 16) if last_names else (_END, 1)
            elif state == _TARGET_SIZE:
                if group[:16] != fmt.TARGET:
                    self._fail("'target' was expected", base + at)
                length = self._left = int.from_bytes(group[16:], "little")
                if not 0 < length <= fmt.MAX_TARGET:
                    self._fail(f"a symlink target of {length} bytes", base + at)
                state, need = _TARGET, length + (-length & 7) + (32 if last_names else 16)
            elif state == _TARGET:
                target = group[: self._left]
                fault = fmt.target_fault(target)
                if fault:
                    self._fail(fault, base + at)
                if group[self._left :] != fmt.PADDING[self._left & 7] + (_CLOSE_TWICE if last_names else fmt.CLOSE):
                    self._fail("zero padding and ')' were expected after a target", base + at)
                visitor.symlink(self._name, target)
                state, need = (_ENTRY, 16) if last_names else (_END, 1)
            elif state == _DIRECTORY_TYPE:
                if group != _DIRECTORY_TAIL:
                    self._fail("an unknown type of node", base + at)
                visitor.enter_directory(self._name)
                last_names.append(b"")
                state, need = _ENTRY, 16
            elif state == _ENTRY_END:
                if group != fmt.CLOSE:
                    self._fail("')' was expected after an entry", base + at)
                state, need = _ENTRY, 16
            elif state == _MAGIC:
                if group != _MAGIC_GROUP:
                    self._fail("it does not begin as a NAR does", base + at)
                state, need = _TYPE, 16
            else:
                self._fail("bytes after the end", base + at)
        self._state, self._need = state, need

    def close(self) -> None:
        """Say that the stream has ended. Raises NarError unless the NAR has ended too."""
        if self._state != _END:
            self._fail("it was broken off", self.size)

    def _fail(self, what: str, offset: int) -> NoReturn:
        self._state = _FAILED
        raise NarError(f"not a valid NAR: {what} (at byte {offset})")


class NarHasher:
    """SHA-256 and size of a stream: the two numbers that narinfo and store databases know a path by."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256()

    def feed(self, data: Buffer) -> None:
        self._hash.update(data)
        self.size += memoryview(data).nbytes

    def digest(self) -> bytes:
        """32 bytes over all that was fed so far."""
        return self._hash.digest()

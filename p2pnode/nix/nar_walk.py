"""Walking a tree in NAR order, by metadata only, and the fingerprint that says whether it changed.

The tree may be changed by others while it is walked: every step is taken below a directory descriptor with
O_NOFOLLOW, so a directory that is swapped for a symlink is an error and never a way out of the tree.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from enum import IntEnum

from p2pnode.errors import PathError
from p2pnode.nix.nar_format import MAX_DEPTH, MAX_NAME, MAX_TARGET, read_error, shown

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# O_NONBLOCK: a fifo put in a file's place must not make open() wait for a writer.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NodeKind(IntEnum):
    """First byte of a record; part of the form in which maps are stored."""

    DIRECTORY = 1
    LEAVE = 2  # the end of the innermost open directory
    FILE = 3
    EXECUTABLE = 4
    SYMLINK = 5


# Records: one per node, in NAR order. What they hold is all that decides the bytes of the NAR, with size, mtime and
# inode in place of contents. A directory's own mtime and size say nothing that its entries do not.
DIRECTORY_RECORD = struct.Struct("<BB")  # kind, length of name; then the name
FILE_RECORD = struct.Struct("<BBQQQ")  # kind, length of name, size, mtime in ns modulo 2^64, inode; then the name
SYMLINK_RECORD = struct.Struct("<BBH")  # kind, length of name, length of target; then name and target
LEAVE_RECORD = bytes([NodeKind.LEAVE])

MASK64 = 2**64 - 1

# Plain ints: looking up a member of an IntEnum takes longer than the rest of a file's turn in the loop.
_DIRECTORY, _FILE, _EXECUTABLE, _SYMLINK = map(
    int, (NodeKind.DIRECTORY, NodeKind.FILE, NodeKind.EXECUTABLE, NodeKind.SYMLINK)
)


def fingerprint_of(records: bytes) -> bytes:
    """32 bytes (BLAKE2b) over the records of a whole tree."""
    return hashlib.blake2b(records, digest_size=32).digest()


def tree_fingerprint(path: AnyPath) -> bytes:
    """32 bytes that change when names, types, x bits, sizes, mtimes, inodes or symlink targets of a tree change.

    No contents are read. Raises PathError as `tree_records` does.
    """
    return fingerprint_of(tree_records(path))


def root_bytes(path: AnyPath) -> bytes:
    """`path` as the system takes it. Raises PathError for an empty path or one with a NUL byte."""
    root = os.fsencode(path)
    if not root or b"\0" in root:
        raise PathError(f"{shown(root)!r} is not a path")
    return root


def tree_records(path: AnyPath) -> bytes:
    """The records of every node of the tree at `path`; a symlink at `path` itself is a node, not followed.

    Raises PathError, naming the path at fault, where Nix could not make a NAR of it: nothing there, unreadable,
    a device, socket or fifo, deeper than 64 levels.
    """
    root = root_bytes(path)
    try:
        status = os.lstat(root)
    except FileNotFoundError:
        raise PathError(f"{shown(root)} does not exist") from None
    except OSError as error:
        raise read_error(root, error) from error
    if not stat.S_ISDIR(status.st_mode):
        try:
            return _leaf(root, b"", status, None)
        except OSError as error:
            raise read_error(root, error) from error
    return b"".join(_directory_records(root))


def _directory_records(root: bytes) -> Iterator[bytes]:
    stack: list[tuple[int, Iterator[tuple[bytes, os.stat_result]]]] = []  # descriptor, entries still to come
    names: list[bytes] = []  # of the directories in the stack, the root left out
    name = b""
    pack_file = FILE_RECORD.pack
    try:
        fd = os.open(root, DIRECTORY_FLAGS)
        stack.append((fd, iter(())))  # on the stack before anything can fail: the finally below closes it
        stack[-1] = (fd, _entries(fd))
        yield DIRECTORY_RECORD.pack(_DIRECTORY, 0)
        while stack:
            fd, entries = stack[-1]
            for name, status in entries:
                mode = status.st_mode
                if len(name) > MAX_NAME:
                    raise PathError(f"{_join(root, names, name)} has a name of more than {MAX_NAME} bytes")
                if len(stack) >= MAX_DEPTH:
                    raise PathError(f"{_join(root, names, name)} lies more than {MAX_DEPTH - 1} directories deep")
                if stat.S_ISREG(mode):  # Nix's rule for the executable flag: the owner's x bit alone
                    kind = _EXECUTABLE if mode & stat.S_IXUSR else _FILE
                    mtime = status.st_mtime_ns & MASK64
                    yield pack_file(kind, len(name), status.st_size, mtime, status.st_ino) + name
                elif stat.S_ISDIR(mode):
                    child = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
                    stack.append((child, iter(())))
                    names.append(name)
                    yield DIRECTORY_RECORD.pack(_DIRECTORY, len(name)) + name
                    name = b""
                    stack[-1] = (child, _entries(child))
                    break
                else:
                    yield _leaf(os.path.join(root, *names, name), name, status, fd)
            else:
                stack.pop()
                os.close(fd)
                name = names.pop() if names else b""
                yield LEAVE_RECORD
    except OSError as error:
        raise read_error(os.path.join(root, *names, name), error) from error
    finally:
        for fd, _ in stack:
            os.close(fd)


def _entries(fd: int) -> Iterator[tuple[bytes, os.stat_result]]:
    """Name and lstat of a directory's entries, in the order of the names' bytes."""
    with os.scandir(fd) as entries:
        found = [(os.fsencode(entry.name), entry.stat(follow_symlinks=False)) for entry in entries]
    found.sort()  # names differ, so the stat results are never compared
    return iter(found)


def _leaf(path: bytes, name: bytes, status: os.stat_result, dir_fd: int | None) -> bytes:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        kind = _EXECUTABLE if mode & stat.S_IXUSR else _FILE
        mtime = status.st_mtime_ns & MASK64
        return FILE_RECORD.pack(kind, len(name), status.st_size, mtime, status.st_ino) + name
    if stat.S_ISLNK(mode):
        target = os.readlink(path) if dir_fd is None else os.readlink(name, dir_fd=dir_fd)
        if len(target) > MAX_TARGET:
            raise PathError(f"{shown(path)} is a symlink with a target of more than {MAX_TARGET} bytes")
        return SYMLINK_RECORD.pack(_SYMLINK, len(name), len(target)) + name + target
    raise PathError(f"{shown(path)} has an unsupported file type: {_type_name(mode)}")


def _type_name(mode: int) -> str:
    for test, text in (
        (stat.S_ISFIFO, "it is a fifo"),
        (stat.S_ISSOCK, "it is a socket"),
        (stat.S_ISCHR, "it is a character device"),
        (stat.S_ISBLK, "it is a block device"),
    ):
        if test(mode):
            return text
    return "it is neither file, directory nor symlink"


def _join(root: bytes, names: list[bytes], name: bytes) -> str:
    return shown(os.path.join(root, *names, name))

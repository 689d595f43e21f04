"""The NAR format: its literals and limits, shared by everything that reads, writes or maps a NAR.

Every string, tokens too, is `u64le length, bytes, zeros up to a multiple of 8`. The grammar (Nix manual, "Nix
Archive"; libutil/archive.cc)::

    nar  = "nix-archive-1" node
    node = "(" "type" ( "regular" ["executable" ""] "contents" BYTES
                      | "symlink" "target" BYTES
                      | "directory" { "entry" "(" "name" BYTES "node" node ")" } ) ")"

The limits are those of Nix 2.36. Strict reading makes NAR and tree one-to-one.
"""

from __future__ import annotations

import errno
import os

from p2pnode.errors import DiskFull, OutputUnwritable, PathError, StoreError

MAX_NAME = 255
MAX_TARGET = 4095
MAX_DEPTH = 64  # a node with this many directories above it is refused; bounds open descriptors too
MAX_SIZE = 2**63 - 1  # bytes of a NAR or a file: what off_t holds

U64 = [n.to_bytes(8, "little") for n in range(MAX_TARGET + 1)]
PADDING = [bytes(-n % 8) for n in range(8)]  # indexed by length & 7


def nar_string(value: bytes) -> bytes:
    """`value` with its length and padding."""
    return len(value).to_bytes(8, "little") + value + PADDING[len(value) & 7]


def _tokens(*values: bytes) -> bytes:
    return b"".join(map(nar_string, values))


MAGIC = _tokens(b"nix-archive-1")
OPEN = _tokens(b"(", b"type")
CLOSE = _tokens(b")")
ENTRY = _tokens(b"entry")
ENTRY_NAME = _tokens(b"(", b"name")
ENTRY_NODE = _tokens(b"node")
REGULAR = _tokens(b"regular")
EXECUTABLE = _tokens(b"executable", b"")
CONTENTS = _tokens(b"contents")
SYMLINK = _tokens(b"symlink")
TARGET = _tokens(b"target")
DIRECTORY = _tokens(b"directory")


def name_fault(name: bytes) -> str | None:
    """What is wrong with `name` as the name of a directory entry; None if nothing is."""
    if not 0 < len(name) <= MAX_NAME:
        return f"a name of {len(name)} bytes"
    if b"/" in name or b"\0" in name or name in (b".", b".."):
        return f"the forbidden name {name!r}"
    return None


def target_fault(target: bytes) -> str | None:
    """What is wrong with `target` as the target of a symlink; None if nothing is."""
    if not 0 < len(target) <= MAX_TARGET:
        return f"a symlink target of {len(target)} bytes"
    if b"\0" in target:
        return "a symlink target with a NUL byte in it"
    return None


def shown(path: bytes) -> str:
    """A path as a message may show it: names are any bytes, and a terminal must not obey them."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_error(path: bytes, error: OSError) -> PathError:
    """The error for a `path` below (or at) the root of a tree that the system refused to let us read."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE):
        return changed_error(path)
    return PathError(f"{shown(path)} cannot be read: {os.strerror(error.errno or 0)}")


def changed_error(path: bytes) -> PathError:
    return PathError(f"{shown(path)} changed while it was being read; try again when nothing writes to it")


def write_error(path: bytes, error: OSError) -> StoreError:
    """The error for a `path` that could not be created, written or removed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no space is left on the disk for {shown(path)}; make room and try again")
    reason = os.strerror(error.errno or 0)
    if error.errno == errno.EEXIST:
        reason = "something of that name is there already, or the file system cannot tell two names apart"
    elif error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return StoreError(f"{shown(path)} could not be written: {reason}")
    return OutputUnwritable(f"{shown(path)} could not be written: {reason}")

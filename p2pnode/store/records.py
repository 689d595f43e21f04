"""What the store tells about itself, and what it keeps in its catalog: frozen records."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from protocols.cid import CID
from protocols.manifest import Kind


class Origin(enum.StrEnum):
    """How an image came to this node."""

    PROVIDED = "provided"
    FETCHED = "fetched"


class Pin(enum.IntFlag):
    """Who wants an image to be kept."""

    USER = 1
    MIRROR = 2


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image in the catalog. Sizes in bytes, times in seconds since the epoch.

    `size` counts duplicates; `chunks` and `chunk_bytes` count distinct chunks, `held_chunks` and `held_bytes` those of
    them that are here. `complete`: the whole content was verified and is still here. `path`: the original or the
    export.
    """

    id: CID
    kind: Kind
    name: str
    size: int
    chunks: int
    chunk_bytes: int
    held_chunks: int
    held_bytes: int
    complete: bool
    origin: Origin
    path: str | None
    added: float
    last_used: float
    pinned: bool

    @classmethod
    def of_row(cls, row: tuple[Any, ...]) -> Self:
        """The columns in the order of the fields, as SQLite has them."""
        id, kind, name, size, chunks, chunk_bytes, held, held_bytes, complete, origin, path, added, used, pinned = row
        return cls(
            CID.from_bytes(id),
            Kind(kind),
            name,
            size,
            chunks,
            chunk_bytes,
            held,
            held_bytes,
            bool(complete),
            Origin(origin),
            path,
            added,
            used,
            bool(pinned),
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """A source of chunks that went bad: `path` of the file or tree, one sentence `reason`, `time` since the epoch."""

    path: str
    reason: str
    time: float


@dataclass(frozen=True, slots=True)
class BadObject:
    """An object that did not verify: `bad_chunks` of its chunks are missing or damaged; 0 if only its hash is wrong."""

    path: str
    bad_chunks: int
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The outcome of re-reading a whole image: distinct `chunks` and `bytes` that were good, and what was not."""

    id: CID
    chunks: int
    bytes: int
    bad: tuple[BadObject, ...]

    @property
    def ok(self) -> bool:
        return not self.bad


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """`owned_bytes`: disk space of packs and partials; `referenced_bytes`: chunks that stay in the user's files."""

    images: int
    complete_images: int
    chunks: int
    owned_bytes: int
    referenced_bytes: int
    free_bytes: int
    problems: int


class SourceKind(enum.StrEnum):
    """`file`: the stream is the file. `nar`: the stream is the NAR of the tree, read through its map."""

    FILE = "file"
    NAR = "nar"


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells that a file is still the one that was read: device, inode, size in bytes, mtime in ns.

    `ctime_ns`: if known, whatever was written to the file after its bytes were hashed has changed this one. (A program
    can set an mtime back, but not a ctime.) The catalog forgets it when the machine starts again.
    """

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        # SQLite's integers are signed: device and inode numbers are kept modulo 2^63.
        return cls(status.st_dev % 2**63, status.st_ino % 2**63, status.st_size, status.st_mtime_ns)

    def unwritten(self, status: os.stat_result) -> bool:
        """Whether the file with this `status` is for certain the one that was hashed, byte for byte."""
        return self.ctime_ns == status.st_ctime_ns and self == self.of(status)

    def same_file(self, other: FileStamp) -> bool:
        """Without the device: its number may change when the machine starts again."""
        return (self.ino, self.size, self.mtime_ns) == (other.ino, other.size, other.mtime_ns)


@dataclass(frozen=True, slots=True)
class Source:
    """A byte stream on disk that chunks are read from.

    `owned`: ours to delete, else the user's. `stamp`: of a referenced file. `image`: whose pack or partial it is.
    """

    id: int
    kind: SourceKind
    path: Path
    owned: bool
    stamp: FileStamp | None
    image: CID | None


@dataclass(frozen=True, slots=True)
class Location:
    """Where a chunk's bytes are: `length` bytes at `offset` of a source."""

    source: Source
    offset: int
    length: int

"""Lists of chunks, `[[raw link, size], ...]`: nearly all of a manifest's bytes, encoded and decoded as one value.

A chunk at a time, each a list of a tag and a number, costs ten times as much; no chunk moves before its manifest is
read.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from protocols.cid import DIGEST_SIZE

MAX_NUMBER = (1 << 32) - 1

# A list of two; tag 42 on 37 bytes, which are the multibase prefix and a CIDv1 of a raw block with a BLAKE3-256 hash.
_PAIR = b"\x82\xd8\x2a\x58\x25\x00\x01\x55\x1e\x20"
_NUMBER = rb"[\x00-\x17]|\x18[\x18-\xff]|\x19[\x01-\xff].|\x1a(?!\x00\x00)...."  # in their shortest forms only
_ONE = re.compile(rb"%b(.{32})(%b)" % (re.escape(_PAIR), _NUMBER), re.DOTALL)
_RUN = re.compile(rb"(?:%b.{32}(?:%b))*+" % (re.escape(_PAIR), _NUMBER), re.DOTALL)


@dataclass(frozen=True, slots=True)
class ChunkList:
    """Chunks in order: BLAKE3 digests of 32 bytes and sizes, up to MAX_NUMBER, side by side."""

    digests: tuple[bytes, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.digests)

    def encode(self) -> bytes:
        """The canonical DAG-CBOR of the list. Raises ValueError for what is no chunk."""
        if any(len(digest) != DIGEST_SIZE for digest in self.digests):
            raise ValueError(f"a digest that is not {DIGEST_SIZE} bytes long")
        pairs = (_PAIR + digest + _head(0, size) for digest, size in zip(self.digests, self.sizes, strict=True))
        return _head(4, len(self.digests)) + b"".join(pairs)


def scan(data: bytes, at: int, count: int) -> tuple[ChunkList, int] | None:
    """The `count` chunks that stand at `at`, behind their list's head, and the offset behind them.

    None if something else stands there: another kind of list, or one that is not canonical."""
    if not count or not data.startswith(_PAIR, at):
        return None
    run = _RUN.match(data, at)
    assert run is not None  # it may be empty, so it matches anywhere
    pairs = _ONE.findall(data, at, run.end())[:count]  # others may follow, of the list around this one
    if len(pairs) < count:
        return None
    digests = tuple(digest for digest, _ in pairs)
    sizes = tuple(int.from_bytes(number[1:] or number, "big") for _, number in pairs)
    return ChunkList(digests, sizes), at + sum(len(_PAIR) + DIGEST_SIZE + len(number) for _, number in pairs)


def _head(major: int, argument: int) -> bytes:
    """The head of an item in its shortest form (RFC 8949, section 3)."""
    first = major << 5
    if argument >= 1 << 16:
        if argument > MAX_NUMBER:
            raise ValueError(f"{argument} is more than 32 bits")
        return struct.pack(">BI", first | 26, argument)
    if argument >= 1 << 8:
        return struct.pack(">BH", first | 25, argument)
    return bytes((first | 24, argument)) if argument >= 24 else bytes((first | argument,))

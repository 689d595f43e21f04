"""`/p2pnode/narinfo/1`: what a peer knows about store paths, asked by hash part or by NAR hash (narinfo.cddl).

One stream carries any number of requests, each answered before the next one is sent. A frame is its length (uint32, big
endian) and a canonical DAG-CBOR value. Nothing in an answer is believed: the narinfo carries signatures, the image id
is that of a manifest whose object has the NAR hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocols import dagcbor
from protocols.cid import CID, Codec
from protocols.errors import FrameError, ProtocolError
from protocols.framing import frame
from protocols.manifest import MAX_OBJECTS

PROTOCOL = "/p2pnode/narinfo/1"
PART_SIZE = 20  # the bytes that the 32 digits of a store path spell
NAR_SIZE = 32  # SHA-256 of a NAR
MAX_KEYS = 16
MAX_TEXT = 1 << 16  # of one narinfo in an answer: room for 1,000 references
MAX_REQUEST = 1024
MAX_ANSWER = MAX_KEYS * (MAX_TEXT + 256)


@dataclass(frozen=True, slots=True)
class Found:
    """One path that a peer has: its narinfo, and the image and the number of the object that is its NAR."""

    narinfo: str
    image: CID
    number: int


def provider_key(part: bytes) -> bytes:
    """The provider-record key of a store path with this hash part, 20 bytes. Keys of the DHT have 32 bytes at least."""
    return b"path" + hashlib.sha256(part).digest()


def nar_key(nar_hash: bytes) -> bytes:
    """The provider-record key of a NAR, found by anybody who has only its signed narinfo."""
    return b"nar" + nar_hash


def encode_request(keys: Sequence[bytes]) -> bytes:
    """A frame that asks for hash parts (20 bytes) and NAR hashes (32 bytes)."""
    return frame({"keys": list(keys)})


def encode_answer(found: Sequence[Found | None]) -> bytes:
    """The frame that answers a request, one entry for each of its keys, in order."""
    entries = [None if each is None else [each.narinfo, each.image, each.number] for each in found]
    return frame({"found": entries})


def decode_request(body: bytes) -> tuple[bytes, ...]:
    """The keys. Raises FrameError."""
    keys = _list(body, "keys", MAX_KEYS)
    for key in keys:
        if not isinstance(key, bytes) or len(key) not in (PART_SIZE, NAR_SIZE):
            raise FrameError("a key of a narinfo request is neither a hash part nor a NAR hash")
    return tuple(keys)


def decode_answer(body: bytes, count: int) -> tuple[Found | None, ...]:
    """The answer to a request with `count` keys. Raises FrameError."""
    entries = _list(body, "found", MAX_KEYS)
    if len(entries) != count:
        raise FrameError(f"{count} paths were asked for, and {len(entries)} answers came")
    return tuple(None if entry is None else _found(entry) for entry in entries)


def _list(body: bytes, name: str, limit: int) -> list[Any]:
    try:
        value = dagcbor.decode(body)
    except ProtocolError as error:
        raise FrameError(f"a narinfo frame is malformed: {error}") from None
    match value:
        case {**fields} if fields.keys() == {name}:
            entries = fields[name]
            if isinstance(entries, list) and 0 < len(entries) <= limit:
                return entries
    raise FrameError(f"a narinfo frame has no list of 1 to {limit} {name}")


def _found(entry: Any) -> Found:
    match entry:
        case [str(narinfo), CID(codec=Codec.DAG_CBOR) as image, int(number)] if (
            len(narinfo) <= MAX_TEXT and not isinstance(number, bool) and 0 <= number < MAX_OBJECTS
        ):
            return Found(narinfo, image, number)
    raise FrameError("an answer is not a narinfo, an image and the number of an object")

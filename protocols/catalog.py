"""`/p2pnode/catalog/1`: which images a node publishes, asked page by page (catalog.cddl).

One stream carries any number of requests, each answered before the next one is sent. Pages ascend by image id, and each
begins behind the last id of the one before, so that a list which changes meanwhile is neither repeated nor torn, and a
peer can not go round in circles. Names and sizes are hints: only the id says what an image is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from protocols import dagcbor
from protocols.cid import CID, Codec
from protocols.errors import FrameError, ProtocolError
from protocols.framing import frame

PROTOCOL = "/p2pnode/catalog/1"
MAX_ENTRIES = 256  # of one page
MAX_NAME = 255  # bytes of UTF-8: what file systems allow
MAX_SIZE = (1 << 63) - 1
MAX_REQUEST = 64
MAX_ANSWER = MAX_ENTRIES * (MAX_NAME + 64)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: its id, the name that its publisher gives it, and its size in bytes as the publisher has it."""

    image: CID
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Page:
    """Images in ascending order of their binary ids. `more`: there are others behind them."""

    entries: tuple[Entry, ...]
    more: bool = False


def publisher_key(peer: str) -> bytes:
    """The provider-record key under which a publisher (its peer id as text) is found. Keys have 32 bytes at least."""
    return b"catalog" + hashlib.sha256(peer.encode()).digest()


def encode_request(after: CID | None) -> bytes:
    """A frame that asks for the images behind `after`; None: from the first."""
    return frame({"after": after})


def encode_answer(page: Page | None) -> bytes:
    """The frame that answers a request; None: this node does not publish."""
    if page is None:
        return frame({"images": None, "more": False})
    return frame({"images": [[each.image, each.name, each.size] for each in page.entries], "more": page.more})


def decode_request(body: bytes) -> CID | None:
    """Behind which image to begin. Raises FrameError."""
    match _decoded(body):
        case {"after": None | CID(codec=Codec.DAG_CBOR) as after, **others} if not others:
            return after
    raise FrameError("a catalog request does not say behind which image to begin")


def decode_answer(body: bytes, after: CID | None) -> Page | None:
    """The answer to a request for what is behind `after`; None: the peer does not publish. Raises FrameError."""
    match _decoded(body):
        case {"images": None, "more": False, **others} if not others:
            return None
        case {"images": list(rows), "more": bool(more), **others} if not others and len(rows) <= MAX_ENTRIES:
            entries = tuple(map(_entry, rows))
        case _:
            raise FrameError(f"a catalog answer is not a list of at most {MAX_ENTRIES} images")
    if more and not entries:
        raise FrameError("a catalog page is empty, and yet more shall follow")
    last = b"" if after is None else after.to_bytes()
    for entry in entries:
        here = entry.image.to_bytes()
        if here <= last:
            raise FrameError("the images of a catalog repeat or do not ascend")
        last = here
    return Page(entries, more)


def _decoded(body: bytes) -> Any:
    try:
        return dagcbor.decode(body)
    except ProtocolError as error:
        raise FrameError(f"a catalog frame is malformed: {error}") from None


def _entry(row: Any) -> Entry:
    match row:
        case [CID(codec=Codec.DAG_CBOR) as image, str(name), int(size)] if (
            not isinstance(size, bool) and 0 <= size <= MAX_SIZE and len(name.encode()) <= MAX_NAME
        ):
            return Entry(image, name, size)
    raise FrameError("an entry of a catalog is not an image, a name and a size")

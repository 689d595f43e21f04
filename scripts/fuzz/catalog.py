"""Lists of what nodes publish: requests and answers with anything in them wrong, and any bytes at all.

Asserted: only `FrameError` is raised; what is accepted keeps the rules (ids of images that ascend behind the one asked
for, names and sizes within their bounds, more to come only behind something) and is the only frame that says so.
"""

from __future__ import annotations

from typing import Any

from fuzz.choices import Choices
from fuzz.manifest import anything, spoiled
from protocols import catalog, dagcbor
from protocols.cid import CID, Codec
from protocols.errors import DecodeError, FrameError
from protocols.framing import PREFIX, frame_length

SIZES = (0, 1, 23, 1 << 32, catalog.MAX_SIZE, catalog.MAX_SIZE + 1, (1 << 64) - 1, -1)
NAMES = ("", "disk.img", "ü", "x" * catalog.MAX_NAME, "x" * (catalog.MAX_NAME + 1), "ü" * 128, "\x1b[0m", "\ud800")
COUNTS = (0, 1, 2, 3, catalog.MAX_ENTRIES, catalog.MAX_ENTRIES + 1)
MAX_DEPTH = 4


def check(data: bytes) -> None:
    """Raises AssertionError when an invariant of the module's text is broken."""
    choices = Choices(data)
    after = choices.of((None, image(0), image(2), image(1000)))
    kind = choices.below(3)
    if kind == 0:
        body = choices.rest()
    else:
        value: Any = {"after": choices.of((after, None, 1, image(1, Codec.RAW)))} if kind == 1 else answer(choices)
        if choices.below(2):
            value = spoiled(choices, value, MAX_DEPTH)
        try:
            body = dagcbor.encode(value)
        except (DecodeError, ValueError, TypeError, OverflowError):
            body = dagcbor.encode(None)  # nothing that can be said in CBOR
    check_request(body)
    check_answer(body, after)


def image(number: int, codec: Codec = Codec.DAG_CBOR) -> CID:
    return CID(codec, number.to_bytes(32, "big"))


def answer(choices: Choices) -> dict[str, Any]:
    """A page, of which most are good."""
    first = choices.of((0, 1, 3, 999, 1001))
    rows: list[Any] = [[image(first + number), "x", number] for number in range(choices.of(COUNTS))]
    for _ in range(choices.below(3)):
        if rows:
            row = [image(choices.below(8) + first), choices.of(NAMES), choices.of(SIZES)]
            rows[choices.below(len(rows) % 256 or 1)] = row if choices.below(4) else anything(choices, 2)
    return {"images": rows if choices.below(8) else None, "more": choices.of((True, False))}


def check_request(body: bytes) -> None:
    try:
        after = catalog.decode_request(body)
    except FrameError:
        return
    assert after is None or after.codec is Codec.DAG_CBOR
    again = catalog.encode_request(after)
    assert again[PREFIX:] == body, "two encodings of one request"
    assert frame_length(again[:PREFIX], catalog.MAX_REQUEST) == len(body)


def check_answer(body: bytes, after: CID | None) -> None:
    try:
        page = catalog.decode_answer(body, after)
    except FrameError:
        return
    again = catalog.encode_answer(page)
    assert again[PREFIX:] == body, "two encodings of one answer"
    assert frame_length(again[:PREFIX], catalog.MAX_ANSWER) == len(body)
    if page is None:
        return
    keys = [each.image.to_bytes() for each in page.entries]
    assert keys == sorted(set(keys)) and len(keys) <= catalog.MAX_ENTRIES
    assert after is None or not keys or keys[0] > after.to_bytes()
    assert keys or not page.more
    for each in page.entries:
        assert each.image.codec is Codec.DAG_CBOR
        assert len(each.name.encode()) <= catalog.MAX_NAME and 0 <= each.size <= catalog.MAX_SIZE

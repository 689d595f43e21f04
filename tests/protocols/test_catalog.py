from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor
from protocols.catalog import (
    MAX_ANSWER,
    MAX_ENTRIES,
    MAX_NAME,
    MAX_REQUEST,
    MAX_SIZE,
    Entry,
    Page,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    publisher_key,
)
from protocols.cid import CID, Codec
from protocols.errors import FrameError
from protocols.framing import frame_length


def image(number: int, codec: Codec = Codec.DAG_CBOR) -> CID:
    return CID(codec, number.to_bytes(32, "big"))


NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
ENTRIES = st.dictionaries(st.integers(1, 1 << 200), st.tuples(NAMES, st.integers(0, MAX_SIZE)), max_size=20).map(
    lambda rows: tuple(Entry(image(number), *rows[number]) for number in sorted(rows))
)


@given(st.none() | st.integers(0, 1 << 255))
def test_requests(number: int | None) -> None:
    after = None if number is None else image(number)
    frame = encode_request(after)
    assert frame_length(frame[:4], MAX_REQUEST) == len(frame) - 4
    assert decode_request(frame[4:]) == after


@given(ENTRIES, st.booleans())
def test_answers(entries: tuple[Entry, ...], more: bool) -> None:
    page = Page(entries, more and bool(entries))
    frame = encode_answer(page)
    assert frame_length(frame[:4], MAX_ANSWER) == len(frame) - 4
    assert decode_answer(frame[4:], None) == page
    if entries:
        with pytest.raises(FrameError, match="ascend"):
            decode_answer(frame[4:], entries[0].image)


def test_who_does_not_publish() -> None:
    assert decode_answer(encode_answer(None)[4:], None) is None


def test_the_largest_frames_fit() -> None:
    entries = tuple(Entry(image(number), "x" * MAX_NAME, MAX_SIZE) for number in range(MAX_ENTRIES))
    assert len(encode_answer(Page(entries, True))) - 4 <= MAX_ANSWER
    assert len(encode_request(image(0))) - 4 <= MAX_REQUEST


@pytest.mark.parametrize(
    "value",
    [{}, None, [], {"after": 1}, {"after": bytes(36)}, {"after": None, "x": 1}, {"after": image(1, Codec.RAW)}],
)
def test_bad_requests(value: object) -> None:
    with pytest.raises(FrameError):
        decode_request(dagcbor.encode(value))


@pytest.mark.parametrize(
    "value",
    [
        {},
        None,
        {"images": []},
        {"images": None, "more": True},
        {"images": [], "more": True},
        {"images": [], "more": 0},
        {"images": [], "more": False, "x": 1},
        {"images": {}, "more": False},
        {"images": [[image(n), "", 0] for n in range(MAX_ENTRIES + 1)], "more": False},
        {"images": [[image(2), "", 0], [image(1), "", 0]], "more": False},
        {"images": [[image(1), "", 0], [image(1), "", 0]], "more": False},
        *(
            {"images": [row], "more": False}
            for row in (
                [],
                "x",
                [image(1), "x"],
                [image(1), "x", 0, 0],
                [image(1), b"x", 0],
                [image(1), "x", -1],
                [image(1), "x", True],
                [image(1), "x", MAX_SIZE + 1],
                [image(1), "ü" * 128, 0],
                [image(1, Codec.RAW), "x", 0],
                [bytes(36), "x", 0],
            )
        ),
    ],
)
def test_bad_answers(value: object) -> None:
    with pytest.raises(FrameError):
        decode_answer(dagcbor.encode(value), None)


def test_a_page_that_goes_back() -> None:
    body = encode_answer(Page((Entry(image(1), "", 0),)))[4:]
    assert decode_answer(body, image(0)) is not None
    for after in (image(1), image(2)):
        with pytest.raises(FrameError):
            decode_answer(body, after)


@given(st.binary(max_size=300))
def test_noise(data: bytes) -> None:
    for decode in (decode_request, lambda body: decode_answer(body, None)):
        with suppress(FrameError):
            decode(data)


def test_keys_fit_the_dht() -> None:
    assert len(publisher_key("12D3KooWSMTjKMnLmfEDoZhQH2RniDbw9jce1aNK6SnAkHVEPGaR")) == 39


@given(ENTRIES, st.booleans(), st.integers(0, 1 << 200) | st.none(), st.data())
def test_frames_with_something_in_them_wrong(
    entries: tuple[Entry, ...], more: bool, number: int | None, data: st.DataObject
) -> None:
    """Nothing but a FrameError comes of it, or a page that keeps all rules and that only these bytes say."""
    after = None if number is None else image(number)
    body = bytearray(encode_answer(Page(entries, more))[4:])
    at = data.draw(st.integers(0, len(body) - 1))
    body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        page = decode_answer(bytes(body), after)
    except FrameError:
        return
    assert encode_answer(page)[4:] == body
    if page is not None:
        keys = [each.image.to_bytes() for each in page.entries]
        assert keys == sorted(set(keys)) and all(each.image.codec is Codec.DAG_CBOR for each in page.entries)
        assert not keys or after is None or keys[0] > after.to_bytes()
        assert keys or not page.more
        assert all(len(each.name.encode()) <= MAX_NAME and 0 <= each.size <= MAX_SIZE for each in page.entries)

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor
from protocols.cid import CID, Codec
from protocols.errors import FrameError
from protocols.framing import frame_length
from protocols.narinfo import (
    MAX_ANSWER,
    MAX_REQUEST,
    MAX_TEXT,
    Found,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    nar_key,
    provider_key,
)

KEYS = st.lists(st.binary(min_size=20, max_size=20) | st.binary(min_size=32, max_size=32), min_size=1, max_size=16)
CIDS = st.binary(min_size=32, max_size=32).map(lambda digest: CID(Codec.DAG_CBOR, digest))
FOUND = st.builds(Found, st.text(max_size=200), CIDS, st.integers(0, (1 << 18) - 1))


@given(KEYS)
def test_requests(keys: list[bytes]) -> None:
    frame = encode_request(keys)
    assert frame_length(frame[:4], MAX_REQUEST) == len(frame) - 4
    assert decode_request(frame[4:]) == tuple(keys)


@given(st.lists(st.none() | FOUND, min_size=1, max_size=16))
def test_answers(found: list[Found | None]) -> None:
    frame = encode_answer(found)
    assert frame_length(frame[:4], MAX_ANSWER) == len(frame) - 4
    assert decode_answer(frame[4:], len(found)) == tuple(found)


def test_the_largest_frames_fit() -> None:
    assert len(encode_request([bytes(32)] * 16)) <= MAX_REQUEST
    largest = Found("x" * MAX_TEXT, CID(Codec.DAG_CBOR, bytes(32)), (1 << 18) - 1)
    assert len(encode_answer([largest] * 16)) <= MAX_ANSWER


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"keys": []},
        {"keys": [bytes(20)] * 17},
        {"keys": [bytes(21)]},
        {"keys": ["x" * 20]},
        {"keys": [bytes(20)], "more": 1},
        [bytes(20)],
        None,
    ],
)
def test_bad_requests(value: object) -> None:
    with pytest.raises(FrameError):
        decode_request(dagcbor.encode(value))


CID_ = CID(Codec.DAG_CBOR, bytes(32))


@pytest.mark.parametrize(
    "entry",
    [
        [],
        ["x", CID_],
        ["x", CID_, -1],
        ["x", CID_, True],
        ["x", CID_, 1 << 18],
        ["x", CID(Codec.RAW, bytes(32)), 0],
        [b"x", CID_, 0],
        ["x" * (MAX_TEXT + 1), CID_, 0],
        "x",
    ],
)
def test_bad_answers(entry: object) -> None:
    with pytest.raises(FrameError):
        decode_answer(dagcbor.encode({"found": [entry]}), 1)


def test_an_answer_to_another_request() -> None:
    with pytest.raises(FrameError):
        decode_answer(encode_answer([None, None])[4:], 1)


@given(st.binary(max_size=300))
def test_noise(data: bytes) -> None:
    for decode in (decode_request, lambda body: decode_answer(body, 1)):
        with suppress(FrameError):
            decode(data)


def test_lengths() -> None:
    for prefix in (bytes(4), b"\xff\xff\xff\xff", (MAX_REQUEST + 1).to_bytes(4, "big")):
        with pytest.raises(FrameError):
            frame_length(prefix, MAX_REQUEST)


def test_keys_fit_the_dht() -> None:
    assert len(provider_key(bytes(20))) == 36 and len(nar_key(bytes(32))) == 35

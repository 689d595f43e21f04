from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.cid import CID, CID_SIZE, TEXT_SIZE, Codec
from protocols.errors import CIDError

cids = st.builds(CID, st.sampled_from(Codec), st.binary(min_size=32, max_size=32))


@given(cids)
def test_both_forms_round_trip(cid: CID) -> None:
    assert CID.from_bytes(cid.to_bytes()) == cid == CID.parse(str(cid))
    assert len(cid.to_bytes()) == CID_SIZE and len(str(cid)) == TEXT_SIZE


@given(cids, st.integers(0, 3), st.integers(0, 255))
def test_another_head_is_refused(cid: CID, at: int, value: int) -> None:
    data = bytearray(cid.to_bytes())
    data[at] = value
    try:
        assert CID.from_bytes(bytes(data)).to_bytes() == data
    except CIDError:
        assert bytes(data[:4]) not in (b"\x01\x55\x1e\x20", b"\x01\x71\x1e\x20")


@given(st.text(max_size=70) | st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=58, max_size=58).map("b".__add__))
def test_any_text_is_an_id_or_a_cid_error(text: str) -> None:
    with suppress(CIDError):
        assert str(CID.parse(text)) == text


@given(cids, st.integers(0, TEXT_SIZE - 1), st.sampled_from("aA1=ıß \n\u212a"))
def test_a_changed_character_never_gives_the_same_id(cid: CID, at: int, char: str) -> None:
    text = str(cid)[:at] + char + str(cid)[at + 1 :]
    if text != str(cid):
        with suppress(CIDError):
            assert CID.parse(text) != cid


@pytest.mark.parametrize("size", [0, 4, 35, 37, 72])
def test_other_lengths_are_refused(size: int) -> None:
    with pytest.raises(CIDError):
        CID.from_bytes((b"\x01\x55\x1e\x20" + bytes(100))[:size])


def test_upper_case_and_dirty_last_bits_are_refused() -> None:
    text = str(CID.of(Codec.RAW, b"x"))
    with pytest.raises(CIDError):
        CID.parse("b" + text[1:].upper())
    digits = "abcdefghijklmnopqrstuvwxyz234567"
    dirty = digits[digits.index(text[-1]) | 1]
    with pytest.raises(CIDError):
        CID.parse(text[:-1] + dirty)


def test_of_and_matches() -> None:
    cid = CID.of(Codec.RAW, b"data")
    assert cid.matches(memoryview(b"data")) and not cid.matches(b"datA")

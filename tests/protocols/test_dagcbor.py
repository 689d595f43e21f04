from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor
from protocols.cid import CID, Codec
from protocols.errors import DecodeError

cids = st.builds(CID, st.sampled_from(Codec), st.binary(min_size=32, max_size=32))
scalars = st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary() | st.text() | cids
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=5) | st.dictionaries(st.text(max_size=30), v, max_size=5), max_leaves=20
)


@given(values)
def test_values_round_trip(value: Any) -> None:
    data = dagcbor.encode(value)
    try:
        again = dagcbor.decode(data)
    except DecodeError as exc:
        assert "deeper" in str(exc)
        return
    assert again == value and dagcbor.encode(again) == data


@given(st.binary(max_size=64))
def test_any_bytes_are_canonical_or_refused(data: bytes) -> None:
    try:
        value = dagcbor.decode(data)
    except DecodeError:
        return
    assert dagcbor.encode(value) == data


def test_mutations_are_canonical_or_refused() -> None:
    rng = random.Random(7)
    link = CID.of(Codec.RAW, b"x")
    good = dagcbor.encode({"a": [1, -1, 300, 1 << 40, None, True], "bb": {"c": b"xyz", "d": "text"}, "l": [link, {}]})
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 4)]
                    data = data or bytearray(1)
                case 2:
                    data[at:at] = rng.randbytes(rng.randint(1, 4))
                case 3:
                    data[at] ^= 1 << rng.randrange(8)
        try:
            value = dagcbor.decode(bytes(data))
        except DecodeError:
            continue
        assert dagcbor.encode(value) == data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1817",  # 23 in two bytes
        "1900ff",
        "1a0000ffff",
        "1b00000000ffffffff",
        "3800",
        "5800",
        "780161",  # text length in its long form
        "9800",
        "b800",
        "d82a",
        "d9002a58250001551e20" + "00" * 32,  # tag 42 in its long form
        "9fff",
        "bfff",
        "5fff",
        "7fff",  # indefinite lengths
        "1c",
        "1f",
        "f8f4",  # false, true and null in longer forms
        "f8f5",
        "f8f6",
        "f900f4",
        "fa000000f5",
        "fb00000000000000f6",
        "f7",
        "f0",
        "f820",
        "f93c00",
        "fb3ff0000000000000",
        "f97e00",  # floats
        "ff",
        "a2616100616100",  # a key twice
        "a2616200616100",  # keys out of order
        "a262616100616200",  # the longer key first
        "a10000",
        "a1416100",  # keys that are not text
        "61ff",
        "63eda080",  # a surrogate
        "62c080",  # overlong
        "c249010000000000000000",  # bignum
        "c100",
        "d81c00",
        "d81d00",
        "d8234161",  # date, shared reference, regular expression
        "d82a00",
        "d82a40",
        "d82a582501" + "01551e20" + "00" * 32,  # no identity prefix
        "d82a58250001561e20" + "00" * 32,  # an unknown codec
        "0000",
        "8100f6",  # something behind the end
        "82",
        "8200",
        "5b7fffffffffffffff",
        "9b00000001ffffffff",
        "bbffffffffffffffff",
        "7bffffffffffffffff",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(DecodeError):
        dagcbor.decode(bytes.fromhex(text))


@pytest.mark.parametrize("unit", [b"\x81", b"\xa1\x61a", b"\xd8\x2a", b"\x9a\x00\x01\x00\x00"])
def test_hostile_nesting_is_refused_at_once(unit: bytes) -> None:
    with pytest.raises(DecodeError):
        dagcbor.decode(unit * 100_000)


@pytest.mark.parametrize("value", [1.5, 1 << 64, object()])
def test_encode_refuses_other_types_or_decode_does(value: Any) -> None:
    try:
        data = dagcbor.encode(value)
    except TypeError:
        return
    with pytest.raises(DecodeError):
        dagcbor.decode(data)

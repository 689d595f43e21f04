"""`ChunkList` is a faster way to what cbor2 and the general decoder make of the same list, and to nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor
from protocols.chunk_list import MAX_NUMBER, ChunkList
from protocols.cid import CID, Codec
from protocols.errors import DecodeError

EDGES = (0, 23, 24, 255, 256, 65535, 65536, MAX_NUMBER)
digests = st.binary(min_size=32, max_size=32)
sizes = st.integers(0, MAX_NUMBER) | st.sampled_from(EDGES)
LINK = CID(Codec.RAW, b"\n" * 32)  # a line feed is a byte as any other
PAIR = [LINK, 300]


def pairs(chunks: ChunkList) -> list[list[Any]]:
    return [[CID(Codec.RAW, digest), size] for digest, size in zip(chunks.digests, chunks.sizes, strict=True)]


@given(st.lists(st.tuples(digests, sizes), min_size=1, max_size=300))
def test_it_is_encoded_as_the_list_it_stands_for_and_decoded_from_it(items: list[tuple[bytes, int]]) -> None:
    chunks = ChunkList(tuple(digest for digest, _ in items), tuple(size for _, size in items))
    data = dagcbor.encode({"chunks": chunks, "size": 7})
    assert data == dagcbor.encode({"chunks": pairs(chunks), "size": 7})
    assert dagcbor.decode(data) == {"chunks": chunks, "size": 7}


def test_an_empty_one_is_an_empty_list() -> None:
    assert dagcbor.encode(ChunkList((), ())) == dagcbor.encode([]) and dagcbor.decode(dagcbor.encode([])) == []


@pytest.mark.parametrize(
    "value",
    [
        [PAIR, [LINK, -1]],
        [PAIR, [LINK, MAX_NUMBER + 1]],
        [PAIR, [LINK, b"300"]],
        [PAIR, [LINK]],
        [PAIR, [LINK, 1, 1]],
        [PAIR, [CID(Codec.DAG_CBOR, LINK.digest), 300]],
        [PAIR, LINK],
        [PAIR, 300],
        [[300, LINK]],
    ],
)
def test_another_list_is_a_list(value: list[Any]) -> None:
    data = dagcbor.encode(value)
    again = dagcbor.decode(data)
    assert type(again) is list and again == value


def test_pairs_behind_the_end_of_a_list_do_not_belong_to_it() -> None:
    again = dagcbor.decode(dagcbor.encode([[PAIR, PAIR], [PAIR], PAIR, PAIR, {}]))
    assert again == [ChunkList((LINK.digest,) * 2, (300, 300)), ChunkList((LINK.digest,), (300,)), PAIR, PAIR, {}]


@pytest.mark.parametrize("value", [[PAIR], [LINK]])
def test_it_may_stand_as_deep_as_any_other_list_of_links(value: Any) -> None:
    depth = 1 + (value == [PAIR])  # of lists, down to the one with the link
    for _ in range(dagcbor.MAX_DEPTH - 1 - depth):
        value = [value]
    dagcbor.decode(dagcbor.encode(value))
    with pytest.raises(DecodeError, match="deeper"):
        dagcbor.decode(dagcbor.encode([value]))


@pytest.mark.parametrize("head", ["1817", "190017", "1900ff", "1a0000ffff", "1b000000000000012c"])
def test_sizes_in_a_longer_form_are_refused(head: str) -> None:
    good = dagcbor.encode([PAIR, PAIR])
    assert good.endswith(bytes.fromhex("19012c"))
    with pytest.raises(DecodeError):
        dagcbor.decode(good[:-3] + bytes.fromhex(head))


def test_every_cut_is_refused() -> None:
    good = dagcbor.encode([[LINK, size] for size in EDGES])
    for end in range(len(good)):
        with pytest.raises(DecodeError):
            dagcbor.decode(good[:end])


@pytest.mark.parametrize("chunks", [ChunkList((b"short",), (1,)), ChunkList((bytes(32),), (MAX_NUMBER + 1,))])
def test_what_is_no_chunk_is_not_encoded(chunks: ChunkList) -> None:
    with pytest.raises(ValueError):
        dagcbor.encode(chunks)

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor
from protocols.cid import CID, Codec
from protocols.errors import FrameError
from protocols.exchange import messages as m
from protocols.manifest import MAX_CHUNK

roots = st.builds(CID, st.just(Codec.DAG_CBOR), st.binary(min_size=32, max_size=32))
keys = st.builds(CID, st.sampled_from(Codec), st.binary(min_size=32, max_size=32)).map(CID.to_bytes)
ids = st.lists(keys, min_size=1, max_size=5).map(tuple)
texts = st.text(max_size=m.MAX_TEXT)


@st.composite
def fields(draw: st.DrawFn) -> tuple[int, bytes]:
    count = draw(st.integers(0, 100))
    number = draw(st.integers(0, (1 << count) - 1)) << (-count % 8)
    return count, number.to_bytes((count + 7) // 8, "big")


@st.composite
def blocks(draw: st.DrawFn) -> m.Block:
    payload = draw(st.binary(min_size=1, max_size=500))
    encoding = draw(st.sampled_from(m.Encoding))
    size = len(payload) if encoding is m.Encoding.RAW else draw(st.integers(1, MAX_CHUNK))
    return m.Block(draw(keys), encoding, size, (payload,))


names = st.lists(texts, max_size=3).map(tuple)
words = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=20)
word_lists = st.lists(words, max_size=4, unique=True)


def path_records() -> st.SearchStrategy[tuple[m.PathRecord, ...]]:
    said = st.tuples(
        word_lists.map(tuple),
        st.none() | word_lists.map(lambda some: tuple(sorted(some))),
        st.none() | words,
        st.none() | words,
    )
    return st.dictionaries(st.integers(0, (1 << 18) - 1), said, max_size=4).map(
        lambda paths: tuple(m.PathRecord(number, *paths[number]) for number in sorted(paths))
    )


messages = st.one_of(
    st.builds(
        m.Hello,
        st.integers(1, 65536),
        texts,
        names,
        st.lists(st.integers(0, 255), max_size=4).map(tuple),
        names,
        st.integers(1, 1 << 32),
    ),
    st.builds(m.Interest, roots, st.booleans()),
    st.builds(m.Availability, roots, st.integers(0, 1 << 22), st.none()),
    st.builds(lambda root, field: m.Availability(root, *field), roots, fields()),
    st.builds(
        lambda root, some: m.Have(root, tuple(m.ranges_of(some))),
        roots,
        st.lists(st.integers(0, 1000), min_size=1, max_size=50),
    ),
    st.builds(m.Records, roots, path_records(), st.booleans()),
    st.builds(m.Want, ids, st.sampled_from(m.Priority)),
    blocks(),
    st.builds(m.DontHave, ids),
    st.builds(m.Cancel, ids),
    st.builds(m.Busy, st.integers(0, 1 << 24)),
    st.builds(m.Goodbye, texts),
)


def wire(*some: m.Message) -> bytes:
    return b"".join(bytes(part) for message in some for part in m.encode(message))


def frame(kind: int, header: bytes, payload: bytes = b"") -> bytes:
    return (
        (len(header) + len(payload)).to_bytes(4, "big")
        + bytes([kind])
        + len(header).to_bytes(3, "big")
        + header
        + payload
    )


def whole(message: m.Message) -> m.Message:
    """A block's payload comes in pieces; which ones is the stream's business."""
    if isinstance(message, m.Block):
        return replace(message, payload=(b"".join(message.payload),))
    return message


def read(data: bytes) -> list[m.Message]:
    return list(m.FrameReader().feed(data))


@given(st.lists(messages, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_round_trip_at_any_split(some: list[m.Message], rng: random.Random) -> None:
    data = wire(*some)
    reader = m.FrameReader()
    got: list[m.Message] = []
    at = 0
    while at < len(data):
        step = rng.choice((1, 2, 7, 8, 9, 40, 1000))
        got += reader.feed(data[at : at + step])
        at += step
    assert [whole(message) for message in got] == some
    assert reader.buffered == 0 and not reader.in_frame


def test_mutated_frames_are_read_or_refused_with_a_frame_error() -> None:
    rng = random.Random(3)
    root, key = CID.of(Codec.DAG_CBOR, b"r"), CID.of(Codec.RAW, b"k").to_bytes()
    good = [
        wire(message)
        for message in (
            m.Hello(agent="x", features=("f",)),
            m.Interest(root),
            m.Availability(root, 12, b"\xff\xf0"),
            m.Have(root, ((1, 2), (5, 1))),
            m.Records(root, (m.PathRecord(0, ("k:A",), ("a", "b"), "d", "c"), m.PathRecord(3)), more=True),
            m.Want((key, key)),
            m.Block(key, m.Encoding.RAW, 5, (b"hello",)),
            m.DontHave((key,)),
            m.Cancel((key,)),
            m.Busy(500),
            m.Goodbye("bye"),
        )
    ]
    refused = 0
    for turn in range(6000):
        data = bytearray(good[turn % len(good)])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(min(len(data), 12))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1 if len(data) > 1:
                    del data[at]
                case _:
                    data.insert(at, rng.randrange(256))
        reader = m.FrameReader()
        try:
            for message in reader.feed(data):
                assert wire(message)
            assert reader.buffered <= len(data)
        except FrameError:
            refused += 1
    assert refused > 1000


ROOT = CID.of(Codec.DAG_CBOR, b"r")
RAW_KEY = CID.of(Codec.RAW, b"k").to_bytes()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (1, {}),
        (1, []),
        (2, [ROOT]),
        (2, [ROOT, 1]),
        (2, [ROOT.to_bytes(), True]),
        (3, [ROOT, -1, None]),
        (3, [ROOT, (1 << 22) + 1, None]),
        (3, [ROOT, 8, b""]),
        (3, [ROOT, 8, b"\xff\xff"]),
        (3, [ROOT, 7, b"\xff"]),
        (3, [ROOT, True, None]),
        (4, [ROOT, []]),
        (4, [ROOT, [[0, 0]]]),
        (4, [ROOT, [[5, 1], [0, 1]]]),
        (4, [ROOT, [[0, 2], [1, 1]]]),
        (4, [ROOT, [[1 << 22, 1]]]),
        (4, [ROOT, [[-1, 1]]]),
        (4, [ROOT, [[2 * i, 1] for i in range(m.MAX_RANGES + 1)]]),
        (0x85, [ROOT, []]),
        (6, [[], 0]),
        (6, [[RAW_KEY], 3]),
        (6, [[RAW_KEY], -1]),
        (6, [[RAW_KEY], True]),
        (6, [[RAW_KEY[:-1]], 0]),
        (6, [[b"\x01\x70" + RAW_KEY[2:]], 0]),
        (6, [[RAW_KEY] * (m.MAX_IDS + 1), 0]),
        (8, []),
        (9, [1]),
        (10, -1),
        (10, (1 << 24) + 1),
        (10, True),
        (11, "x" * 257),
        (11, b"x"),
        (5, None),
        (12, None),
        (0x7F, None),
    ],
)
def test_malformed_headers_are_refused(kind: int, value: object) -> None:
    with pytest.raises(FrameError):
        read(frame(kind, dagcbor.encode(value)))


@pytest.mark.parametrize(
    ("value", "payload"),
    [
        ([RAW_KEY, 0, 5], b"four"),
        ([RAW_KEY, 0, 0], b""),
        ([RAW_KEY, 1, 5], b""),
        ([RAW_KEY, 3, 4], b"four"),
        ([RAW_KEY, 0, MAX_CHUNK + 1], b"four"),
        ([RAW_KEY, True, 4], b"four"),
        ([RAW_KEY[1:], 0, 4], b"four"),
        ([RAW_KEY, 0], b"four"),
    ],
)
def test_malformed_blocks_are_refused(value: object, payload: bytes) -> None:
    with pytest.raises(FrameError):
        read(frame(7, dagcbor.encode(value), payload))


def test_unknown_ignorable_frames_are_skipped_and_a_hello_may_have_more_fields() -> None:
    assert read(frame(0xFF, b"whatever") + frame(0x80, b"") + wire(m.Busy(1))) == [m.Busy(1)]
    header = {"v": 1, "agent": "", "features": [], "encodings": [], "namespaces": [], "max_wants": 1, "new": 1}
    assert isinstance(read(frame(1, dagcbor.encode(header)))[0], m.Hello)


@pytest.mark.parametrize(
    "prefix",
    [
        "ffffffff07000001",  # a payload of 4 GiB
        "ffffffff06ffffff",  # a header of 16 MiB
        "0010000106100001",  # one byte over the limit
        "00000001ff000002",  # a header longer than the frame
        "0000000206000001",  # a payload where none belongs
    ],
)
def test_sizes_are_refused_by_the_prefix_alone(prefix: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            read(bytes.fromhex(prefix))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_reader_holds_no_more_than_one_frame() -> None:
    reader = m.FrameReader()
    data = wire(*[m.Block(RAW_KEY, m.Encoding.RAW, 10_000, (bytes(10_000),))] * 20)
    for at in range(0, len(data), 777):
        list(reader.feed(data[at : at + 777]))
        assert reader.buffered <= 10_000


@given(st.lists(st.integers(0, 300)))
def test_ranges_are_ascending_and_cover_the_same(some: list[int]) -> None:
    ranges = list(m.ranges_of(some))
    assert [i for first, number in ranges for i in range(first, first + number)] == sorted(set(some))
    assert all(a + n < b for (a, n), (b, _) in pairwise(ranges))


def test_payloads_are_slices_of_what_was_fed_and_small_pieces_are_joined() -> None:
    size = 1 << 20
    data = wire(m.Block(RAW_KEY, m.Encoding.RAW, size, (bytes(size),)))
    (block,) = read(data)
    assert isinstance(block, m.Block)
    (piece,) = block.payload
    assert isinstance(piece, memoryview) and piece.obj is data

    reader = m.FrameReader()
    (block,) = [message for at in range(0, len(data), 100) for message in reader.feed(data[at : at + 100])]
    assert isinstance(block, m.Block)
    assert b"".join(block.payload) == bytes(size)
    assert len(block.payload) <= size // m.JOINED_PIECE + 1, "a peer that sends byte by byte costs what it sends"


@given(keys, st.integers(0, 300), st.integers(0, 1 << 33), st.integers(0, 60), st.integers(0, 255))
def test_the_short_cut_for_block_headers_agrees_with_the_decoder(
    key: bytes, encoding: int, size: int, at: int, byte: int
) -> None:
    header = bytearray(dagcbor.encode([key, encoding, size]))
    if at < len(header):
        header[at] = byte
    usual = m._usual_block_header(bytes(header))
    assert usual is None or usual == dagcbor.decode(bytes(header))


def test_long_records_are_spread_over_frames() -> None:
    root = CID.of(Codec.DAG_CBOR, b"r")
    some = [m.PathRecord(number, tuple(f"key-{k}:{'A' * 86}==" for k in range(9))) for number in range(10_000)]
    huge = m.PathRecord(10_000, references=tuple(f"{number:0240d}" for number in range(16_000)))
    frames = list(m.records_frames(root, [*some, huge]))
    assert [each for frame in frames for each in frame.paths] == some
    assert [frame.more for frame in frames] == [True] * (len(frames) - 1) + [False]
    assert all(len(wire(frame)) <= m.RECORDS_SIZE + m.PREFIX_SIZE for frame in frames)
    assert read(wire(*frames)) == frames
    assert list(m.records_frames(root, [])) == [m.Records(root, ())]

"""What a fetch keeps of the chunks that have just come, for the verifier behind it."""

from __future__ import annotations

import tracemalloc

import pytest

from p2pnode.swarm import verifying
from protocols.cid import CID, Codec
from protocols.exchange import messages as m

READ = 1 << 20  # what a connection decrypts in one piece


def in_order(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


def arrive(reader: m.FrameReader, payload: bytes) -> m.Block:
    """One block out of a read that is full of other things."""
    block = m.Block(CID.of(Codec.RAW, payload).to_bytes(), m.Encoding.RAW, len(payload), (payload,))
    frame = b"".join(bytes(part) for part in m.encode(block))
    read = bytearray(READ)
    read[: len(frame)] = frame
    (message,) = reader.feed(memoryview(read).toreadonly()[: len(frame)])
    assert isinstance(message, m.Block)
    return message


@pytest.mark.parametrize("size", [1, 4096, 200_000, 300_000])
def test_a_chunk_keeps_little_more_alive_than_itself(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 4 << 20
    monkeypatch.setattr(verifying, "RECENT_BYTES", bound)
    recent, reader = verifying.Recent(in_order), m.FrameReader()
    tracemalloc.start()
    try:
        for number in range(64):
            block = arrive(reader, number.to_bytes(2, "big") * (size // 2) + b"x" * (size % 2))
            recent.put(block.id + number.to_bytes(1, "big"), block.payload)
        del block
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 64 * verifying.PIN_FACTOR * size + (1 << 18)
    assert held < verifying.PIN_FACTOR * bound + READ


def test_many_tiny_chunks_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "RECENT_BYTES", 1 << 20)
    recent = verifying.Recent(in_order)
    digests = [number.to_bytes(32, "big") for number in range(20_000)]
    for digest in digests:
        recent.put(digest, [b"x"])
    assert sum(bool(recent.take([digest])) for digest in digests) < 5_000
    assert recent._size == 0


def test_what_is_taken_is_what_was_put() -> None:
    recent, reader = verifying.Recent(in_order), m.FrameReader()
    data = {bytes([size % 251]) * 32: bytes(range(256)) * size for size in (1, 17, 1200)}
    for digest, payload in data.items():
        recent.put(digest, arrive(reader, payload).payload)
    taken = recent.take(list(data))
    assert [b"".join(pieces) for pieces in taken] == list(data.values())
    assert recent.take(list(data)) == [] and recent._size == 0


def test_those_go_first_that_the_verifier_comes_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "RECENT_BYTES", 8 * (1000 + verifying.RECENT_COST))
    recent = verifying.Recent(in_order)
    digests = [number.to_bytes(32, "big") for number in range(100)]
    for digest in (*digests[50:], *digests[:50]):
        recent.put(digest, [bytes(1000)])
    assert len(recent.take(digests)) == 8, "the first eight, though the last to come"
    for turn in range(1000):  # those that were taken are not remembered for ever
        recent.put(digests[turn % 8], [bytes(1000)])
        assert len(recent.take([digests[turn % 8]])) == 1
    assert len(recent._last) < 100 and recent._size == 0

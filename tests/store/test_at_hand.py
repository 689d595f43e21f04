"""Chunks that are in memory are had at once; of all others `read` has to tell."""

from __future__ import annotations

import threading

import pytest

from p2pnode.errors import StoreError
from p2pnode.store import Store, sources
from tests.store.samples import CHUNK, add, sample_file


def landed(store: Store, seed: int = 1) -> dict[bytes, bytes]:
    image, blocks, parts, _ = sample_file(seed, 8)
    add(store, image, blocks)
    landing = store.landing(image)
    for digest, data in parts.items():
        assert landing.accept(digest, data)
    landing.close()
    return parts


def at_hand(store: Store, parts: dict[bytes, bytes]) -> list[bytes | None]:
    return [None if data is None else bytes(data) for data in store.read_at_hand(list(parts))]


def test_only_an_open_source_is_at_hand(store: Store) -> None:
    parts = landed(store)
    assert at_hand(store, parts) == [None] * 8, "opening it may take a while"
    store.read(next(iter(parts)))
    assert at_hand(store, parts) == list(parts.values())


def test_nobody_can_write_to_what_is_at_hand(store: Store) -> None:
    """Else the stream that sends it has to copy it."""
    parts = landed(store)
    store.read(next(iter(parts)))
    assert all(data is not None and data.readonly for data in store.read_at_hand(list(parts)))


def test_what_is_not_held_is_not_at_hand_and_keeps_its_place(store: Store) -> None:
    parts = landed(store)
    store.read(next(iter(parts)))
    digests = list(parts)
    assert store.read_at_hand([bytes(32), digests[3], bytes(32)])[1] == parts[digests[3]]
    assert store.read_at_hand([bytes(32), digests[3], bytes(32)])[::2] == [None, None]
    assert store.read_at_hand([]) == []


def test_damage_is_left_to_whoever_reads_and_tells(store: Store) -> None:
    parts = landed(store)
    store.read(next(iter(parts)))
    (pack,) = store._packs.iterdir()
    with pack.open("r+b") as file:
        file.seek(5 * CHUNK + 17)
        file.write(b"damage")
    found = at_hand(store, parts)
    assert found[5] is None and not store.problems()
    assert found[:5] + found[6:] == list(parts.values())[:5] + list(parts.values())[6:]


def test_a_file_that_was_replaced_or_cut_is_not_read(store: Store) -> None:
    parts = landed(store)
    store.read(next(iter(parts)))
    (pack,) = store._packs.iterdir()
    with pack.open("r+b") as file:
        file.truncate(4 * CHUNK + 100)
    assert [data is not None for data in at_hand(store, parts)] == [True] * 4 + [False] * 4
    other = pack.with_name("other")
    other.write_bytes(b"".join(parts.values()))
    other.rename(pack)
    assert at_hand(store, parts) == [None] * 8


def test_nobody_is_waited_for(store: Store) -> None:
    parts = landed(store)
    store.read(next(iter(parts)))
    held, over = threading.Event(), threading.Event()

    def write() -> None:
        with store.catalog.transaction():
            held.set()
            over.wait(60)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert held.wait(60)
        assert at_hand(store, parts) == [None] * 8
    finally:
        over.set()
        writer.join()
    assert at_hand(store, parts) == list(parts.values())


def test_a_system_without_such_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = landed(store)
    store.read(next(iter(parts)))
    monkeypatch.setattr(sources, "_NOWAIT", None)
    assert at_hand(store, parts) == [None] * 8


def test_a_damaged_catalog_is_left_to_whoever_reads_and_tells(store: Store) -> None:
    parts = landed(store)
    store.read(next(iter(parts)))
    store.catalog._db.execute("ALTER TABLE chunks RENAME TO gone")
    assert at_hand(store, parts) == [None] * 8
    with pytest.raises(StoreError):
        store.read(next(iter(parts)))

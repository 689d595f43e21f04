"""Buffers that are used again, but never by two at a time."""

from __future__ import annotations

import random
import threading

import pytest

from p2pnode import slabs


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_slabs", [])


def test_what_is_let_go_is_taken_again() -> None:
    view = slabs.take(slabs.SLAB_SIZE)
    whose = id(view.obj)
    del view
    assert id(slabs.take(slabs.LEAST).obj) == whose


@pytest.mark.parametrize("keep", ["slice", "readonly", "slice of a slice", "cast"])
def test_a_slice_keeps_its_slab(keep: str) -> None:
    view = slabs.take(slabs.SLAB_SIZE)
    view[:4] = b"mine"
    kept = {
        "slice": view[:4],
        "readonly": view.toreadonly(),
        "slice of a slice": view[:1000][:4],
        "cast": view.cast("B"),
    }.pop(keep)
    del view
    for _ in range(3):
        slabs.take(slabs.SLAB_SIZE)[:4] = b"hers"
    assert bytes(kept[:4]) == b"mine"


@pytest.mark.parametrize("size", [0, 1, slabs.LEAST - 1, slabs.LEAST, slabs.SLAB_SIZE, slabs.SLAB_SIZE + 1, 5 << 20])
def test_every_size_is_had_and_keeps_at_most_four_times_itself(size: int) -> None:
    view = slabs.take(size)
    assert len(view) == size and not view.readonly
    assert len(memoryview(view.obj)) <= 4 * size


def test_no_more_are_kept_than_agreed() -> None:
    views = [slabs.take(slabs.LEAST) for _ in range(slabs.KEPT + 5)]
    assert len({id(view.obj) for view in views}) == len(views)
    assert len(slabs._slabs) == slabs.KEPT


def test_threads_never_share_one() -> None:
    wrong = []

    def work(number: int) -> None:
        rng, held = random.Random(number), []
        for turn in range(300):
            mark = bytes((number, turn % 256)) * 8
            view = slabs.take(rng.randrange(slabs.LEAST, slabs.SLAB_SIZE))
            view[:16] = mark
            held.append((view[:16], mark))
            if len(held) > 3:
                piece, expected = held.pop(rng.randrange(4))
                if bytes(piece) != expected:
                    wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""Bit fields of what is here."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.store import Store
from p2pnode.swarm.holdings import Holding, Holdings, _bits
from tests.store.samples import add, sample_file


@given(st.lists(st.booleans(), max_size=200))
def test_bits_are_those_that_are_set_one_by_one(flags: list[bool]) -> None:
    holding = Holding({}, bytearray((len(flags) + 7) // 8), 0)
    for number, flag in enumerate(flags):
        if flag:
            holding.set(number, True)
    assert _bits(bytearray(flags)) == holding.bits


@pytest.mark.parametrize("counted", [False, True])
async def test_what_is_told_is_what_is_held(tmp_path: Path, counted: bool) -> None:
    with Store.open(tmp_path / "home") as store:
        image, blocks, parts, _ = sample_file(1, 21)
        add(store, image, blocks)
        landing = store.landing(image)
        digests = list(parts)
        for number in (0, 7, 8, 20):
            assert landing.accept(digests[number], parts[digests[number]])
        landing.flush()
        if counted:
            store.count_held()
        told = await Holdings(store).availability(image.id)
        assert (told.count, told.bits) == (21, bytes([0b10000001, 0b10000000, 0b00001000]))
        for digest, data in parts.items():
            landing.accept(digest, data)
        landing.close()
        if counted:
            store.count_held()
        assert store.held_of(image) == b"\1" * 21
        told = await Holdings(store).availability(image.id)
        assert (told.count, told.bits) == (21, None)
        (pack,) = store._packs.iterdir()
        pack.unlink()
        store.verify(image.id)
        assert store.held_of(image) == bytes(21)

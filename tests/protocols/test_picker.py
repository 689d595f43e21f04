from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocols.exchange.picker import NEARLY, RANDOM_FIRST, Order, Picker, Scattered, bit_test


def test_rarest_first_after_the_first_few() -> None:
    picker = Picker(100, range(100), random.Random(1))
    for index in range(100):
        picker.change(index, +1)
        if index != 42:
            picker.change(index, +1)
    first = [picker.pick(lambda _: True) for _ in range(RANDOM_FIRST)]
    assert 42 not in first and picker.pick(lambda _: True) == 42


def test_ties_are_broken_at_random() -> None:
    picks = Counter(Picker(10, range(10), random.Random(i)).pick(lambda _: True) for i in range(1000))
    assert len(picks) == 10 and min(picks.values()) > 50


def test_sequential_order_and_what_is_put_back_comes_first() -> None:
    picker = Picker(10, range(3, 10), random.Random(1), Order.SEQUENTIAL)
    assert [picker.pick(lambda _: True) for _ in range(3)] == [3, 4, 5]
    picker.put_back(4)
    assert [picker.pick(lambda _: True) for _ in range(2)] == [4, 6]


@pytest.mark.parametrize("order", Order)
def test_search_for_a_needle_is_bounded(order: Order) -> None:
    picker = Picker(100_000, range(100_000), random.Random(1), order)
    looked = Counter[int]()

    def has(index: int) -> bool:
        looked[index] += 1
        return index == 99_999

    with pytest.raises(Scattered):
        picker.pick(has)
    assert looked.total() < 5000
    assert picker.all_of(has) == [99_999]


def test_empty_picker_and_bits() -> None:
    assert Picker(5, [], random.Random(1)).pick(lambda _: True) is None
    assert [bit_test(b"\x81")(i) for i in range(8)] == [True] + [False] * 6 + [True]
    assert bit_test(None)(10**9)


class PickerMachine(RuleBasedStateMachine):
    """Against a dict from chunk to whether it is listed, and one to its availability."""

    def __init__(self) -> None:
        super().__init__()
        self.picker = Picker(20, range(20), random.Random(1))
        self.listed = set(range(20))
        self.levels = [0] * 20

    @rule(index=st.integers(0, 19), by=st.sampled_from([1, -1]))
    def change(self, index: int, by: int) -> None:
        self.picker.change(index, by)
        self.levels[index] = max(0, self.levels[index] + by)

    @rule(has=st.sets(st.integers(0, 19)))
    def pick(self, has: set[int]) -> None:
        try:
            got = self.picker.pick(has.__contains__)
        except Scattered:
            assert not has & self.listed
            return
        if got is None:
            assert not self.listed
            return
        assert got in has & self.listed
        if self.picker.taken > RANDOM_FIRST:
            assert self.levels[got] == min(self.levels[i] for i in has & self.listed)
        self.listed.discard(got)

    @rule(index=st.integers(0, 19))
    def put_back(self, index: int) -> None:
        self.picker.put_back(index)
        self.listed.add(index)

    @rule(index=st.integers(0, 19))
    def drop(self, index: int) -> None:
        self.picker.drop(index)
        self.listed.discard(index)

    @invariant()
    def same(self) -> None:
        assert sorted(self.picker) == sorted(self.listed) and len(self.picker) == len(self.listed)
        assert [self.picker.availability(i) for i in range(20)] == self.levels


TestPicker = PickerMachine.TestCase


def test_with_seeds_only_chunks_come_nearly_in_order_and_differ_between_fetchers() -> None:
    orders = []
    for seed in range(2):
        picker = Picker(2000, range(2000), random.Random(seed))
        picker.seeds_only = True
        orders.append([picker.pick(lambda _: True) for _ in range(2000)])
    for order in orders:
        assert sorted(order) == list(range(2000))
        place = {index: at for at, index in enumerate(order)}
        lag = max(max(place[i] for i in range(n)) - n for n in range(100, 1900, 100))
        assert lag < 5 * NEARLY, "a verifier that follows must find what it needs in a cache of bounded size"
    assert orders[0][:20] != orders[1][:20]


def test_one_partial_peer_makes_it_rarest_first_again() -> None:
    picker = Picker(1000, range(1000), random.Random(1))
    picker.seeds_only = True
    for _ in range(10):
        picker.pick(lambda _: True)
    picker.seeds_only = False
    for index in range(1000):
        if index != 900:
            picker.change(index, +1)
    assert picker.pick(lambda _: True) == 900

"""The time protocol's bytes and arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.clock import ANSWER, Sample, decode, encode, median, sample
from protocols.errors import FrameError


@given(st.floats(0, 253_402_300_799))
def test_a_time_comes_back_to_the_microsecond(now: float) -> None:
    assert len(encode(now)) == ANSWER
    assert decode(encode(now)) == pytest.approx(now, abs=1e-4)


def test_the_bytes() -> None:
    assert encode(1.5).hex() == "000000000016e360"
    assert decode(bytes.fromhex("000000000016e360")) == 1.5


@given(st.binary(max_size=16))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    try:
        assert 0 <= decode(data) <= 253_402_300_800
        assert len(data) == ANSWER
    except FrameError:
        assert len(data) != ANSWER or data > encode(253_402_300_799)


def test_times_that_no_clock_has_are_cut() -> None:
    assert decode(encode(-5.0)) == 0
    assert decode(encode(1e15)) == pytest.approx(253_402_300_800, abs=1e-3)


@given(st.floats(-1e6, 1e6), st.floats(0, 10), st.floats(0, 1))
def test_the_offset_is_wrong_by_half_the_round_trip_at_most(offset: float, rtt: float, part: float) -> None:
    """Wherever on the way the peer read its clock."""
    found = sample(1e9, 1e9 + part * rtt + offset, rtt)
    assert abs(found.offset - offset) <= rtt / 2 + 1e-6


def test_few_liars_do_not_move_the_median() -> None:
    honest = [Sample(0.01 * n, 0.02) for n in range(3)]
    assert median([*honest, Sample(1e6, 0.02), Sample(-1e6, 0.02)]) == pytest.approx(0.01)
    assert median([]) is None

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.exchange import window as w

CHUNK = 256 << 10


def steady(window: w.Window, rate: float, seconds: float, now: float = 0.0, size: int = CHUNK) -> float:
    end = now + seconds
    while now < end:
        now += size / rate
        window.received(size, size / rate, now)
    return now


@pytest.mark.parametrize("rate", [1e5, 1e6, 12.5e6, 125e6])
def test_measured_rate_and_window(rate: float) -> None:
    window = w.Window()
    window.began(0.0)
    window.answered(0.02)
    steady(window, rate, 20.0)
    assert window.rate == pytest.approx(rate, rel=0.3)
    assert not window.starting
    queue = max(min(rate * 0.5, w.HORIZON_BYTES), rate * 4 * 0.02)
    assert window.size == pytest.approx(max(w.START_WINDOW, queue), rel=0.3)


def test_doubles_per_window_while_starting() -> None:
    window = w.Window()
    window.received(CHUNK, 0.01, 0.01)
    window.received(CHUNK, 0.01, 0.02)
    assert window.size == 2 * w.START_WINDOW


def test_grows_again_after_a_stall() -> None:
    window = w.Window()
    window.began(0.0)
    now = steady(window, 12.5e6, 5)
    window.timed_out()
    assert window.size == w.START_WINDOW / 2
    for _ in range(10):
        window.began(now)  # one block in flight at a time
        now += 0.02
        window.received(CHUNK, 0.02, now)
    assert window.size >= 10 * CHUNK


def test_follows_a_link_that_slows_down() -> None:
    window = w.Window()
    now = steady(window, 12.5e6, 5)
    steady(window, 1e6, 5, now)
    assert window.rate < 1.5e6


@given(st.lists(st.tuples(st.integers(1, 4 << 20), st.floats(0, 100)), max_size=60))
def test_bounds(events: list[tuple[int, float]]) -> None:
    window = w.Window()
    now = 0.0
    for size, waited in events:
        now += waited
        window.received(size, waited, now)
        assert w.START_WINDOW / 2 <= window.size <= w.MAX_WINDOW
        assert w.TIMEOUT_MIN <= window.timeout <= w.TIMEOUT_MAX
        assert window.rate >= 0


def test_the_pipe_is_what_the_line_takes_without_a_queue() -> None:
    window = w.Window()
    assert window.pipe == w.START_WINDOW
    window.rate, window.rtt = 100e6, 0.05
    assert window.pipe == 4 * 0.05 * 100e6

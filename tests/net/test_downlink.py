from __future__ import annotations

from p2pnode.net.downlink import FAST, HOLD, MIN_WINDOW, TARGET, Downlink
from protocols.yamux.frames import INITIAL_WINDOW

LINE = 12.5e6  # bytes/s: 100 Mbit/s
STEP = 0.1
RTT = 0.002


def receive(
    line: Downlink, senders: dict[str, float], delay: float, steps: int = 30, now: float = 0.0
) -> dict[str, int | None]:
    """`senders` send at these rates for a while; the bounds they are told last."""
    bounds: dict[str, int | None] = {}
    for step in range(steps):
        for name, rate in senders.items():
            bounds[name] = line.measured(name, int(rate * STEP), RTT + delay, RTT, now + step * STEP)
    return bounds


def test_without_a_queue_windows_are_not_bounded() -> None:
    assert receive(Downlink(), {"a": LINE}, 0.005) == {"a": None}


def test_a_queue_bounds_the_windows_to_what_the_line_needs() -> None:
    bound = receive(Downlink(), {"a": LINE}, 0.08)["a"]
    assert bound is not None
    assert 0.8 * LINE * (TARGET + RTT) < bound < 1.2 * LINE * (TARGET + RTT)


def test_senders_share_the_bound_and_trickles_do_not_count() -> None:
    bounds = receive(Downlink(), dict.fromkeys("abcd", LINE / 4) | {"trickle": 1000.0}, 0.08)
    total = sum(bound or 0 for name, bound in bounds.items() if name != "trickle")
    assert 0.8 * LINE * (TARGET + RTT) < total < 1.2 * LINE * (TARGET + RTT)


def test_a_long_way_gets_its_bandwidth_delay_product() -> None:
    line = Downlink()
    for step in range(30):
        bound = line.measured("far", int(LINE * STEP), 0.2 + 0.05, 0.2, step * STEP)
    assert bound is not None and bound > 0.9 * LINE * 0.2


def test_the_smoothed_time_lags_so_growth_stops_before_the_queue_is_sure() -> None:
    assert receive(Downlink(), {"a": 1e6}, 0.015) == {"a": INITIAL_WINDOW}


def test_on_fast_lines_nothing_is_bounded() -> None:
    assert receive(Downlink(), {"a": 2 * FAST}, 0.08) == {"a": None}


def test_bounds_are_held_and_then_lifted() -> None:
    line = Downlink()
    receive(line, {"a": LINE}, 0.08)
    assert receive(line, {"a": LINE}, 0.001, steps=10, now=3.0)["a"] is not None
    assert receive(line, {"a": LINE}, 0.001, steps=10, now=3.0 + HOLD)["a"] is None


def test_nobody_is_stopped_and_those_who_left_do_not_count() -> None:
    line = Downlink()
    assert receive(line, {"a": 1.0}, 0.5)["a"] == MIN_WINDOW
    receive(line, {"b": LINE, "c": LINE}, 0.08, now=10.0)
    line.forget("c")
    bound = receive(line, {"b": LINE}, 0.08, now=13.0)["b"]
    assert bound is not None and bound > 0.8 * LINE * (TARGET + RTT)

"""Noticing that the machine moved: other interfaces, or time that passed without us (sleep, a paused VM).

Polled, because what counts are the addresses a program would bind, which no single kernel event tells on all systems,
and because a look costs a millisecond.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence

import trio

from p2pnode.net.addresses import Interface, Scope, scope_of

INTERVAL = 3.0  # s between looks
MISSING_TIME = 10.0  # s that a look came late, or that the machine slept: connections may have died unnoticed


class Change(enum.Enum):
    ADDED = "a network interface came up"  # a container's bridge, or the way out after a time without
    INTERFACES = "a network interface went away or changed its address"
    RESUMED = "the machine was asleep"


def asleep() -> float:
    """Seconds this machine has spent suspended since it booted: CLOCK_BOOTTIME counts them, CLOCK_MONOTONIC not."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return time.time() - time.monotonic()


def significant(interfaces: Sequence[Interface]) -> frozenset[Interface]:
    """The interface addresses whose coming and going matters: not loopback. Pure."""
    return frozenset(each for each in interfaces if scope_of(each.ip) is not Scope.HOST)


async def watch(
    interfaces: Callable[[], Sequence[Interface]],
    changed: Callable[[Change], None],
    *,
    asleep: Callable[[], float] = asleep,
) -> None:
    """Call `changed` whenever something changed, until cancelled."""
    known = significant(interfaces())
    slept, looked = asleep(), trio.current_time()
    while True:
        await trio.sleep(INTERVAL)
        now_slept, now = asleep(), trio.current_time()
        if now_slept - slept > MISSING_TIME or now - looked > INTERVAL + MISSING_TIME:
            changed(Change.RESUMED)
        slept, looked = now_slept, now
        found = significant(interfaces())
        if found != known:
            before, known = known, found
            changed(Change.ADDED if found > before else Change.INTERFACES)

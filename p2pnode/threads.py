"""Blocking work in a worker thread that hears of its cancellation."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from p2pnode.failures import most_telling
from p2pnode.progress import Progress, Report

T = TypeVar("T")


async def in_thread(work: Callable[[Callable[[], bool], Report], T], report: Report) -> T:
    """Run blocking work in a worker thread: its reports arrive in this one, and it is told when it is cancelled."""
    stop = threading.Event()
    token = trio.lowlevel.current_trio_token()

    def forward(progress: Progress) -> None:
        token.run_sync_soon(functools.partial(report, progress))

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                result = await trio.to_thread.run_sync(work, stop.is_set, forward)
            except Exception:
                await trio.lowlevel.checkpoint_if_cancelled()  # what the work said to being stopped is of no interest
                raise
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        error = most_telling(group)
        raise error from error.__cause__
    return result

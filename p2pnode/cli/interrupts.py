"""Ctrl-C and SIGTERM, from the first import to the last.

Until a command says otherwise SIGINT leaves at once: what a command does to the disk is crash-safe (DESIGN 3), and a
KeyboardInterrupt out of the middle of an import would be a traceback. Commands that run a node wind it down instead
(`winding_down`), with a deadline: a library that does not end in time must not keep the user.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
SIGINT_DEADLINE = 1.7  # s; the user was promised 2
SIGTERM_DEADLINE = 4.5  # s; service managers are promised 5

_terminal_resets: list[bytes] = []


class Interrupted(Exception):
    """A signal ended the command."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"interrupted (exit code {exit_code})")
        self.exit_code = exit_code


def install() -> None:
    """Leave at once on SIGINT, from now on. Also where it was ignored: shells do so for `p2pnode run &`."""
    signal.signal(signal.SIGINT, _leave_now)


def leave(exit_code: int) -> None:
    """End the process now, with the terminal as it was found."""
    for reset in _terminal_resets:
        with suppress(OSError):
            os.write(2, reset)
    os._exit(exit_code)


@contextmanager
def terminal_reset(sequence: bytes) -> Iterator[None]:
    """Write `sequence` to stderr if the process is left at once within this block."""
    _terminal_resets.append(sequence)
    try:
        yield
    finally:
        _terminal_resets.remove(sequence)


@contextmanager
def winding_down(stop: Callable[[], None], *, serving: bool) -> Iterator[None]:
    """Within this block the first SIGINT, SIGTERM or SIGHUP calls `stop`; a second SIGINT leaves at once.

    Once a signal came the block ends with `Interrupted`, whatever else went wrong while winding down. A node that was
    `serving` has done its work when it is told to stop: exit code 0 for SIGTERM and SIGHUP.
    """
    import threading

    exit_code: int | None = None

    def handler(signum: int, _frame: FrameType | None) -> None:
        nonlocal exit_code
        interrupt = signum == signal.SIGINT
        if interrupt and exit_code is not None:
            leave(EXIT_INTERRUPTED)
        if exit_code is None:
            exit_code = EXIT_INTERRUPTED if interrupt else 0 if serving else EXIT_TERMINATED
            deadline = SIGINT_DEADLINE if interrupt else SIGTERM_DEADLINE
            timer = threading.Timer(deadline, leave, (exit_code,))
            timer.daemon = True
            timer.start()
            stop()

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, handler),
    }
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup stays nohup
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        if exit_code is not None:
            raise Interrupted(exit_code)
        for signum, previous in before.items():
            signal.signal(signum, previous)


def terminate_quietly() -> None:
    """SIGTERM ends a daemon that is still starting with exit code 0: it has nobody to say goodbye to."""
    signal.signal(signal.SIGTERM, lambda *_: leave(0))


def _leave_now(_signum: int, _frame: FrameType | None) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    leave(EXIT_INTERRUPTED)

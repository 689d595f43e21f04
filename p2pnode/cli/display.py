"""Progress on stderr: a bar on a terminal, a line every two seconds elsewhere, nothing with -q."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from p2pnode.cli import interrupts, text
from p2pnode.progress import Progress, Report, silent

LINE_INTERVAL = 2.0  # s between plain lines
RATE_MEMORY = 5.0  # s over which the rate is averaged
SHOW_CURSOR = b"\x1b[?25h\n"


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """A `Report` (to be called from one thread at a time) that draws until the block ends."""
    if quiet:
        yield silent
    elif sys.stderr is not None and sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _Lines()


class _Rate:
    """Bytes per second over the last seconds, and what follows from it."""

    def __init__(self) -> None:
        self._phase = ""
        self._samples: list[tuple[float, int]] = []

    def add(self, each: Progress, now: float) -> float:
        if each.phase != self._phase or (self._samples and each.done < self._samples[-1][1]):
            self._phase, self._samples = each.phase, []
        self._samples = [sample for sample in self._samples[-500:] if now - sample[0] <= RATE_MEMORY]
        self._samples.append((now, each.done))
        (first, done_then), (last, done_now) = self._samples[0], self._samples[-1]
        return (done_now - done_then) / (last - first) if last - first > 0.2 else 0.0


def describe(each: Progress, rate: float) -> str:
    """`downloading: 12.0 MiB of 64.0 MiB (18 %), 11.2 MiB/s, 3 peers, 5 s left; waiting for ...`"""
    parts = []
    if each.total:
        percent = min(100, 100 * each.done // each.total)
        parts.append(f"{text.size(each.done)} of {text.size(each.total)} ({percent} %)")
    elif each.done:
        parts.append(text.size(each.done))
    if rate > 0:
        parts.append(f"{text.size(rate)}/s")
    if each.peers:
        parts.append(f"{each.peers} peer{'s' if each.peers != 1 else ''}")
    if rate > 0 and each.total > each.done:
        parts.append(f"{text.duration((each.total - each.done) / rate)} left")
    line = text.safe(each.phase) + (": " + ", ".join(parts) if parts else "")
    return line + (f"; {text.safe(each.note)}" if each.note else "")


class _Lines:
    def __init__(self) -> None:
        self._rate = _Rate()
        self._next = time.monotonic() + LINE_INTERVAL  # what is done within two seconds needs no progress

    def __call__(self, each: Progress) -> None:
        now = time.monotonic()
        rate = self._rate.add(each, now)
        if now >= self._next:
            self._next = now + LINE_INTERVAL
            print(describe(each, rate), file=sys.stderr, flush=True)


@contextmanager
def _bar() -> Iterator[Report]:
    import rich.console  # 0.1 s: only when something is drawn
    import rich.progress
    import rich.text

    rate = _Rate()
    columns = (rich.progress.BarColumn(bar_width=24), rich.progress.TextColumn("{task.description}", markup=False))
    console = rich.console.Console(stderr=True)
    with (
        interrupts.terminal_reset(SHOW_CURSOR),
        rich.progress.Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar,
    ):
        task = bar.add_task("starting", total=None)

        def report(each: Progress) -> None:
            line = describe(each, rate.add(each, time.monotonic()))
            bar.update(task, description=line, completed=each.done, total=each.total or None)

        yield report

"""Processor time and memory of processes, read from /proc, and one measured fetch."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmlib.content import difference
from swarmlib.process import Command, SwarmError

from transferlib.contender import Ready

POLL = 0.01  # s; each look at a process costs some 50 microseconds
FETCH_SECONDS = 1800.0
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Fetched:
    """One fetch, measured. Times in seconds, sizes in bytes.

    `seconds` is of the transfer: from the first connection to the complete, verified file, as the fetcher told it.
    `process_seconds` is of the whole command. `fetch_cpu` is of all of it too (with a daemon: of what the fetch added
    to it, and the command); `provide_cpu` is what the fetch added, over all providers. Peaks are of resident memory:
    of the fetcher (the daemon, where there is one) since its start, of the hungriest provider during the fetch.
    """

    size: int
    seconds: float
    process_seconds: float
    fetch_cpu: float
    provide_cpu: float
    fetch_peak: int
    provide_peak: int
    shares: tuple[int, ...] | None
    began: float  # CLOCK_MONOTONIC, when the transfer began, counted back from the end of the command
    ended: float


def fetch(ready: Ready, out: Path, original: Path) -> Fetched:
    """Run one fetch into the new directory `out` to its end, and compare what arrived. Raises SwarmError."""
    out.mkdir(parents=True)
    standing = [*ready.providers, *filter(None, [ready.daemon])]
    for pid in standing:
        forget_peak(pid)
    before = {pid: cpu_seconds(pid) for pid in standing}
    command = ready.fetch(out)
    try:
        own_cpu, own_peak = followed(command)
    except BaseException:
        command.stop(2.0)
        raise
    ended = time.monotonic()
    spent = {pid: cpu_seconds(pid) - before[pid] for pid in standing}
    finished = command.finished().check()
    outcome = ready.outcome(finished)
    found = difference(original, out / original.name)
    if found is not None:
        raise SwarmError(found)
    return Fetched(
        size=original.stat().st_size,
        seconds=outcome.seconds,
        process_seconds=finished.seconds,
        fetch_cpu=own_cpu + (spent[ready.daemon] if ready.daemon is not None else 0.0),
        provide_cpu=sum(spent[pid] for pid in ready.providers),
        fetch_peak=own_peak if ready.daemon is None else peak_bytes(ready.daemon),
        provide_peak=max(peak_bytes(pid) for pid in ready.providers),
        shares=outcome.shares,
        began=ended - outcome.seconds,
        ended=ended,
    )


def startup_cpu(args: Sequence[str], log: Path) -> float:
    """Processor seconds of a command that only loads what it needs. After a fetch, so that all byte code is there."""
    command = Command(args, log)
    seconds, _ = followed(command)
    command.finished().check()
    return seconds


def followed(command: Command) -> tuple[float, int]:
    """Wait for the end of a command; its processor seconds, and its peak of resident memory as seen every POLL."""
    peak = 0
    deadline = time.monotonic() + FETCH_SECONDS
    while True:
        peak = max(peak, peak_bytes(command.pid))
        # WNOWAIT: while nobody has collected the process, /proc still tells what it has used.
        if os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        if time.monotonic() > deadline:
            raise SwarmError(f"{' '.join(command.args)} did not end within {FETCH_SECONDS:.0f} s")
        time.sleep(POLL)
    seconds = cpu_seconds(command.pid)
    command.wait()
    return seconds, peak


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process and of the children it has collected, in steps of 10 ms."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        raise SwarmError(f"process {pid} is gone") from None
    return sum(int(field) for field in fields[11:15]) / _TICK


def peak_bytes(pid: int) -> int:
    """VmHWM; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def forget_peak(pid: int) -> None:
    """Begin VmHWM anew, see proc(5) on clear_refs."""
    with contextlib.suppress(OSError):  # not our process, or a kernel without it: then the peak is of its whole life
        Path(f"/proc/{pid}/clear_refs").write_text("5")

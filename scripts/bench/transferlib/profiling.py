"""`--profile`: where the time of the fetcher and of the provider goes, by py-spy.

cpu    threads that run or could, in Python or in a library's code below it: on a busy machine those that wait for a
       processor count too. py-spy guesses which they are; pool threads without work, which it counts, are left out here
gil    threads that hold the interpreter lock: what cannot happen at the same time
wall   all threads all the time, so that waiting shows (`epoll`, locks, empty queues)

Beside them, what the kernel counted: the processor seconds of each thread, which no sampling distorts.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmlib.process import Command, SwarmError

from transferlib import installation
from transferlib.report import table

KINDS: Mapping[str, tuple[str, ...]] = {"cpu": (), "gil": ("--gil",), "wall": ("--idle",)}
RATE = 100  # samples per second: more, and the pauses for them change what is measured
ATTACH_SECONDS = 20.0
TOP = 12
COMMON = 0.97  # functions in more of a thread's samples than this are its entry points, which tell nothing
_WAITING = frozenset({"Condition.wait  threading.py", "WorkerThread._work  _thread_cache.py"})
_TICK = os.sysconf("SC_CLK_TCK")
_ROOT = re.compile(r"thread \([^)]*\)(?:: (?P<name>.*))?")
_PLACE = re.compile(r" \((?:.*/)?(?P<file>[^/()]+):\d+\)$")


@dataclass(frozen=True, slots=True)
class Profile:
    """Samples of one process: in all, by thread (numbers in names left out), and by function in each thread."""

    samples: int
    threads: Mapping[str, int]
    own: Mapping[tuple[str, str], int]  # (thread, function): where it was the innermost
    cumulative: Mapping[tuple[str, str], int]  # where it was anywhere in the stack
    spent: Mapping[str, float]  # processor seconds by thread, as the kernel counted them

    def to_json(self) -> dict[str, Any]:
        def top(counts: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
            ordered = sorted(counts.items(), key=lambda item: -item[1])[: 4 * TOP]
            return [{"thread": key[0], "function": key[1], "samples": count} for key, count in ordered]

        return {
            "samples": self.samples,
            "rate": RATE,
            "threads": dict(self.threads),
            "kernel_seconds": {name: round(seconds, 2) for name, seconds in self.spent.items()},
            "self": top(self.own),
            "cumulative": top(self.cumulative),
        }


def missing() -> str | None:
    return None if installation.program("py-spy") else "--profile needs py-spy; install it with --install"


class Recorder:
    """Records processes from construction to `stop`."""

    def __init__(self, stack: ExitStack, pids: Mapping[str, int], kind: str, directory: Path) -> None:
        """`pids`: by role. Returns once all are being sampled. Raises SwarmError."""
        program = installation.program("py-spy")
        assert program is not None
        self._pids, self._kind = pids, kind
        self._raw = {role: directory / f"{role}-{kind}.txt" for role in pids}
        self._commands: dict[str, Command] = {}
        for role, pid in pids.items():
            args = [program, "record", "--pid", str(pid), "--format", "raw", "--threads", "--function"]
            args += ["--rate", str(RATE), "--output", str(self._raw[role]), *KINDS[kind]]
            self._commands[role] = Command(args, directory / f"{role}-{kind}-spy")
            stack.callback(self._commands[role].stop)
        deadline = time.monotonic() + ATTACH_SECONDS
        while not all("Sampling" in command.stdout + command.stderr for command in self._commands.values()):
            for command in self._commands.values():
                if command.poll() is not None or time.monotonic() > deadline:
                    raise SwarmError(f"py-spy cannot sample: {(command.stderr or command.stdout).strip()[-500:]}")
            time.sleep(0.02)
        self._before = {role: thread_seconds(pid) for role, pid in pids.items()}

    def stop(self) -> dict[str, Profile]:
        """End the recording; a profile of each role."""
        spent = {
            role: {name: s - self._before[role].get(name, 0.0) for name, s in thread_seconds(pid).items()}
            for role, pid in self._pids.items()
        }
        for command in self._commands.values():
            command.signal(signal.SIGINT)
        for command in self._commands.values():
            command.wait(60.0).check()
        ignored = _WAITING if self._kind == "cpu" else frozenset()
        return {role: parse(path.read_text().splitlines(), ignored, spent[role]) for role, path in self._raw.items()}


def thread_seconds(pid: int) -> dict[str, float]:
    """Processor seconds by kind of thread, of those that live; the names are the kernel's, of 15 characters."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended just now
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            seconds = (int(fields[11]) + int(fields[12])) / _TICK
            found[kind_of(name)] = found.get(kind_of(name), 0.0) + seconds
    return found


def kind_of(thread: str) -> str:
    """A thread's name without its number: "Trio thread 17" and the like are one kind."""
    return re.sub(r"(?<=[ -])\d+", "N", thread)


def parse(lines: Iterable[str], ignored: Collection[str] = (), spent: Mapping[str, float] | None = None) -> Profile:
    """A profile of py-spy's raw format: `thread (ID): NAME;outermost;...;innermost COUNT` in each line.

    Samples whose innermost function is one of `ignored` are left out.
    """
    threads: Counter[str] = Counter()
    own: Counter[tuple[str, str]] = Counter()
    cumulative: Counter[tuple[str, str]] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        root, *frames = stack.split(";")
        found = _ROOT.fullmatch(root)
        if found is None or not frames:
            continue
        thread = kind_of(found["name"] or "unnamed thread")
        names = [_PLACE.sub(r"  \g<file>", frame) for frame in frames]
        if names[-1] in ignored:
            continue
        threads[thread] += int(count)
        own[thread, names[-1]] += int(count)
        for name in set(names):
            cumulative[thread, name] += int(count)
    return Profile(sum(threads.values()), threads, own, cumulative, spent or {})


def text(role: str, kind: str, profile: Profile) -> str:
    """The threads, and the top functions of each that has at least a tenth of the samples."""
    total = max(1, profile.samples)

    def share(samples: int) -> tuple[str, str]:
        return f"{100 * samples / total:.1f} %", f"{samples / RATE:.2f}"

    def rows(counts: Mapping[tuple[str, str], int], thread: str, most: float) -> Sequence[tuple[str, ...]]:
        mine = [(name, n) for (where, name), n in counts.items() if where == thread and n <= most]
        return [(name, *share(count)) for name, count in sorted(mine, key=lambda item: -item[1])[:TOP]]

    ordered = sorted(profile.threads.items(), key=lambda item: -item[1])
    parts = [table((f"{role}, {kind}: thread", "share", "s"), [(name, *share(count)) for name, count in ordered])]
    kernel = sorted(((name, f"{s:.2f}") for name, s in profile.spent.items() if s > 0.01), key=lambda i: -float(i[1]))
    parts.append(table((f"{role}, {kind}: thread, by the kernel's count", "s"), kernel))
    for thread, samples in ordered:
        if samples * 10 >= total:
            where = f"{role}, {kind}, {thread}"
            own = rows(profile.own, thread, samples)
            cumulative = rows(profile.cumulative, thread, COMMON * samples)
            parts.append(table((f"{where}: self", "share", "s"), own))
            parts.append(table((f"{where}: cumulative", "share", "s"), cumulative))
    return "\n\n".join(parts)

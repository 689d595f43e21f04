"""What every contender of the benchmark offers: a way to serve a file from processes, and a command that fetches it."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmlib.process import Command, Finished, SwarmError

START_SECONDS = 300.0  # a provider may have to hash a large file, three others beside it
STOP_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs: the address it listens on, and what stands before its command line."""

    address: str
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fetch said itself: seconds from its first connection to the complete file, bytes of each provider."""

    seconds: float
    shares: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """Providers that serve, and how to fetch from all of them.

    `fetch` starts the command, which writes the file into the (existing) directory under the original's name.
    """

    providers: Sequence[int]  # process ids, one per provider
    fetch: Callable[[Path], Command]
    outcome: Callable[[Finished], Outcome]
    daemon: int | None = None  # process id of the daemon that carries out the fetch command, if one does
    home: Path | None = None  # of that daemon
    addrs: Sequence[str] = ()  # multiaddresses: of the daemon, then of the providers


class Contender(ABC):
    """A way to move a file between processes."""

    name: str
    title: str  # what exactly runs, in a few words
    most_providers: int  # that one fetch can draw from

    def missing(self) -> str | None:
        """What must be installed before it can run; None if nothing."""
        return None

    @abstractmethod
    def startup(self) -> Sequence[str]:
        """A command that loads what the fetch command loads, and does nothing."""

    @abstractmethod
    def provide(
        self, stack: ExitStack, directory: Path, original: Path, places: Sequence[Place], fetcher: Place
    ) -> Ready:
        """Start a provider at each of `places`, all ready to serve; `stack` ends them. Raises SwarmError."""


def started(stack: ExitStack, args: Sequence[str], log: Path, place: Place) -> Command:
    """A process that runs until `stack` ends it. It works in an empty directory of its own."""
    cwd = log.with_name(f"{log.name}-cwd")
    cwd.mkdir()
    command = Command(args, log, prefix=place.prefix, cwd=cwd)
    stack.callback(command.stop, STOP_SECONDS)
    return command


def first_line(command: Command) -> dict[str, Any]:
    """The JSON object that a provider prints once it serves. Raises SwarmError."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        line, newline, _ = command.stdout.partition("\n")
        if newline:
            said = json.loads(line)
            assert isinstance(said, dict)
            return said
        if command.poll() is not None:
            raise SwarmError(f"{' '.join(command.args)} ended before it served: {command.stderr.strip()[-2000:]}")
        if time.monotonic() > deadline:
            raise SwarmError(f"{' '.join(command.args)} did not serve within {START_SECONDS:.0f} s")
        time.sleep(0.02)


def last_line(command: Command) -> dict[str, Any]:
    """The last JSON object that a process that is still running printed completely."""
    said = json.loads(command.stdout.rpartition("\n")[0].splitlines()[-1])
    assert isinstance(said, dict)
    return said

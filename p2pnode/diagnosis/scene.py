"""The parts of a running node that are looked at, and the steps as they are written down."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from p2pnode.config import Config
from p2pnode.diagnosis.model import Kind, Mark, Step
from p2pnode.net.dht import DHTRouter
from p2pnode.net.network import Network
from p2pnode.progress import Progress, Report
from p2pnode.store import Store
from p2pnode.swarm.exchange import Exchange

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scene:
    """A node's parts. Nothing here changes them, beyond connections that come up and records that are heard of."""

    config: Config
    store: Store
    network: Network
    router: DHTRouter
    exchange: Exchange


@dataclass
class Journal:
    """Steps in the order in which they are to be read. `report` hears what is being done."""

    report: Report
    steps: list[Step] = field(default_factory=list)

    def note(
        self, kind: Kind, mark: Mark, text: str, *, seconds: float | None = None, peer: str | None = None, **facts: Any
    ) -> None:
        self.steps.append(Step(kind, mark, text, seconds, peer, facts))

    def doing(self, what: str) -> None:
        self.report(Progress("examining", note=what))

    def part(self) -> Journal:
        """For what happens at the same time as something else; its steps are put in their place with `take`."""
        return Journal(self.report)

    def take(self, part: Journal) -> None:
        self.steps += part.steps


class Stopwatch:
    """`seconds` since it was made."""

    def __init__(self) -> None:
        self._began = trio.current_time()

    @property
    def seconds(self) -> float:
        return trio.current_time() - self._began


async def together(jobs: Sequence[Callable[[], Awaitable[T]]], at_once: int = 16) -> list[T]:
    """Run jobs side by side; their results in the given order."""
    results: dict[int, T] = {}
    limiter = trio.CapacityLimiter(at_once)

    async def run(number: int, job: Callable[[], Awaitable[T]]) -> None:
        async with limiter:
            results[number] = await job()

    async with trio.open_nursery() as nursery:
        for number, job in enumerate(jobs):
            nursery.start_soon(run, number, job)
    return [results[number] for number in range(len(jobs))]


def count(number: int, noun: str) -> str:
    """1 address, 2 addresses."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"

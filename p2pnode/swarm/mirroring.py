"""Keeping complete, pinned copies of images, and of all that publishers list (`store.mirrors` is the memory of it).

A *look* at a thing gets its list, if it is a publisher, and whatever of its images is not here. It transfers nothing
that is here, may be interrupted at any time, and the next one goes on from there. A daemon repeats the looks (`run`);
without one, a look is taken when a user asks for it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import trio

from p2pnode import link
from p2pnode.errors import UsageError
from p2pnode.failures import Failure, describe
from p2pnode.net.transport import Transport
from p2pnode.progress import Progress, Report, silent
from p2pnode.store import Store
from p2pnode.store.mirrors import Mirror, Mirrored, Mirrors
from p2pnode.swarm.publishing import published
from protocols.catalog import Entry
from protocols.cid import CID

log = logging.getLogger(__name__)

TOGETHER = 4  # images of one thing that are fetched at the same time ...
ALL_TOGETHER = 8  # ... and of all things: one whose images nobody has must not keep the others waiting
HEAR_INTERVAL = 3600.0  # s between questions for new signatures of an image that is complete; each costs a search
MAX_RESTS = 8  # intervals that a daemon leaves an image alone after it failed, 1 at first and doubling
TIMEOUT = 60.0  # s without any progress after which an image is left to the next look

MAX_NOTED = 65_536  # images that a daemon remembers heard or failing: a publisher may list others at each look

Result = dict[str, Any]
V = TypeVar("V")


class Keep(Protocol):
    """Get what is missing of an image, pinned; the result of `fetch`. `hear`: ask for new signatures in any case."""

    async def __call__(self, wanted: link.Link, *, timeout: float, hear: bool, report: Report) -> Result: ...


@dataclass
class _Sum:
    """The progress of many images as that of one."""

    report: Report
    expected: dict[CID, int] = field(default_factory=dict)
    running: dict[CID, Progress] = field(default_factory=dict)
    ended: set[CID] = field(default_factory=set)  # two things may have an image in common

    def of(self, image: CID) -> Report:
        def one(progress: Progress) -> None:
            self.running[image] = progress
            if progress.total:
                self.expected[image] = progress.total
            self.show()

        return one

    def end(self, image: CID) -> None:
        self.running[image] = Progress("", self.expected.get(image, 0))
        self.ended.add(image)
        self.show()

    def show(self) -> None:
        """One image's own words are the best for it; of several the sums are told."""
        if len(self.expected) == 1 and not self.ended:
            self.report(next(iter(self.running.values())))
            return
        done = sum(each.done for each in self.running.values())
        peers = max((each.peers for each in self.running.values()), default=0)
        note = f"{len(self.ended)} of {len(self.expected)} images"
        self.report(Progress("mirroring", done, sum(self.expected.values()), peers, note))


class Mirroring:
    """See the module's text. `keep` gets one image, `reach(peer, addrs)` connects to a publisher or raises RemoteError.

    Results are those of `fetch` with "mirror" (the thing) and "pinned", or for what failed {"mirror", "image" (if it is
    about one), "error", "message", "exit_code"}.
    """

    def __init__(
        self, store: Store, keep: Keep, transport: Transport, reach: Callable[[str, Sequence[str]], Awaitable[None]]
    ) -> None:
        self._mirrors = Mirrors(store)
        self._keep = keep
        self._transport = transport
        self._reach = reach
        self._limit = trio.Semaphore(ALL_TOGETHER)
        self._heard: dict[CID, float] = {}
        self._rests: dict[CID, tuple[float, float]] = {}  # seconds, and until when
        self._scopes: dict[str, list[trio.CancelScope]] = {}
        self._following: set[str] = set()
        self._nursery: trio.Nursery | None = None
        self._interval = 0.0

    async def mirror(self, texts: Sequence[str], *, timeout: float, report: Report) -> list[Result]:
        """Remember what is to be mirrored, and take a look at it. Raises UsageError before anything is remembered."""
        things = [link.parse_thing(text) for text in texts]
        rows = [
            (str(each.image), each.peers, each.name) if isinstance(each, link.Link) else (each.peer, each.addrs, None)
            for each in things
        ]
        mirrors = {each.thing: each for each in await trio.to_thread.run_sync(self._mirrors.add_all, rows)}
        total = _Sum(report)
        results: dict[str, list[Result]] = {}

        async def one(mirror: Mirror) -> None:
            try:
                results[mirror.thing] = await self._look(mirror, timeout, total, asked=True)
            finally:  # a daemon goes on with it, at once if this was interrupted
                self._follow(mirror.thing, self._interval if mirror.thing in results else 0.0)

        async with trio.open_nursery() as nursery:
            for mirror in mirrors.values():
                nursery.start_soon(one, mirror)
        return [row for thing in mirrors for row in results[thing]]

    def stop(self, thing: str) -> None:
        """End the looks at a thing that are under way, and take no more."""
        self._following.discard(thing)
        for scope in self._scopes.get(thing, ()):
            scope.cancel()

    async def run(self, interval: float) -> None:
        """Look at everything now, and each thing again `interval` seconds after its last look; never returns."""
        async with trio.open_nursery() as self._nursery:
            self._interval = interval
            try:
                for mirror in await trio.to_thread.run_sync(self._mirrors.all):
                    self._follow(mirror.thing, 0.0)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def _follow(self, thing: str, delay: float) -> None:
        if self._nursery is not None and thing not in self._following:
            self._following.add(thing)
            self._nursery.start_soon(self._look_again, thing, delay)

    async def _look_again(self, thing: str, delay: float) -> None:
        """The top of a task, one for each thing."""
        with self._scope(thing):
            await trio.sleep(delay)
            while True:
                try:  # a disk that fails for a moment must not end the daemon
                    mirror = await trio.to_thread.run_sync(self._mirrors.get, thing)
                    if mirror is None:
                        break
                    await self._look(mirror, TIMEOUT, _Sum(silent), asked=False)
                except Exception:
                    log.exception("the look at %s, which is mirrored, failed", thing)
                await trio.sleep(self._interval)
            self._following.discard(thing)

    @contextmanager
    def _scope(self, thing: str) -> Iterator[trio.CancelScope]:
        """A scope that `stop` cancels."""
        with trio.CancelScope() as scope:
            self._scopes.setdefault(thing, []).append(scope)
            try:
                yield scope
            finally:
                self._scopes[thing].remove(scope)
                if not self._scopes[thing]:
                    del self._scopes[thing]

    # One look

    async def _look(self, mirror: Mirror, timeout: float, total: _Sum, *, asked: bool) -> list[Result]:
        """`asked`: by a user, who wants everything to be tried."""
        results: list[Result] = []
        with self._scope(mirror.thing) as scope:
            problem: str | None = None
            if mirror.image is None:
                try:
                    await self._list(mirror)
                except Exception as exc:  # what is known of it is kept complete all the same
                    failure = describe(exc)
                    if failure.internal:
                        log.error("the list of %s failed", mirror.thing, exc_info=exc)
                    problem = self._failed(results, mirror, None, failure, asked=asked)
            images = await trio.to_thread.run_sync(self._mirrors.images, mirror.thing)
            waiting = deque(images)
            total.expected.update((each.image, 0 if each.complete else each.size) for each in images)

            problems: list[str] = []

            async def work() -> None:
                while waiting:
                    each = waiting.popleft()
                    if not asked and each.problem and trio.current_time() < self._rests.get(each.image, (0, 0))[1]:
                        problems.append(each.problem)  # trying may mean to read and to hash all of it again
                        continue
                    async with self._limit:
                        said = await self._one(mirror, each, timeout, total, results, asked=asked)
                    problems.extend([said] if said else [])

            async with trio.open_nursery() as nursery:
                for _ in range(min(TOGETHER, len(images))):
                    nursery.start_soon(work)
            if problem is None and problems:
                several = f"{len(problems)} of {len(images)} images: " if len(images) > 1 else ""
                problem = several + problems[0]
            await trio.to_thread.run_sync(self._mirrors.looked, mirror.thing, problem)
        if scope.cancelled_caught:
            stopped = UsageError(f"{mirror.thing} is mirrored no longer: that was stopped meanwhile")
            self._failed(results, mirror, None, describe(stopped), asked=asked)
        return results

    async def _list(self, mirror: Mirror) -> None:
        await self._reach(mirror.thing, mirror.addrs)
        entries: list[Entry] = await published(self._transport, mirror.thing)
        await trio.to_thread.run_sync(self._mirrors.keep_list, mirror.thing, entries)

    async def _one(
        self, mirror: Mirror, each: Mirrored, timeout: float, total: _Sum, results: list[Result], *, asked: bool
    ) -> str | None:
        """The top of one image's work: what goes wrong with it must not end the others, and is returned."""
        now = trio.current_time()
        hear = asked or now - self._heard.get(each.image, -HEAR_INTERVAL) >= HEAR_INTERVAL
        wanted = link.Link(each.image, mirror.addrs, each.name)
        problem = None
        try:
            result = await self._keep(wanted, timeout=timeout, hear=hear, report=total.of(each.image))
            results.append({**result, "mirror": mirror.thing, "pinned": True})
            self._rests.pop(each.image, None)
            if hear:
                _note(self._heard, each.image, now)
        except Exception as exc:
            failure = describe(exc)
            if failure.internal:
                log.error("mirroring image %s failed", each.image, exc_info=exc)
            problem = self._failed(results, mirror, each, failure, asked=asked)
            rest = min(2 * self._rests.get(each.image, (self._interval / 2, 0))[0], MAX_RESTS * self._interval)
            _note(self._rests, each.image, (rest, trio.current_time() + rest))
        finally:
            # It may have been let go meanwhile, at the user's word or the publisher's, and been pinned after that.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._mirrors.unpin_unwanted, each.image)
        total.end(each.image)
        if problem != each.problem:
            await trio.to_thread.run_sync(self._mirrors.judged, mirror.thing, each.image, problem)
        return problem

    def _failed(
        self, results: list[Result], mirror: Mirror, each: Mirrored | None, failure: Failure, *, asked: bool
    ) -> str:
        # Whoever has asked is told; of what goes on by itself the log tells, once and not at every look.
        if not asked and failure.message != (mirror.problem if each is None else each.problem):
            log.warning("mirroring %s: %s", mirror.thing if each is None else each.image, failure.message)
        row: Result = {"mirror": mirror.thing}
        if each is not None:
            row["image"] = str(each.image)
        results.append({**row, **failure.to_dict()})
        return failure.message


def _note(notes: dict[CID, V], image: CID, value: V) -> None:
    """Remember something of an image; of too many, the oldest is forgotten."""
    notes.pop(image, None)
    notes[image] = value
    while len(notes) > MAX_NOTED:
        del notes[next(iter(notes))]

"""Where a fetch can put store paths besides a directory: into the machine's Nix store, or into a binary cache.

Paths that are there already are not fetched. The others go in, references first, while they are still on their way: the
last piece of each is held back until the whole was verified and passed the gate, and without it no path becomes valid.

A Nix daemon verifies by itself: no path becomes valid there whose NAR hash is not the one it was announced with. So
where a signature that we trust vouches for that hash, it is enough that the daemon takes the path, and tells the hash.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import trio

from p2pnode.errors import DaemonError, NixError, NixMissing, VerificationFailed
from p2pnode.images.exporter import exporter
from p2pnode.images.paths import ImagePaths, keep_registered
from p2pnode.nix.cache_dir import CacheDir, to_cache
from p2pnode.nix.cli import NixStore, PathInfo, topological_order
from p2pnode.nix.daemon import Piece
from p2pnode.nix.into_store import StoreSession, open_session
from p2pnode.nix.nar_reader import Buffer
from p2pnode.nix.registered import daemon_socket
from p2pnode.nix.signatures import SecretKey, SignedInfo
from p2pnode.nix.storepath import STORE_DIR, StorePath
from p2pnode.store import Store
from p2pnode.swarm.gate import Gate
from protocols.manifest import ImageObject

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Piece)

CONNECTIONS = 2
"""To the Nix daemon, which has a process for each: one path is written while another is hashed and registered."""

READ_BATCH = 4 << 20  # bytes of chunks that are asked for at a time


@dataclass(frozen=True, slots=True)
class IntoStore:
    """Into the Nix store: the machine's, or a chroot store. `add_root`: link that keeps the image's root path.

    `keep_chunks`: keep our own copy too."""

    store_root: Path | None = None
    add_root: Path | None = None
    keep_chunks: bool = False


@dataclass(frozen=True, slots=True)
class ToCache:
    """Into a `file://` binary cache, signed with `keys` in addition to what is known."""

    path: Path
    keys: tuple[SecretKey, ...] = ()


Take = Callable[[Sequence[bytes]], Awaitable[list[Buffer]]]
"""Waits until the chunks with these digests have arrived, and gives their bytes, each chunk checked."""

Find = Callable[[Sequence[bytes]], Awaitable[list[Piece]]]
"""Waits likewise, and gives their bytes as they were written, for somebody who checks the whole."""


@dataclass(frozen=True, slots=True)
class Supply:
    """Where a delivery has its chunks from."""

    take: Take
    find: Find


class Delivery(Protocol):
    """A place that takes store paths, while it is open."""

    @property
    def present(self) -> frozenset[int]:
        """Objects that are there already."""

    @property
    def verifies(self) -> bool:
        """Whether it checks the NAR hash of those objects that are `Gate.signed`, so that nobody else need do it."""

    async def deliver(self, gate: Gate, supply: Supply) -> None:
        """Take all others as they pass the gate."""

    async def finish(self) -> Path:
        """Everything is there. Where that is."""

    def report(self) -> dict[str, Any]:
        """What was done, as the result of `fetch` has it."""


@asynccontextmanager
async def open_delivery(store: Store, paths: ImagePaths, to: IntoStore | ToCache) -> AsyncIterator[Delivery]:
    """Look what is there already, and keep it. Raises DaemonUnavailable, OutputExists, StoreError."""
    if isinstance(to, ToCache):
        cache = await trio.to_thread.run_sync(lambda: CacheDir(to.path, keys=to.keys))
        yield _CacheDelivery(store, paths, cache, await trio.to_thread.run_sync(_in_cache, cache, paths))
        return
    async with AsyncExitStack() as stack:
        another = partial(open_session, socket=daemon_socket(), store_root=to.store_root)
        session = await stack.enter_async_context(another())
        if to.add_root is not None:
            await stack.enter_async_context(session.root(to.add_root, paths.root))
        missing = set(await session.missing(paths.paths))
        delivery = _StoreDelivery(store, paths, session, another, to, frozenset(_numbers(paths, missing)))
        await delivery.adopt_present()
        yield delivery


def _numbers(paths: ImagePaths, missing: set[StorePath]) -> list[int]:
    return [number for number, path in enumerate(paths.paths) if path not in missing]


def _in_cache(cache: CacheDir, paths: ImagePaths) -> frozenset[int]:
    numbers = range(len(paths.paths))
    return frozenset(number for number in numbers if cache.holds(paths.info(number), references=paths.complete))


class _StoreDelivery:
    verifies = True

    def __init__(
        self,
        store: Store,
        paths: ImagePaths,
        session: StoreSession,
        another: Callable[[], AbstractAsyncContextManager[StoreSession]],
        to: IntoStore,
        present: frozenset[int],
    ) -> None:
        self.present = present
        self._store = store
        self._paths = paths
        self._session = session  # the others' temporary roots are not missed: it has those of all paths
        self._another = another
        self._to = to
        self._added: list[int] = []
        self._same: list[int] = []

    def _real(self, number: int) -> Path:
        path = self._paths.paths[number]
        try:
            return NixStore(self._to.store_root).real_path(path)
        except NixMissing:  # a daemon alone will do
            return Path(STORE_DIR, path.base_name)

    async def adopt_present(self) -> None:
        """Serve what is there already, and need no chunk of it: the daemon says which contents it registered."""
        numbers = sorted(self.present)
        found = await self._session.path_info(self._paths.paths[number] for number in numbers)
        objects = self._paths.image.objects
        for number, signed in zip(numbers, found, strict=True):
            if signed.info.nar_hash == objects[number].nar_hash:
                self._same.append(number)
            else:
                log.warning("%s is in the Nix store with other contents than the image's", signed.info.path)
        await self._adopt(self._same, True, None, hashed=False)
        await trio.to_thread.run_sync(keep_registered, self._store, self._paths.image, found)

    async def deliver(self, gate: Gate, supply: Supply) -> None:
        missing = {number: trio.Event() for number in range(len(self._paths.paths)) if number not in self.present}
        one_at_a_time = trio.CapacityLimiter(1)
        turn = trio.Lock()
        async with AsyncExitStack() as stack:
            sessions = [self._session]
            while len(sessions) < min(CONNECTIONS, len(missing)):
                sessions.append(await stack.enter_async_context(self._another()))
            passing = await stack.enter_async_context(aclosing(_passing(self._paths, gate, self.present)))
            nursery = await stack.enter_async_context(trio.open_nursery())

            async def work(session: StoreSession) -> None:
                while True:
                    async with turn:
                        following = await anext(passing, None)
                    if following is None:
                        return
                    number, signed = following
                    for reference in self._paths.image.objects[number].references:
                        if reference != number and reference in missing:
                            await missing[reference].wait()
                    if await self._add(session, number, signed, gate, supply):
                        nursery.start_soon(self._adopt, [number], True, one_at_a_time)  # while others are added
                    missing[number].set()

            for session in sessions:
                nursery.start_soon(work, session)

    async def _add(self, session: StoreSession, number: int, signed: SignedInfo, gate: Gate, supply: Supply) -> bool:
        """Have the daemon make an object valid; False if somebody else did meanwhile, with other contents."""
        left = await gate.signed(number) is not None
        add = partial(session.connection.add_path, signed, check_signatures=not gate.trust.off)
        obj = self._paths.image.objects[number]
        if left:
            nar = _Nar(obj, supply.find)
            try:
                await add(nar.open)
            except (DaemonError, VerificationFailed) as error:
                # What the daemon got was not looked at since it was written: is it the disk's fault, or the image's?
                await self._verify(number, nar.given, supply.take)
                try:
                    await add(_Nar(obj, supply.take).open)
                except DaemonError:
                    raise error from None
        else:
            await add(_Nar(obj, supply.take, partial(gate.passed, number)).open)
        (found,) = await session.path_info([signed.info.path])
        same = found.info.nar_hash == obj.nar_hash
        if same:
            self._added.append(number)
        else:
            log.warning("%s was put into the Nix store by somebody else, with other contents", signed.info.path)
            if left:
                await self._verify(number, len(obj.layout.digests), supply.take)
        return same

    async def _verify(self, number: int, count: int, take: Take) -> None:
        """Check the first `count` chunks of an object, and all of it if that is all. Raises VerificationFailed."""
        check = exporter(self._store, self._paths.image, None)
        digests = self._paths.image.objects[number].layout.digests
        await trio.to_thread.run_sync(check.begin_object, number)
        for digest in digests[:count]:
            for piece in await take([digest]):
                await trio.to_thread.run_sync(check.feed, piece)
        if count == len(digests):
            await trio.to_thread.run_sync(check.end_object)

    async def _adopt(
        self, numbers: Sequence[int], keep_chunks: bool, limiter: trio.CapacityLimiter | None, hashed: bool = True
    ) -> None:
        trees = {number: self._real(number) for number in numbers}
        adopt = partial(self._store.adopt_store_paths, self._paths.image, trees, keep_chunks=keep_chunks, hashed=hashed)
        await trio.to_thread.run_sync(adopt, limiter=limiter)

    async def finish(self) -> Path:
        await self._adopt(self._added, self._to.keep_chunks, None)
        return self._real(int(self._paths.image.attributes.get("root", 0)))

    def report(self) -> dict[str, Any]:
        root = None if self._to.add_root is None else str(self._to.add_root)
        return {"store": {"added": len(self._added), "present": len(self.present), "root": root}}


class _CacheDelivery:
    verifies = False

    def __init__(self, store: Store, paths: ImagePaths, cache: CacheDir, present: frozenset[int]) -> None:
        self.present = present
        self._store = store
        self._paths = paths
        self._cache = cache
        self._added = 0

    async def deliver(self, gate: Gate, supply: Supply) -> None:
        async with aclosing(_passing(self._paths, gate, self.present)) as passing:
            async for number, signed in passing:
                nar = _Nar(self._paths.image.objects[number], supply.take, partial(gate.passed, number))
                report = await to_cache(self._cache, [signed], nar.open)
                self._added += len(report.added)
        await trio.to_thread.run_sync(self._complete, gate)

    def _complete(self, gate: Gate) -> None:
        """Signatures that have become known since a path was put into the cache."""
        for number in self.present:
            best = self._paths.best(number, gate.trust.keys)
            if best is None:
                continue
            signed, verdict = best
            # It did not pass the gate, and where a proof is demanded our own signature is none.
            if not gate.trust.demanded or (verdict.trusted and not verdict.needs_contents):
                self._cache.begin(signed)

    async def finish(self) -> Path:
        return self._cache.path

    def report(self) -> dict[str, Any]:
        return {"cache": {"added": self._added, "present": len(self.present), "path": str(self._cache.path)}}


async def _passing(
    paths: ImagePaths, gate: Gate, present: frozenset[int]
) -> AsyncGenerator[tuple[int, SignedInfo], None]:
    """Objects that are not there yet, references before those who refer to them, as somebody vouches for them."""
    numbers = {path: number for number, path in enumerate(paths.paths)}
    missing = [paths.info(number) for number in range(len(paths.paths)) if number not in present]
    try:
        order = topological_order(missing)
    except NixError as error:
        raise VerificationFailed(f"image {paths.image.id} is not a valid image: {error}") from error
    for info in order:
        number = numbers[info.path]
        yield number, await gate.vouched(number)


class _Nar(Generic[P]):
    """The NAR of one object, from its chunks as they arrive; the last of it when `passed` has returned.

    `given`: chunks that were given out.
    """

    def __init__(
        self,
        obj: ImageObject,
        get: Callable[[Sequence[bytes]], Awaitable[list[P]]],
        passed: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.given = 0
        self._layout = obj.layout
        self._get = get
        self._passed = passed

    async def open(self, _: PathInfo) -> AsyncGenerator[P, None]:
        digests, sizes = self._layout.digests, self._layout.sizes
        while self.given < len(digests):
            end, size = self.given, 0
            while end < len(digests) and size < READ_BATCH:
                size += sizes[end]
                end += 1
            batch = await self._get(digests[self.given : end])
            if end == len(digests) and self._passed is not None:
                await self._passed()
            self.given = end
            for piece in batch:
                yield piece

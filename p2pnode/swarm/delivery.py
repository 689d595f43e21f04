"""Where a fetch can put store paths besides a directory: into the machine's Nix store, or into a binary cache.

Paths that are there already are not fetched. The others go in, references first, while they are still on their way: the
last piece of each is held back until the whole was verified and passed the gate, and without it no path becomes valid.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from p2pnode.errors import NixError, NixMissing, VerificationFailed
from p2pnode.images.paths import ImagePaths, keep_registered
from p2pnode.nix.cache_dir import CacheDir, to_cache
from p2pnode.nix.cli import NixStore, PathInfo, topological_order
from p2pnode.nix.daemon import OpenNar
from p2pnode.nix.into_store import StoreSession, open_session
from p2pnode.nix.nar_reader import Buffer
from p2pnode.nix.registered import daemon_socket
from p2pnode.nix.signatures import SecretKey, SignedInfo
from p2pnode.nix.storepath import STORE_DIR, StorePath
from p2pnode.store import Store
from p2pnode.swarm.gate import Gate

log = logging.getLogger(__name__)

READ_BATCH = 1 << 20  # bytes of chunks per worker-thread call


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


Here = Callable[[Sequence[bytes]], Awaitable[None]]
"""Waits until the chunks with these digests have arrived."""


class Delivery(Protocol):
    """A place that takes store paths, while it is open."""

    @property
    def present(self) -> frozenset[int]:
        """Objects that are there already."""

    async def deliver(self, gate: Gate, here: Here) -> None:
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
        session = await stack.enter_async_context(open_session(socket=daemon_socket(), store_root=to.store_root))
        if to.add_root is not None:
            await stack.enter_async_context(session.root(to.add_root, paths.root))
        missing = set(await session.missing(paths.paths))
        delivery = _StoreDelivery(store, paths, session, to, frozenset(_numbers(paths, missing)))
        await delivery.adopt_present()
        yield delivery


def _numbers(paths: ImagePaths, missing: set[StorePath]) -> list[int]:
    return [number for number, path in enumerate(paths.paths) if path not in missing]


def _in_cache(cache: CacheDir, paths: ImagePaths) -> frozenset[int]:
    numbers = range(len(paths.paths))
    return frozenset(number for number in numbers if cache.holds(paths.info(number), references=paths.complete))


class _StoreDelivery:
    def __init__(
        self, store: Store, paths: ImagePaths, session: StoreSession, to: IntoStore, present: frozenset[int]
    ) -> None:
        self.present = present
        self._store = store
        self._paths = paths
        self._session = session
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

    async def deliver(self, gate: Gate, here: Here) -> None:
        check = not gate.trust.off
        one_at_a_time = trio.CapacityLimiter(1)
        async with trio.open_nursery() as nursery, aclosing(_passing(self._paths, gate, self.present)) as passing:
            async for number, signed in passing:
                nar = _nars(self._store, self._paths, number, gate, here)
                await self._session.connection.add_path(signed, nar, check_signatures=check)
                self._added.append(number)
                nursery.start_soon(self._adopt, [number], True, one_at_a_time)  # while the daemon takes the next

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
    def __init__(self, store: Store, paths: ImagePaths, cache: CacheDir, present: frozenset[int]) -> None:
        self.present = present
        self._store = store
        self._paths = paths
        self._cache = cache
        self._added = 0

    async def deliver(self, gate: Gate, here: Here) -> None:
        async with aclosing(_passing(self._paths, gate, self.present)) as passing:
            async for number, signed in passing:
                nar = _nars(self._store, self._paths, number, gate, here)
                report = await to_cache(self._cache, [signed], nar)
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


def _nars(store: Store, paths: ImagePaths, number: int, gate: Gate, here: Here) -> OpenNar:
    """Reads the chunks of one object as they arrive, each checked again on the way; the last when it has passed."""
    layout = paths.image.objects[number].layout

    async def open_nar(_: PathInfo) -> AsyncGenerator[Buffer, None]:
        at = 0
        while at < len(layout.digests):
            end, size = at, 0
            while end < len(layout.digests) and size < READ_BATCH:
                size += layout.sizes[end]
                end += 1
            await here(layout.digests[at:end])
            if end == len(layout.digests):
                await gate.passed(number)
            yield await trio.to_thread.run_sync(_read, store, layout.digests[at:end])
            at = end

    return open_nar


def _read(store: Store, digests: Sequence[bytes]) -> bytes:
    return b"".join(store.read(digest) for digest in digests)

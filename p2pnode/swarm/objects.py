"""Fetching single objects of images: one path of a closure, for somebody who reads it while it arrives.

All objects wanted of one image share one download, whose chunks come in order. Chunks that nobody wants count as here
there, so they are never asked for. What arrived stays in the image's pack, and the next fetch goes on from there.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field

import trio

from p2pnode.errors import ChunkUnavailable, NetworkTimeout, NodeError, VerificationFailed
from p2pnode.failures import describe, most_telling
from p2pnode.nix.content_address import ContentCheck
from p2pnode.store import Store
from p2pnode.store.landing import Landing
from p2pnode.store.space import check_space
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.holdings import chunk_key
from protocols.cid import CID, CID_SIZE, DIGEST_SIZE
from protocols.exchange.messages import Payload
from protocols.exchange.picker import Order
from protocols.manifest import Image, ImageObject

log = logging.getLogger(__name__)

STALL_SECONDS = 30.0  # without a chunk, after which an object is given up; Nix itself waits 300 s for a byte
NOBODY_SECONDS = 10.0  # the same while nobody is known to have what is missing: somebody may be about to connect
LINGER_SECONDS = 5.0  # a download waits so long for the next object: Nix asks for a closure path by path
RECHECK_SECONDS = 1.0  # chunks may come by another way, such as a fetch of the whole image
VERIFY_BATCH = 4 << 20  # bytes per worker-thread call
MAX_VERIFIED = 1 << 16

Discover = Callable[[CID], Awaitable[int]]


class ObjectRun:
    """One object on its way: its chunks as they land, and in the end whether its NAR hash is right."""

    def __init__(self, image: Image, number: int, check: ContentCheck | None = None) -> None:
        self.check = check
        self.image = image
        self.number = number
        self.object: ImageObject = image.objects[number]
        self.missing: set[bytes] = set()
        self.known = trio.Event()  # what is missing is known
        self.finished = trio.Event()
        self.failure: NodeError | None = None
        self.obtainable = False  # some peer is known for each missing chunk
        self._changed = trio.Event()

    def arrived(self, keys: Sequence[bytes]) -> None:
        self.missing.difference_update(key[CID_SIZE - DIGEST_SIZE :] for key in keys)
        self.changed()

    def changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def end(self, failure: NodeError | None) -> None:
        self.failure = failure
        self.finished.set()
        self.changed()

    async def wait_change(self) -> None:
        await self._changed.wait()

    async def wait_chunk(self, index: int) -> None:
        """Until the chunk is here; for the last one, until the whole is verified. Raises what ended the run."""
        last = index == len(self.object.layout.digests) - 1
        digest = self.object.layout.digests[index]
        await self.known.wait()
        while not self.finished.is_set() and (last or digest in self.missing):
            await self.wait_change()
        if self.failure is not None:
            raise self.failure

    async def wait_promising(self) -> bool:
        """Until all of it is here or known to be had, and it has begun to come; False if it failed."""
        await self.known.wait()
        first = self.object.layout.digests[0] if self.object.layout.digests else None
        while not self.finished.is_set():
            if not self.missing or (self.obtainable and first not in self.missing):
                return True
            await self.wait_change()
        return self.failure is None


@dataclass(eq=False)
class _Shared:
    """The download of one image, and the objects it runs for."""

    image: Image
    runs: set[ObjectRun] = field(default_factory=set)
    asked: set[bytes] = field(default_factory=set)
    changed: trio.Event = field(default_factory=trio.Event)
    failure: NodeError | None = None
    obtainable: bool = False  # every chunk asked for is here or at some peer


class _Sink:
    def __init__(self, landing: Landing) -> None:
        self._landing = landing

    def accept_many(self, blocks: Sequence[tuple[bytes, Payload]]) -> list[bool]:
        return self._landing.accept_many([(key[CID_SIZE - DIGEST_SIZE :], pieces) for key, pieces in blocks])


class ObjectFetcher:
    """Fetches objects of images whose manifests are in the store. Works while `run` does.

    `lock(root)`: held by whoever fetches an image, for there is one download of it at a time. `on_verified(image,
    number)` is called when an object is complete and has its NAR hash.
    """

    def __init__(
        self,
        store: Store,
        exchange: Exchange,
        discover: Discover,
        provide: Callable[[Image], None],
        lock: Callable[[CID], AbstractAsyncContextManager[None]],
        on_verified: Callable[[Image, int], Awaitable[None]],
        *,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._discover = discover
        self._provide = provide
        self._lock = lock
        self._on_verified = on_verified
        self._stall = stall_seconds
        self._runs: dict[tuple[CID, int], ObjectRun] = {}
        self._shared: dict[CID, _Shared] = {}
        self._verified: OrderedDict[tuple[CID, int], None] = OrderedDict()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def fetch(self, image: Image, number: int, check: ContentCheck | None = None) -> ObjectRun:
        """Begin to fetch an object, or join the fetch that is under way. It goes on without its readers.

        `check`: of the path's content address, beside the NAR hash; that of whoever came first counts."""
        assert self._nursery is not None
        key = (image.id, number)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = ObjectRun(image, number, check)
            self._nursery.start_soon(self._fetch, run)
        return run

    def is_verified(self, image: CID, number: int) -> bool:
        """Whether the object's NAR hash was checked since this node started."""
        return (image, number) in self._verified

    async def _fetch(self, run: ObjectRun) -> None:
        """The top of an object's task."""
        failure: NodeError | None = None
        try:
            try:
                await self._complete(run)
            except ExceptionGroup as group:
                error = most_telling(group)
                raise error from error.__cause__
        except NodeError as error:
            log.warning("%s of image %s could not be had: %s", run.object.path, run.image.id, error)
            failure = error
        except Exception as error:
            log.exception("fetching %s failed", run.object.path)
            failure = NodeError(describe(error).message)
        finally:
            del self._runs[run.image.id, run.number]
            run.known.set()
            run.end(failure if failure is not None or run.finished.is_set() else None)

    async def _complete(self, run: ObjectRun) -> None:
        digests = list(dict.fromkeys(run.object.layout.digests))
        held = await trio.to_thread.run_sync(self._store.held, digests)
        run.missing = {digest for digest, here in zip(digests, held, strict=True) if not here}
        run.known.set()
        run.changed()
        if run.missing:
            with self._wanting(run) as shared:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, run, shared)
                    await self._verify(run)
                    nursery.cancel_scope.cancel()
        else:
            await self._verify(run)
        self._verified[run.image.id, run.number] = None
        while len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        await self._mark(run.image)
        run.end(None)
        await self._on_verified(run.image, run.number)

    async def _mark(self, image: Image) -> None:
        if all((image.id, number) in self._verified for number in range(len(image.objects))):
            await trio.to_thread.run_sync(self._store.mark_complete, image.id, None)

    # The download of an image

    @contextmanager
    def _wanting(self, run: ObjectRun) -> Iterator[_Shared]:
        assert self._nursery is not None
        shared = self._shared.get(run.image.id)
        if shared is None:
            shared = self._shared[run.image.id] = _Shared(run.image)
            self._nursery.start_soon(self._download, shared)
        shared.runs.add(run)
        shared.changed.set()
        try:
            yield shared
        finally:
            shared.runs.discard(run)
            shared.changed.set()

    async def _download(self, shared: _Shared) -> None:
        """The top of an image's task."""
        root = shared.image.id
        try:
            try:
                async with self._lock(root):
                    await self._download_locked(shared)
            except ExceptionGroup as group:
                error = most_telling(group)
                raise error from error.__cause__
        except NodeError as error:
            shared.failure = error
        except Exception as error:
            log.exception("fetching from image %s failed", root)
            shared.failure = NodeError(describe(error).message)
        finally:
            if self._shared.get(root) is shared:
                del self._shared[root]
            for run in shared.runs:
                run.changed()

    async def _download_locked(self, shared: _Shared) -> None:
        image = shared.image
        landing = await trio.to_thread.run_sync(self._store.landing, image)
        try:
            self._provide(image)
            await self._exchange.tell(image.id)
            shared.asked = _wanted(shared)
            await self._check_space(landing, shared)
            async with (
                self._exchange.download(
                    image.id.to_bytes(),
                    image.id,
                    [chunk_key(digest) for digest in image.chunks],
                    list(image.chunks.values()),
                    bytes(digest not in shared.asked for digest in image.chunks),
                    _Sink(landing),
                    lambda keys: _arrived(shared, keys),
                    Order.SEQUENTIAL,
                ) as download,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._discover, image.id)
                nursery.start_soon(download.fails)
                await self._follow(shared, landing)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(landing.close)

    async def _follow(self, shared: _Shared, landing: Landing) -> None:
        """Ask for what new objects need, until there have been none for a while."""
        while True:
            shared.changed = trio.Event()
            fresh = _wanted(shared) - shared.asked
            if fresh:
                shared.asked |= fresh
                await self._check_space(landing, shared)
                self._exchange.want([chunk_key(digest) for digest in shared.image.chunks if digest in fresh])
            stats = self._exchange.stats(shared.image.id.to_bytes())
            obtainable = shared.obtainable = not stats.remaining or (stats.peers > 0 and not stats.unavailable)
            for run in shared.runs:
                if obtainable and not run.obtainable:
                    run.obtainable = True
                    run.changed()
            with trio.move_on_after(LINGER_SECONDS if not shared.runs else 0.05 if not obtainable else 1.0) as scope:
                await shared.changed.wait()
            if scope.cancelled_caught and not shared.runs:
                del self._shared[shared.image.id]  # whoever comes now begins anew
                return

    async def _check_space(self, landing: Landing, shared: _Shared) -> None:
        size = sum(shared.image.chunks[digest] for digest in _wanted(shared))
        await trio.to_thread.run_sync(check_space, landing.path.parent, size)

    async def _watch(self, run: ObjectRun, shared: _Shared) -> None:
        """Raises what ends the run: the download's failure, or that nothing comes any more."""
        left, since = len(run.missing), trio.current_time()
        while True:
            with trio.move_on_after(RECHECK_SECONDS):
                await run.wait_change()
            if shared.failure is not None:
                raise shared.failure
            if run.missing and trio.current_time() - since >= RECHECK_SECONDS:
                digests = list(run.missing)
                held = await trio.to_thread.run_sync(self._store.held, digests)
                here = [digest for digest, is_here in zip(digests, held, strict=True) if is_here]
                if here:
                    run.arrived([chunk_key(digest) for digest in here])
            if len(run.missing) != left or not run.missing:
                left, since = len(run.missing), trio.current_time()
                continue
            patience = self._stall if shared.obtainable else min(self._stall, NOBODY_SECONDS)
            if trio.current_time() - since > patience:
                raise NetworkTimeout(f"no chunk came for {patience:.0f} s; {left} are missing")

    async def _verify(self, run: ObjectRun) -> None:
        """Hash the NAR, following its chunks as they land. Raises VerificationFailed, ChunkUnavailable."""
        layout = run.object.layout
        hasher = hashlib.sha256()
        at = 0
        while at < len(layout.digests):
            end, size = at, 0
            while end < len(layout.digests) and size < VERIFY_BATCH and layout.digests[end] not in run.missing:
                size += layout.sizes[end]
                end += 1
            if end == at:
                await run.wait_change()
                continue
            await trio.to_thread.run_sync(self._hash, layout.digests[at:end], hasher.update, run.check)
            at = end
        if layout.size != run.object.size or hasher.digest() != run.object.nar_hash:
            raise VerificationFailed(f"{run.object.path} is complete, but has another NAR hash than its image promises")
        if run.check is not None:
            await trio.to_thread.run_sync(run.check.finish)

    def _hash(self, digests: Sequence[bytes], update: Callable[[bytes], object], check: ContentCheck | None) -> None:
        for digest in digests:
            try:
                data = self._store.read(digest)
            except ChunkUnavailable as error:
                raise ChunkUnavailable(f"{error}; ask again, and it is fetched again") from error
            update(data)
            if check is not None:
                check.feed(data)


def _wanted(shared: _Shared) -> set[bytes]:
    return {digest for run in shared.runs for digest in run.missing}


def _arrived(shared: _Shared, keys: Sequence[bytes]) -> None:
    for run in shared.runs:
        run.arrived(keys)

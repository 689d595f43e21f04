"""NARs by their hash: out of the store, or while they arrive from the swarm or from an upstream cache.

Whether all of a NAR can be had is decided before the first byte. Its last piece waits until the whole was hashed; if
the hash is wrong, or the rest does not come, the connection breaks, and Nix asks again for what it lacks or elsewhere.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import trio
import zstandard

from p2pnode.errors import NodeError, RemoteError, VerificationFailed
from p2pnode.failures import describe
from p2pnode.gateway.http import Broken
from p2pnode.gateway.narinfos import Narinfos, Offer
from p2pnode.gateway.records import PathRecords
from p2pnode.gateway.routes import Span
from p2pnode.gateway.search import SwarmSearch
from p2pnode.gateway.statistics import Origin
from p2pnode.gateway.upstream import Spool, Upstream
from p2pnode.nix.content_address import check_beside_nar_hash
from p2pnode.nix.narinfo import NarInfo
from p2pnode.nix.signatures import Signature
from p2pnode.store import Store
from p2pnode.swarm.objects import ObjectFetcher, ObjectRun
from protocols.cid import CID
from protocols.manifest import Image, ImageObject, encode_layout
from protocols.narinfo import Found

log = logging.getLogger(__name__)

SWARM_SECONDS = 20.0  # until the swarm has to be able to give all of a NAR; Nix waits 300 s for a byte
SWARM_SECONDS_OR_UPSTREAM = 5.0  # the same where an upstream cache stands behind it
MANIFEST_SECONDS = 15.0
READ_BATCH = 1 << 20  # bytes of chunks per worker-thread call ...
READ_MEMORY = 32 << 20  # ... and over all readers, slow ones included: with many of them each gets less at a time
ZSTD_LEVEL = 1  # for a network of a gigabit and more; the link decides, not the disk
MAX_LENGTHS = 256  # NARs whose compressed chunk lengths are kept: 4 bytes a chunk, 16 MB at 64 GiB each
POOR_SECONDS = 60.0  # after a failed fetch an upstream cache is taken at once
MAX_POOR = 1024
MAX_SPOOLS = 16  # downloads from upstream caches at a time; others wait

ImageGetter = Callable[[CID, str | None], Awaitable[Image]]
"""The manifest of an image, from the store or from the swarm, a peer that has it given. Raises NodeError."""


Proved = tuple[Signature, ...] | None
"""As in `Offer`."""


class Source(Protocol):
    """A body: `size` bytes, any span of which can be read. `origin`: where it was when it was opened."""

    @property
    def size(self) -> int: ...

    @property
    def origin(self) -> Origin: ...

    def pieces(self, span: Span) -> AsyncIterator[bytes | memoryview]:
        """Raises Broken if the rest cannot be had."""


class Readers:
    """Those who read bodies at present, and how many bytes each may have in memory at a time."""

    def __init__(self) -> None:
        self._count = 0

    @property
    def batch(self) -> int:
        return min(READ_BATCH, READ_MEMORY // max(1, self._count))

    @contextmanager
    def one_more(self) -> Iterator[None]:
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


class ObjectSource:
    """An object of an image: complete, or on its way (`run`)."""

    def __init__(self, store: Store, obj: ImageObject, readers: Readers, run: ObjectRun | None = None) -> None:
        self.object = obj
        self._store = store
        self._readers = readers
        self._run = run

    @property
    def size(self) -> int:
        return self.object.size

    @property
    def origin(self) -> Origin:
        return Origin.STORE if self._run is None else Origin.SWARM

    async def pieces(self, span: Span) -> AsyncIterator[bytes | memoryview]:
        layout = self.object.layout
        offsets = [0, *accumulate(layout.sizes)]
        index = bisect_right(offsets, span.start) - 1
        with self._readers.one_more():
            while index < len(layout.digests) and offsets[index] < span.stop:
                end = await self._available(index)
                for data in await self._read(layout.digests[index:end]):
                    view = memoryview(data)[max(0, span.start - offsets[index]) : max(0, span.stop - offsets[index])]
                    if view:
                        yield view
                    index += 1

    async def _available(self, index: int) -> int:
        """Up to which chunk, exclusively, can be read in one go from `index` on."""
        layout = self.object.layout
        run = self._run
        if run is not None:
            try:
                await run.wait_chunk(index)
            except NodeError as error:
                raise Broken(f"{self.object.path}: {error}") from error
        end, size = index + 1, layout.sizes[index]
        while end < len(layout.digests) and size + layout.sizes[end] <= self._readers.batch:
            last = end == len(layout.digests) - 1
            if run is not None and not run.finished.is_set() and (last or layout.digests[end] in run.missing):
                break
            size += layout.sizes[end]
            end += 1
        return end

    async def _read(self, digests: Sequence[bytes]) -> list[bytes]:
        try:
            return await trio.to_thread.run_sync(lambda: [self._store.read(digest) for digest in digests])
        except NodeError as error:
            raise Broken(f"{self.object.path}: {error}") from error


class ZstdSource:
    """A complete object with each chunk as a zstd frame of its own: a length known beforehand, and ranges that hold."""

    def __init__(self, store: Store, obj: ImageObject, lengths: Sequence[int], origin: Origin) -> None:
        self.origin = origin
        self._store = store
        self._object = obj
        self._offsets = [0, *accumulate(lengths)]

    @property
    def size(self) -> int:
        return self._offsets[-1]

    async def pieces(self, span: Span) -> AsyncIterator[bytes | memoryview]:
        offsets = self._offsets
        index = bisect_right(offsets, span.start) - 1
        while index < len(offsets) - 1 and offsets[index] < span.stop:
            try:
                frame = await trio.to_thread.run_sync(compressed, self._store, self._object.layout.digests[index])
            except NodeError as error:
                raise Broken(f"{self._object.path}: {error}") from error
            if len(frame) != offsets[index + 1] - offsets[index]:
                raise Broken(f"{self._object.path}: a chunk was compressed to another length than before")
            yield memoryview(frame)[max(0, span.start - offsets[index]) : max(0, span.stop - offsets[index])]
            index += 1


def compressed(store: Store, digest: bytes) -> bytes:
    """A chunk as one zstd frame, the same every time. Blocks; raises ChunkUnavailable."""
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(store.read(digest))


class SpoolSource:
    """A NAR that comes from an upstream cache."""

    origin = Origin.UPSTREAM

    def __init__(self, spool: Spool, readers: Readers) -> None:
        self.spool = spool
        self._readers = readers

    @property
    def size(self) -> int:
        return self.spool.size

    async def pieces(self, span: Span) -> AsyncIterator[bytes | memoryview]:
        at = span.start
        try:
            with self.spool.reader() as read, self._readers.one_more():
                while at < span.stop:
                    await self.spool.wait(at)
                    count = min(self._readers.batch, span.stop - at, self.spool.written - at)
                    data = await trio.to_thread.run_sync(read, at, count)
                    at += len(data)
                    yield data
        except NodeError as error:
            raise Broken(str(error)) from error


class Nars:
    """Finds and opens NARs. `spawn` starts a task that outlives the request."""

    def __init__(
        self,
        store: Store,
        records: PathRecords,
        narinfos: Narinfos,
        search: SwarmSearch,
        objects: ObjectFetcher,
        image: ImageGetter,
        imported: Callable[[Image], Awaitable[None]],
        spool_directory: Path,
        spawn: Callable[..., None],
        *,
        swarm_seconds: float = SWARM_SECONDS,
    ) -> None:
        self._swarm_seconds = swarm_seconds
        self._store = store
        self._records = records
        self._narinfos = narinfos
        self._search = search
        self._objects = objects
        self._image = image
        self._imported = imported
        self._directory = spool_directory
        self._spawn = spawn
        self._readers = Readers()
        self._opening: dict[bytes, trio.Lock] = {}
        self._spools: dict[bytes, Spool] = {}
        self._limit = trio.CapacityLimiter(MAX_SPOOLS)
        self._lengths: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._poor: OrderedDict[bytes, float] = OrderedDict()

    async def size(self, nar_hash: bytes) -> int | None:
        """Bytes of a NAR that is here or was offered lately, without fetching anything."""
        for id, number, _ in await trio.to_thread.run_sync(self._records.places, nar_hash):
            image = await trio.to_thread.run_sync(self._store.image, id)
            if image is not None:
                return image.objects[number].size
        offer = self._narinfos.offer(nar_hash)
        return None if offer is None else offer.signed.info.nar_size

    async def dag_root(self, nar_hash: bytes) -> CID | None:
        """The root of the DAG of a NAR that is here in whole; from then on peers can have its blocks from us."""
        return await trio.to_thread.run_sync(self._dag_root, nar_hash)

    def _dag_root(self, nar_hash: bytes) -> CID | None:
        here = self._here(nar_hash)
        if here is None:
            return None
        image, obj = here
        encoded = encode_layout(obj.layout)
        if encoded.blocks and self._store.block(encoded.root) is None:  # an image inlines layouts of few chunks
            self._store.put_blocks(encoded.blocks, beside=image)
        return encoded.root

    async def open(self, nar_hash: bytes) -> Source | None:
        """The NAR with this SHA-256; None if it cannot be had in whole."""
        local = await self._local(nar_hash)
        if local is not None:
            return local
        lock = self._opening.setdefault(nar_hash, trio.Lock())
        try:
            async with lock:  # requests for one path share one search and one fetch
                return await self._open(nar_hash)
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._opening.pop(nar_hash, None)

    async def open_zstd(self, nar_hash: bytes) -> Source | None:
        """The same, compressed; it has to be here in whole before its length is known."""
        source = await self.open(nar_hash)
        origin = Origin.STORE if source is None else source.origin
        if isinstance(source, SpoolSource):
            await source.spool.imported.wait()
            source = await self._local(nar_hash)
        if not isinstance(source, ObjectSource):
            return None
        async for _ in source.pieces(Span(source.size - 1, source.size)):
            pass
        lengths = self._lengths.get(nar_hash)
        if lengths is None:
            digests = source.object.layout.digests
            try:
                lengths = tuple(
                    await trio.to_thread.run_sync(lambda: [len(compressed(self._store, each)) for each in digests])
                )
            except NodeError as error:
                raise Broken(f"{source.object.path}: {error}") from error
            self._lengths[nar_hash] = lengths
            while len(self._lengths) > MAX_LENGTHS:
                self._lengths.popitem(last=False)
        return ZstdSource(self._store, source.object, lengths, origin)

    async def _local(self, nar_hash: bytes) -> Source | None:
        """From an image that was verified."""
        return await trio.to_thread.run_sync(self._local_blocking, nar_hash)

    def _local_blocking(self, nar_hash: bytes) -> ObjectSource | None:
        here = self._here(nar_hash)
        return None if here is None else ObjectSource(self._store, here[1], self._readers)

    def _here(self, nar_hash: bytes) -> tuple[CID, ImageObject] | None:
        """An image and an object of it that are this NAR, verified and all here."""
        for id, number, complete in self._records.places(nar_hash):
            image = self._store.image(id)
            if image is None or image.objects[number].nar_hash != nar_hash:
                continue
            obj = image.objects[number]
            verified = complete or self._objects.is_verified(id, number)
            if verified and all(self._store.held(obj.layout.digests)):
                return id, obj
        return None

    async def _open(self, nar_hash: bytes) -> Source | None:
        local = await self._local(nar_hash)
        if local is not None:
            return local
        spool = self._spools.get(nar_hash)
        if spool is not None and spool.failure is None:
            if not spool.finished.is_set():
                return SpoolSource(spool, self._readers)
            await spool.imported.wait()
            return await self._local(nar_hash)
        offer = self._narinfos.offer(nar_hash)
        if self._poor.get(nar_hash, 0.0) > trio.current_time():
            source = await self._from_upstream(nar_hash, offer)
            if source is not None:
                return source
        has_upstream = offer is not None and offer.upstream is not None
        patience = min(self._swarm_seconds, SWARM_SECONDS_OR_UPSTREAM) if has_upstream else self._swarm_seconds
        with trio.move_on_after(patience):
            source = await self._from_swarm(nar_hash, offer)
            if source is not None:
                return source
        self._poor.pop(nar_hash, None)
        self._poor[nar_hash] = trio.current_time() + POOR_SECONDS
        while len(self._poor) > MAX_POOR:
            self._poor.popitem(last=False)
        return await self._from_upstream(nar_hash, offer)

    # The swarm

    async def _from_swarm(self, nar_hash: bytes, offer: Offer | None) -> Source | None:
        tried: set[tuple[CID, int]] = set()
        for id, number, _ in await trio.to_thread.run_sync(self._records.places, nar_hash):
            tried.add((id, number))
            source = await self._from_image(nar_hash, id, number, None, offer)
            if source is not None:
                return source
        if offer is not None and offer.image is not None and (offer.image, offer.number) not in tried:
            tried.add((offer.image, offer.number))
            source = await self._from_image(nar_hash, offer.image, offer.number, offer.peer, offer)
            if source is not None:
                return source
        found: list[tuple[str, Found]] = []

        def on_found(peer: str, answer: Found) -> bool:
            if (answer.image, answer.number) not in tried:
                found.append((peer, answer))
            return len(found) >= 3

        await self._search.find(nar_hash, on_found)
        for peer, answer in found:
            if (answer.image, answer.number) in tried:
                continue
            tried.add((answer.image, answer.number))
            source = await self._from_image(nar_hash, answer.image, answer.number, peer, offer)
            if source is not None:
                return source
        return None

    async def _from_image(
        self, nar_hash: bytes, id: CID, number: int, peer: str | None, offer: Offer | None
    ) -> Source | None:
        try:
            image = await self._image(id, peer)
        except NodeError as error:
            log.warning("the image that has NAR %s cannot be had: %s", nar_hash.hex()[:16], describe(error).message)
            return None
        if number >= len(image.objects) or image.objects[number].nar_hash != nar_hash:
            log.warning("peer %s says that image %s has a NAR which it has not", peer, id)
            return None
        if offer is not None and image.objects[number].size != offer.signed.info.nar_size:
            log.warning("image %s has a NAR of another size than what is signed for %s", id, offer.signed.info.path)
            return None  # terabytes might come before its hash turns out wrong
        await trio.to_thread.run_sync(self._learn, image, offer)
        check = None if offer is None else check_beside_nar_hash(offer.signed.info)
        run = self._objects.fetch(image, number, check)
        return ObjectSource(self._store, run.object, self._readers, run) if await run.wait_promising() else None

    def _learn(self, image: Image, offer: Offer | None) -> None:
        self._records.learn(image)
        if offer is not None:
            self._records.keep(offer.signed, proved=offer.proved)

    # Upstream caches

    async def _from_upstream(self, nar_hash: bytes, offer: Offer | None) -> Source | None:
        if offer is None or offer.upstream is None:
            signed = None if offer is None else offer.signed
            if signed is None:
                records = await trio.to_thread.run_sync(self._records.of_nar, nar_hash)
                signed = records[0].signed if records else None
            offer = None if signed is None else await self._narinfos.upstream_of(signed)
        if offer is None or offer.upstream is None or offer.narinfo is None:
            return None
        spool = self._spools[nar_hash] = Spool(offer.narinfo, self._directory)
        self._spawn(self._download, nar_hash, spool, offer.upstream, offer.proved)
        try:
            await spool.wait(0)
        except NodeError:
            return None
        return SpoolSource(spool, self._readers)

    async def _download(self, nar_hash: bytes, spool: Spool, upstream: Upstream, proved: Proved) -> None:
        """The top of a download's task."""
        failure: NodeError | None = RemoteError("the download was stopped")
        try:
            async with self._limit:
                with spool:
                    await spool.fill(upstream.cache)
                    spool.end(None)
                    image = await trio.to_thread.run_sync(spool.into_store, self._store)
                    await trio.to_thread.run_sync(self._keep, image, spool.narinfo, proved)
            await self._imported(image)
            failure = None
        except NodeError as error:
            log.warning("upstream %s: %s", upstream.cache.url, error)
            if isinstance(error, RemoteError | VerificationFailed):
                upstream.failed(describe(error).message)
            failure = error
        except Exception as error:
            log.exception("a download from %s failed", upstream.cache.url)
            failure = NodeError(describe(error).message)
        finally:
            if not spool.finished.is_set():
                spool.end(failure)
            self._spools.pop(nar_hash, None)
            spool.imported.set()

    def _keep(self, image: Image, narinfo: NarInfo, proved: Proved) -> None:
        self._records.learn(image)
        self._records.keep(narinfo.signed, proved=proved)

"""Fetching one image: its manifest, its chunks, its verification and its export, overlapped.

    link -> manifest blocks -> what is missing -> chunks, from whoever has them -> objects hashed as they complete
    -> exported under the final name.

Whatever stops it, the chunks that arrived stay in the store and the next fetch goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from p2pnode.errors import (
    ChunkUnavailable,
    NetworkTimeout,
    NotFound,
    PeerUnreachable,
    StoreError,
    UsageError,
    VerificationFailed,
)
from p2pnode.failures import most_telling
from p2pnode.images.exporter import exporter
from p2pnode.images.output import check_output
from p2pnode.images.paths import STORE_KINDS
from p2pnode.nix.daemon import Piece
from p2pnode.nix.file_range import FileRange
from p2pnode.nix.trust_policy import NO_TRUST, Trust
from p2pnode.progress import Progress, Report, silent
from p2pnode.store import Store
from p2pnode.store.landing import Landing
from p2pnode.store.records import Origin, Pin
from p2pnode.store.space import check_space
from p2pnode.swarm.delivery import Delivery, IntoStore, Supply, ToCache, open_delivery
from p2pnode.swarm.download import Download
from p2pnode.swarm.exchange import Exchange, manifest_id
from p2pnode.swarm.gate import PATIENCE, POLL, Gate
from p2pnode.swarm.holdings import chunk_key
from p2pnode.swarm.verifying import ChunkSink, Follower, Recent
from p2pnode.threads import in_thread
from protocols.cid import CID, CID_SIZE, DIGEST_SIZE
from protocols.errors import ManifestError
from protocols.exchange.messages import Buffer, Payload
from protocols.exchange.state import DownloadStats
from protocols.manifest import MAX_BLOCK, Image, ImageAssembler

log = logging.getLogger(__name__)

CATCH_UP = 16  # chunks that the verifier feeds in one worker-thread call
REPORT_INTERVAL = 0.25
SETTLE = 2.0  # after everybody known has said no: somebody may be about to connect
LIARS_TIMEOUT = 10.0  # when everybody who offered the image was banned: somebody honest may still be found
RELOADS = 3  # times a chunk may be lost between arriving and being verified, before the disk is blamed

Discover = Callable[[CID], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """`timeout`: seconds without a byte of progress after which to give up. `to`: where store paths go, not to `out`.
    `trust`: what they must be proved by. `mirror`: pin it, and do not end before all that have it have told what they
    know beside it."""

    out: Path | None = None
    force: bool = False
    keep_chunks: bool = False
    name: str | None = None
    timeout: float = 60.0
    to: IntoStore | ToCache | None = None
    trust: Trust = NO_TRUST
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class Fetched:
    """The outcome. Byte counts are of blocks received for this fetch; `sources` by peer id, `relayed` what of it came
    through relays, `direct_after` the seconds after which a direct connection took over from one; `delivered` is what a
    `Delivery` reports."""

    image: Image
    path: Path | None
    received_bytes: int
    duplicate_bytes: int
    sources: dict[str, int]
    relayed: dict[str, int]
    direct_after: dict[str, float]
    banned: dict[str, str]
    seconds: float
    delivered: dict[str, Any]

    @classmethod
    def nothing(cls, image: Image) -> Fetched:
        """Of an image that was here."""
        return cls(image, None, 0, 0, {}, {}, {}, {}, 0.0, {})


@dataclass
class _Tally:
    """What was received, over the manifest's and the chunks' downloads."""

    began: float = field(default_factory=trio.current_time)
    sources: dict[str, int] = field(default_factory=dict)
    relayed: dict[str, int] = field(default_factory=dict)
    direct_after: dict[str, float] = field(default_factory=dict)
    duplicates: int = 0
    banned: dict[str, str] = field(default_factory=dict)

    def add(self, stats: DownloadStats, download: Download) -> None:
        for peer, size in download.relayed.items():
            self.relayed[peer] = self.relayed.get(peer, 0) + size
        for peer, at in download.moved.items():
            self.direct_after.setdefault(peer, at - self.began)
        for peer, size in stats.received.items():
            self.sources[peer] = self.sources.get(peer, 0) + size
        self.duplicates += stats.duplicate_bytes
        self.banned |= stats.banned


class _ManifestSink:
    """Keeps manifest blocks in memory until the manifest is whole: a bad one must not reach the catalog."""

    def __init__(self) -> None:
        self.blocks: dict[CID, bytes] = {}

    def accept_many(self, blocks: Sequence[tuple[bytes, Payload]]) -> list[bool]:
        return [self._accept(CID.from_bytes(key), b"".join(pieces)) for key, pieces in blocks]

    def _accept(self, cid: CID, data: bytes) -> bool:
        if len(data) > MAX_BLOCK or not cid.matches(data):
            return False
        self.blocks[cid] = data
        return True


class _Arrivals:
    """Which chunks are here, and which objects are therefore whole, for the one task that verifies them."""

    def __init__(self, image: Image, here: bytearray) -> None:
        self._here = dict(zip(image.chunks, here, strict=True))
        self._users: dict[bytes, list[int]] = {}
        self._missing = [0] * len(image.objects)
        for number, obj in enumerate(image.objects):
            for digest in set(obj.layout.digests):
                if not self._here[digest]:
                    self._users.setdefault(digest, []).append(number)
                    self._missing[number] += 1
        self._whole = deque(number for number, missing in enumerate(self._missing) if not missing)
        self._event = trio.Event()

    def arrived(self, keys: list[bytes]) -> None:
        for key in keys:
            digest = key[CID_SIZE - DIGEST_SIZE :]
            self._here[digest] = 1
            for number in self._users.pop(digest, ()):
                self._missing[number] -= 1
                if not self._missing[number]:
                    self._whole.append(number)
        self._event.set()
        self._event = trio.Event()

    def lost(self, digest: bytes) -> None:
        """A chunk has to come again. Its object is being verified, so it needs no counting."""
        self._here[digest] = 0

    def ready(self, digests: Sequence[bytes]) -> int:
        """How many of the first `digests` are here."""
        return next((at for at, digest in enumerate(digests) if not self._here[digest]), len(digests))

    async def wait_for(self, digests: Sequence[bytes]) -> None:
        """Until all of `digests` are here."""
        while self.ready(digests) < len(digests):
            await self.wait()

    def take_whole(self) -> int | None:
        """An object whose chunks are all here, each once."""
        return self._whole.popleft() if self._whole else None

    async def wait(self) -> None:
        """Until something arrives."""
        await self._event.wait()


@dataclass(frozen=True, slots=True)
class _Inflow:
    """Where the chunks of a fetch are while it runs."""

    arrivals: _Arrivals
    landing: Landing
    recent: Recent
    sink: ChunkSink


class Fetcher:
    """Fetches images through an `Exchange` into a `Store`.

    `discover(root)` looks for providers of an image, joins them, and returns how many it knows of.
    """

    def __init__(self, store: Store, exchange: Exchange, discover: Discover, provide: Callable[[Image], None]) -> None:
        self._store = store
        self._exchange = exchange
        self._discover = discover
        self._provide = provide

    async def fetch(self, root: CID, options: FetchOptions, report: Report) -> Fetched:
        """Fetch, verify and export. Raises NotFound, RemoteError, StoreError, TrustError, LocalError."""
        try:
            return await self._fetch(root, options, report)
        except ExceptionGroup as group:
            error = most_telling(group)
            raise error from error.__cause__

    async def _fetch(self, root: CID, options: FetchOptions, report: Report) -> Fetched:
        began = time.monotonic()
        if options.out is not None:  # before anything of the image is asked for or kept
            await trio.to_thread.run_sync(partial(check_output, options.out, force=options.force))
        tally = _Tally()
        image = await trio.to_thread.run_sync(self._store.image, root)
        if image is None:
            image = await self._manifest(root, options, tally, report)
        if options.mirror:  # from now on, so that a mirror that is interrupted finds again what it has
            await trio.to_thread.run_sync(self._store.pin, root, Pin.MIRROR)
        if options.to is not None and image.kind not in STORE_KINDS:
            raise UsageError(f"image {root} is of kind {image.kind}, which has no store paths; fetch it with -o OUT")
        export = exporter(self._store, image, options.out, force=options.force, keep_chunks=options.keep_chunks)
        searched = trio.Event()
        settled = partial(self._settled, root, searched)
        make_gate = partial(Gate, self._store, image, export, options.trust, settled, self._exchange.records.heard)
        gate = await trio.to_thread.run_sync(make_gate)
        await trio.to_thread.run_sync(gate.check)
        delivered: dict[str, Any] = {}
        if options.to is None or gate.paths is None:
            path = await self._content(image, gate, None, options, tally, searched, report)
        else:
            async with open_delivery(self._store, gate.paths, options.to) as delivery:
                path = await self._content(image, gate, delivery, options, tally, searched, report)
                delivered = delivery.report()
        return Fetched(
            image,
            path,
            sum(tally.sources.values()) + tally.duplicates,
            tally.duplicates,
            tally.sources,
            tally.relayed,
            tally.direct_after,
            tally.banned,
            time.monotonic() - began,
            delivered,
        )

    def _settled(self, root: CID, searched: trio.Event) -> bool:
        """Whether all who have the image have told what they know of its store paths."""
        answers = self._exchange.answers(root)
        knowing = {peer for peer, known in answers.items() if known}
        answered = answers.keys() >= set(self._exchange.sessions)
        return searched.is_set() and answered and knowing <= self._exchange.records.told_all(root)

    async def _told_all(self, image: Image, searched: trio.Event) -> None:
        """Until all who have an image have told what they know of its store paths, or that took too long."""
        if image.kind not in STORE_KINDS:
            return
        with trio.move_on_after(PATIENCE):
            while not self._settled(image.id, searched):
                with trio.move_on_after(POLL):
                    await self._exchange.records.heard()

    # What is here already

    async def whole(self, root: CID) -> Image | None:
        """The manifest of an image that was verified and is still here as far as metadata tell; else None, and what is
        gone is known as missing. Raises StoreError."""
        image = await trio.to_thread.run_sync(self._store.image, root)
        if image is None or not await trio.to_thread.run_sync(self._store.look_again, image.chunks):
            return None
        record = await trio.to_thread.run_sync(self._store.record, root)
        return image if record is not None and record.complete else None

    async def hear(self, image: Image) -> None:
        """Ask everybody who has an image that is here for what they know beside it. Not while it is being fetched."""
        keys = [chunk_key(digest) for digest in image.chunks]
        sizes = list(image.chunks.values())
        searched = trio.Event()
        async with (
            self._exchange.download(
                image.id.to_bytes(), image.id, keys, sizes, b"\1" * len(keys), _ManifestSink(), lambda _: None
            ),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._search, image.id, searched)
            await self._told_all(image, searched)
            nursery.cancel_scope.cancel()

    # The manifest

    async def manifest(self, root: CID, *, timeout: float) -> Image:
        """An image's manifest, from the store or else from the swarm. Not while the same image is being fetched.

        Raises NotFound, RemoteError, StoreError, VerificationFailed.
        """
        image = await trio.to_thread.run_sync(self._store.image, root)
        if image is not None:
            return image
        try:
            return await self._manifest(root, FetchOptions(timeout=timeout), _Tally(), silent)
        except ExceptionGroup as group:
            error = most_telling(group)
            raise error from error.__cause__

    async def _manifest(self, root: CID, options: FetchOptions, tally: _Tally, report: Report) -> Image:
        report(Progress("finding", note="looking for the image"))
        assembler = ImageAssembler(root)
        sink = _ManifestSink()
        async with trio.open_nursery() as nursery:
            searched = trio.Event()
            nursery.start_soon(self._search, root, searched)
            while assembler.missing:
                keys = [cid.to_bytes() for cid in sorted(assembler.missing)]
                sizes = [64 << 10] * len(keys)
                async with self._exchange.download(
                    manifest_id(root), root, keys, sizes, bytes(len(keys)), sink, lambda _: None
                ) as download:
                    await self._manifest_blocks(root, download.wait, searched, options.timeout)
                    tally.add(self._exchange.stats(manifest_id(root)), download)
                try:
                    for cid in sorted(assembler.missing & sink.blocks.keys()):
                        assembler.add(cid, sink.blocks[cid])
                except ManifestError as exc:
                    raise VerificationFailed(f"the image {root} is not a valid image: {exc}") from exc
            nursery.cancel_scope.cancel()
        try:
            image = await trio.to_thread.run_sync(assembler.image)
        except ManifestError as exc:
            raise VerificationFailed(f"the image {root} is not a valid image: {exc}") from exc
        await trio.to_thread.run_sync(self._keep_manifest, image, sink.blocks, options)
        return image

    def _keep_manifest(self, image: Image, blocks: dict[CID, bytes], options: FetchOptions) -> None:
        self._store.put_blocks(blocks)
        name = options.name or (options.out.name if options.out is not None else str(image.id)[:16])
        self._store.add_image(image, name=name, origin=Origin.FETCHED, complete=False, path=None)

    async def _search(self, root: CID, searched: trio.Event) -> None:
        try:
            await self._discover(root)
        finally:
            searched.set()

    async def _manifest_blocks(
        self, root: CID, wait: Callable[[], Awaitable[None]], searched: trio.Event, timeout: float
    ) -> None:
        """Wait for the blocks; give up when everybody who can be reached has said that they do not know the image."""
        finished = False

        async def watch() -> None:
            nonlocal finished
            await wait()
            finished = True
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            with trio.move_on_after(timeout):
                await searched.wait()
                again = True
                while True:
                    with trio.move_on_after(SETTLE) as quiet:
                        await self._exchange.next_answer()
                    answers = self._exchange.answers(root)
                    if (
                        quiet.cancelled_caught
                        and not any(answers.values())
                        and len(answers) >= len(self._exchange.sessions)
                    ):
                        if not again:
                            break
                        again = False
                        await self._discover(root)  # the first search may have come before the first connection
            nursery.cancel_scope.cancel()
        if finished:
            return
        answers = self._exchange.answers(root)
        banned = self._exchange.stats(manifest_id(root)).banned
        if banned and not any(answers.values()):
            raise VerificationFailed(_liars(root, banned))
        if any(answers.values()):
            raise NetworkTimeout(f"the peers that have image {root} sent nothing for {timeout:.0f} s")
        if answers:
            raise NotFound(f"none of the {len(answers)} peers that could be reached knows image {root}")
        raise PeerUnreachable(f"no peer could be reached to ask for image {root}; give one with --peer or --bootstrap")

    # The content

    async def _content(
        self,
        image: Image,
        gate: Gate,
        delivery: Delivery | None,
        options: FetchOptions,
        tally: _Tally,
        searched: trio.Event,
        report: Report,
    ) -> Path | None:
        present = frozenset[int]() if delivery is None else delivery.present
        digests = list(image.chunks)
        landing = await trio.to_thread.run_sync(self._store.landing, image, options.out)
        try:
            await in_thread(lambda cancelled, _: landing.copy_local(digests, cancelled), report)
            here = await trio.to_thread.run_sync(self._store.held, digests)
            if present:
                needed = {d for n, obj in enumerate(image.objects) if n not in present for d in obj.layout.digests}
                here = bytearray(h or digest not in needed for h, digest in zip(here, digests, strict=True))
            missing = sum(size for size, h in zip(image.chunks.values(), here, strict=True) if not h)
            await trio.to_thread.run_sync(check_space, landing.path.parent, missing)
            self._provide(image)
            await self._exchange.tell(image.id)
            recent = Recent(landing.offset)
            inflow = _Inflow(_Arrivals(image, here), landing, recent, ChunkSink(image, landing, recent))
            id = image.id.to_bytes()
            async with (
                self._exchange.download(
                    id,
                    image.id,
                    [chunk_key(digest) for digest in digests],
                    list(image.chunks.values()),
                    bytes(here),
                    inflow.sink,
                    inflow.arrivals.arrived,
                ) as download,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._watch, image, options.timeout, report)
                if missing or gate.trust.demanded or options.mirror:
                    nursery.start_soon(self._search, image.id, searched)
                nursery.start_soon(download.fails)
                delivered = trio.Event()
                supply = Supply(partial(self._take, inflow), partial(self._find, inflow))
                if delivery is not None:
                    nursery.start_soon(self._deliver, delivery, gate, supply, delivered)
                await self._verify(image, gate, delivery, inflow)
                if delivery is not None:
                    await delivered.wait()
                if options.mirror:
                    await self._told_all(image, searched)
                tally.add(self._exchange.stats(id), download)
                nursery.cancel_scope.cancel()
            report(Progress("exporting", image.size, image.size))
            if options.out is None and delivery is None:  # nobody reads it again before it counts as complete
                await trio.to_thread.run_sync(landing.sync)
            await trio.to_thread.run_sync(landing.close)
            path = await (delivery.finish() if delivery is not None else trio.to_thread.run_sync(gate.finish))
            if not present:  # of what was there already nothing was hashed: the gateway does it when it is asked
                await trio.to_thread.run_sync(self._store.mark_complete, image.id, None if path is None else str(path))
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(landing.close)
                await trio.to_thread.run_sync(gate.abort)
            raise
        return path

    async def _deliver(self, delivery: Delivery, gate: Gate, supply: Supply, delivered: trio.Event) -> None:
        await delivery.deliver(gate, supply)
        delivered.set()

    async def _verify(self, image: Image, gate: Gate, delivery: Delivery | None, inflow: _Inflow) -> None:
        """Hash, judge and export objects as their chunks land: first those that are complete."""
        waiting = set(range(len(image.objects))) - (frozenset() if delivery is None else delivery.present)
        while waiting:
            index = inflow.arrivals.take_whole()
            if index is None and len(waiting) == 1:
                (index,) = waiting  # nothing better to do than to follow this one as it grows
            if index is None:
                await inflow.arrivals.wait()
                continue
            if index not in waiting:
                continue  # followed above while it became whole
            waiting.remove(index)
            if delivery is not None and delivery.verifies and await gate.signed(index) is not None:
                continue
            await trio.to_thread.run_sync(gate.begin_object, index)
            digests = image.objects[index].layout.digests
            inflow.sink.follower = follower = Follower(gate, digests, inflow.recent)
            try:
                await self._follow(follower, digests, inflow)
            finally:
                inflow.sink.follower = None
                if follower.next is not None:  # cut off: somebody may be feeding
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(follower.stop)
            await trio.to_thread.run_sync(gate.end_object)
            await gate.judge(index)

    async def _follow(self, follower: Follower, digests: Sequence[bytes], inflow: _Inflow) -> None:
        """Until the object was fed: what comes in its order is fed by those who bring it, the rest here."""
        reloads: dict[bytes, int] = {}
        while follower.at < len(digests):
            follower.check()
            at = follower.at
            ready = inflow.arrivals.ready(digests[at : at + CATCH_UP])
            if not ready:
                await inflow.arrivals.wait()
                continue
            try:
                await trio.to_thread.run_sync(follower.catch_up, at + ready, partial(self._read_one, inflow.landing))
            except ChunkUnavailable as exc:
                log.warning("fetching again: %s", exc)
                await self._reload(digests[follower.at], inflow.arrivals, reloads)
        follower.check()

    async def _take(self, inflow: _Inflow, digests: Sequence[bytes]) -> list[Buffer]:
        """Chunks, when all of them are here. What turns out to be damaged on disk is fetched again."""
        taken: list[Payload] = []
        reloads: dict[bytes, int] = {}
        while len(taken) < len(digests):
            await inflow.arrivals.wait_for(digests[len(taken) :])
            taken += inflow.recent.take(digests[len(taken) :])
            if len(taken) == len(digests):
                break
            read, lost = await trio.to_thread.run_sync(self._read, digests[len(taken) :], inflow)
            taken += read
            if lost is None:
                continue
            await self._reload(lost, inflow.arrivals, reloads)
        return [piece for pieces in taken for piece in pieces]

    async def _reload(self, lost: bytes, arrivals: _Arrivals, reloads: dict[bytes, int]) -> None:
        """Have a chunk fetched again whose bytes on disk are no longer what they were."""
        reloads[lost] = reloads.get(lost, 0) + 1
        if reloads[lost] > RELOADS:
            raise StoreError(f"chunk {lost.hex()} was damaged on disk {RELOADS} times after it had been verified")
        arrivals.lost(lost)
        if await trio.to_thread.run_sync(self._store.has, lost):
            arrivals.arrived([chunk_key(lost)])  # it came again before we knew
        else:  # its row may never have been committed, and then nobody has told the exchange
            self._exchange.want([chunk_key(lost)])

    async def _find(self, inflow: _Inflow, digests: Sequence[bytes]) -> list[Piece]:
        """Where chunks were written, when all of them are here; the bytes of those that lie elsewhere."""
        await inflow.arrivals.wait_for(digests)
        found: list[Piece] = []
        for digest in digests:
            place, last = inflow.landing.place(digest), found[-1] if found else None
            if place is None:
                found += await self._take(inflow, [digest])
                continue
            inflow.recent.take([digest])  # makes room
            if isinstance(last, FileRange) and last.offset + last.length == place.offset:
                found[-1] = FileRange(place.fd, last.offset, last.length + place.length)
            else:
                found.append(place)
        return found

    def _read(self, digests: Sequence[bytes], inflow: _Inflow) -> tuple[list[Payload], bytes | None]:
        """As many of the first `digests` as can be read, and the one that cannot."""
        found: list[Payload] = []
        for digest in digests:
            try:
                found += inflow.recent.take([digest]) or [self._read_one(inflow.landing, digest)]
            except ChunkUnavailable as exc:
                log.warning("fetching again: %s", exc)
                return found, digest
        return found, None

    def _read_one(self, landing: Landing, digest: bytes) -> Payload:
        return (landing.read(digest) or self._store.read(digest),)

    async def _watch(self, image: Image, timeout: float, report: Report) -> None:
        """Report progress; end the fetch when nothing has come for `timeout` seconds."""
        id = image.id.to_bytes()
        last, since = -1, trio.current_time()
        while True:
            stats = self._exchange.stats(id)
            note = ""
            if stats.remaining != last:
                last, since = stats.remaining, trio.current_time()
            elif stats.remaining and trio.current_time() - since > 2:
                note = _waiting_for(stats)
            only_liars = stats.banned and not stats.peers
            patience = min(timeout, LIARS_TIMEOUT) if only_liars else timeout
            if stats.remaining and trio.current_time() - since > patience:
                if only_liars:
                    raise VerificationFailed(_liars(image.id, stats.banned))
                raise NetworkTimeout(
                    f"nothing came for {timeout:.0f} s: {_waiting_for(stats)}; run the same fetch again to go on"
                )
            total = image.chunk_bytes
            phase = "fetching" if stats.remaining else "verifying"
            report(Progress(phase, total - stats.remaining_bytes, total, stats.peers, note))
            await trio.sleep(REPORT_INTERVAL)


def _liars(root: CID, banned: Collection[str]) -> str:
    return (
        f"all peers that offered image {root} sent what does not match its hashes, and are banned: "
        f"{', '.join(sorted(banned)[:5])}; nothing of it was kept, fetch it from another peer"
    )


def _waiting_for(stats: DownloadStats) -> str:
    if not stats.peers:
        return f"waiting for a peer that has the image; {stats.remaining} chunks are missing"
    if stats.unavailable:
        return f"waiting for a peer that has {stats.unavailable} of the missing chunks"
    return f"waiting for {stats.in_flight} chunks from {stats.peers} peers"

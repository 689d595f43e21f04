"""The gateway: a Nix binary cache over HTTP, for the Nix of this machine or of a network that trusts it.

    substituters = http://127.0.0.1:5080

Whatever goes wrong behind a narinfo is 404: Nix then asks elsewhere, while a 5xx costs it 4.5 s and fails the build.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from p2pnode.errors import NodeError, RemoteError
from p2pnode.failures import one_line
from p2pnode.gateway.http import Broken, Request, Response, Server
from p2pnode.gateway.narinfos import Narinfos
from p2pnode.gateway.nars import MANIFEST_SECONDS, SWARM_SECONDS, Nars, Source
from p2pnode.gateway.peers import NarinfoClient
from p2pnode.gateway.records import PathRecords, narinfo_of
from p2pnode.gateway.routes import Kind, Route, Span, Unsatisfiable, matches, nar_url, route, span
from p2pnode.gateway.search import SwarmSearch
from p2pnode.gateway.statistics import Counts, GatewayStatistics
from p2pnode.gateway.upstream import open_upstreams
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.transport import Router, Transport
from p2pnode.nix.storepath import STORE_DIR
from p2pnode.nix.trust_policy import Trust
from p2pnode.store import Store
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.fetcher import Fetcher
from p2pnode.swarm.holdings import chunk_key
from p2pnode.swarm.objects import ObjectFetcher
from protocols.cid import CID
from protocols.manifest import Image
from protocols.narinfo import nar_key, provider_key

log = logging.getLogger(__name__)

NOT_FOUND = Response(404, (("Content-Type", "text/plain"),), b"not found\n")
NARINFO_TYPE = ("Content-Type", "text/x-nix-narinfo")
NAR_TYPE = ("Content-Type", "application/x-nix-nar")


@dataclass(frozen=True, slots=True)
class Settings:
    """`host`, `port`: to listen on. `priority`: of this cache among Nix's substituters, lower is asked first.
    `zstd`: offer NARs compressed. `lookup_seconds`: the longest that Nix waits for a narinfo. `swarm_seconds`: until
    the swarm has to be able to give all of a NAR. `ipfs_cid`: narinfos of NARs that are here name the root of their DAG
    in a field of their own, which Nix skips as unknown."""

    host: str
    port: int
    upstreams: tuple[str, ...] = ()
    lookup_seconds: float = 3.0
    priority: int = 30
    zstd: bool = False
    swarm_seconds: float = SWARM_SECONDS
    ipfs_cid: bool = False


@dataclass(frozen=True, slots=True)
class Services:
    """What the gateway needs of its node. `lock(root)` is held by whoever fetches an image; `ready()` waits until the
    node has tried to connect to others after its start."""

    transport: Transport
    router: Router
    store: Store
    exchange: Exchange
    fetcher: Fetcher
    records: PathRecords
    discover: Callable[[CID], Awaitable[int]]
    provide: Callable[[Image], None]
    lock: Callable[[CID], AbstractAsyncContextManager[None]]
    ready: Callable[[], Awaitable[None]]
    book: AddressBook | None = None


class Gateway:
    """A running gateway. Get one from `Gateway.open`. `addresses` are those it listens on, as `HOST:PORT`."""

    def __init__(self, settings: Settings, narinfos: Narinfos, nars: Nars) -> None:
        self._settings = settings
        self._narinfos = narinfos
        self._nars = nars
        self._counts = Counts()
        self.server = Server(self.handle)
        self.addresses: list[str] = []
        self._info = f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: {settings.priority}\n".encode()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: Settings, services: Services, trust: Trust, directory: Path
    ) -> AsyncIterator[Gateway]:
        """Listen and serve. `directory`: for NARs on their way from upstream caches, on the disk of the store.

        Raises NotListening, UsageError for an upstream that is no URL.
        """
        store, records = services.store, services.records
        await trio.to_thread.run_sync(lambda: directory.mkdir(parents=True, exist_ok=True))
        async with open_upstreams(settings.upstreams) as upstreams, trio.open_nursery() as nursery:
            client = NarinfoClient(services.transport)
            search = SwarmSearch(client, services.router, services.book, services.ready)
            narinfos = Narinfos(
                records, search, upstreams, trust, nursery.start_soon, lookup_seconds=settings.lookup_seconds
            )

            async def verified(image: Image, number: int) -> None:
                nar_hash = image.objects[number].nar_hash
                rows = await trio.to_thread.run_sync(records.of_image, image.id)
                parts = [part for part, _, of in rows if of == number]
                narinfos.known(parts)
                if nar_hash is not None:
                    services.router.provide([nar_key(nar_hash), *map(provider_key, parts)])

            async def imported(image: Image) -> None:
                services.exchange.here([chunk_key(digest) for digest in image.chunks])
                services.provide(image)
                await services.exchange.tell(image.id)
                await verified(image, 0)

            async def image(root: CID, peer: str | None) -> Image:
                known = await trio.to_thread.run_sync(store.image, root)
                if known is not None:
                    return known
                if peer is not None:
                    try:
                        await services.exchange.join(peer)
                    except RemoteError as error:
                        log.info("%s", error)
                async with services.lock(root):
                    return await services.fetcher.manifest(root, timeout=MANIFEST_SECONDS)

            objects = ObjectFetcher(
                store, services.exchange, services.discover, services.provide, services.lock, verified
            )
            nars = Nars(
                store,
                records,
                narinfos,
                search,
                objects,
                image,
                imported,
                directory,
                nursery.start_soon,
                swarm_seconds=settings.swarm_seconds,
            )
            gateway = cls(settings, narinfos, nars)
            await nursery.start(client.run)
            await nursery.start(objects.run)
            gateway.addresses = await nursery.start(gateway.server.run, settings.host, settings.port)
            try:
                yield gateway
            finally:
                nursery.cancel_scope.cancel()

    def statistics(self) -> GatewayStatistics:
        """What was asked and given since the start."""
        return self._counts.snapshot(self.server.connections)

    async def handle(self, request: Request) -> Response:
        """Answer one request; never with a 5xx."""
        self._counts.asked()
        if request.method not in ("GET", "HEAD"):
            return Response(405, (("Allow", "GET, HEAD"),), b"method not allowed\n")
        wanted = route(request.target)
        if wanted is None:
            return NOT_FOUND
        try:
            response = await self._answer(wanted, request)
        except (NodeError, Broken) as error:
            log.warning("gateway: %.200s: %s", request.target, one_line(str(error), 500))
            response = NOT_FOUND
        self._counts.answered(wanted.kind, response)
        return response

    async def _answer(self, wanted: Route, request: Request) -> Response:
        match wanted.kind:
            case Kind.CACHE_INFO:
                return Response(200, (("Content-Type", "text/x-nix-cache-info"),), self._info)
            case Kind.NARINFO:
                return await self._narinfo(wanted)
            case Kind.NAR | Kind.NAR_ZSTD:
                return await self._nar(wanted, request)

    async def _narinfo(self, wanted: Route) -> Response:
        signed = await self._narinfos.find(wanted.key)
        if signed is None:
            return NOT_FOUND
        narinfo = narinfo_of(signed, zstd=self._settings.zstd)
        if self._settings.ipfs_cid:
            try:
                root = await self._nars.dag_root(signed.info.nar_hash)
            except NodeError as error:  # a full disk must not take the path itself away
                log.warning("gateway: no IpfsCid for %s: %s", signed.info.path, one_line(str(error), 500))
                root = None
            narinfo = replace(narinfo, ipfs_cid=None if root is None else str(root))
        return Response(200, (NARINFO_TYPE,), narinfo.format().encode())

    async def _nar(self, wanted: Route, request: Request) -> Response:
        zstd = wanted.kind is Kind.NAR_ZSTD
        tag = f'"{nar_url(wanted.key, zstd=zstd)}"'
        headers = (NAR_TYPE, ("Accept-Ranges", "bytes"), ("ETag", tag))
        unchanged = matches(request.headers.get("if-none-match"), tag)
        if unchanged or (request.method == "HEAD" and not zstd):
            size = await self._nars.size(wanted.key)
            if size is not None:
                return Response(304, headers[1:]) if unchanged else Response(200, headers, _nothing(), size)
            if not unchanged:
                return NOT_FOUND
        source = await (self._nars.open_zstd(wanted.key) if zstd else self._nars.open(wanted.key))
        if source is None:
            return NOT_FOUND
        if request.method == "HEAD":  # ranges are for GET alone (RFC 9110, 14.2)
            return Response(200, headers, _nothing(), source.size)
        asked = request.headers.get("range") if request.headers.get("if-range", tag) == tag else None
        return self._ranged(source, asked, headers)

    def _ranged(self, source: Source, asked: str | None, headers: tuple[tuple[str, str], ...]) -> Response:
        size = source.size
        try:
            part = span(asked, size)
        except Unsatisfiable:
            return Response(416, (*headers, ("Content-Range", f"bytes */{size}")), b"")
        body = self._counts.body(source.origin, source.pieces(Span(0, size) if part is None else part))
        if part is None:
            return Response(200, headers, body, size)
        told = ("Content-Range", f"bytes {part.start}-{part.stop - 1}/{size}")
        return Response(206, (*headers, told), body, len(part))


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""

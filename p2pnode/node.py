"""The node: composes store, network, discovery and exchange; the public Python API.

    async with Node.open(config) as node:
        result = await node.provide("/srv/images/web.img", kind=None, name=None, report=silent)
        print(result["link"])

Results are plain dicts in the form the command line prints with --json (DESIGN 6).
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from p2pnode import __version__, home, link, local
from p2pnode.config import Config
from p2pnode.errors import NodeError, PeerUnreachable, RemoteError, StoreError, UsageError
from p2pnode.gateway.peers import NarinfoServer
from p2pnode.gateway.records import PathRecords, hash_parts
from p2pnode.images.chunker import check_cancelled
from p2pnode.images.importer import import_path
from p2pnode.images.paths import keep_claims
from p2pnode.net import addresses
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.identity import Identity
from p2pnode.net.transport import Provider, Router
from p2pnode.nix import trust_policy
from p2pnode.nix.registered import read_secret_keys
from p2pnode.progress import Progress, Report, silent
from p2pnode.store import Store
from p2pnode.store.records import Pin
from p2pnode.swarm.delivery import IntoStore, ToCache
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.fetcher import Fetched, Fetcher, FetchOptions
from p2pnode.swarm.holdings import chunk_key
from p2pnode.swarm.mirroring import Mirroring
from p2pnode.swarm.publishing import CatalogServer
from p2pnode.threads import in_thread
from protocols.catalog import publisher_key
from protocols.cid import CID, Codec
from protocols.manifest import FASTCDC, Chunking, Image, ImageObject, Kind
from protocols.narinfo import nar_key, provider_key

if TYPE_CHECKING:
    from p2pnode.gateway.gateway import Gateway
    from p2pnode.net.dht import DHTRouter
    from p2pnode.net.network import Network

log = logging.getLogger(__name__)

AGENT = f"p2pnode/{__version__}"
BOOTSTRAP_RETRY = 5.0
BOOTSTRAP_RETRY_MAX = 20.0  # a node that is alone notices within 30 s that it need not be
BOOTSTRAP_WAIT = 10.0  # the longest a search waits for the first connections
GOODBYE_SECONDS = 2.5
MAX_PROVIDERS = 32  # of one key that are joined
SURVEY_INTERVAL = 300.0  # s between looks at which store paths that are served from the Nix store are still there


class Node:
    """A running node. Get one from `Node.open`."""

    def __init__(self, config: Config, store: Store, network: Network, router: DHTRouter, exchange: Exchange) -> None:
        self._config = config
        self._store = store
        self._network = network
        self._router = router
        self._exchange = exchange
        self._fetcher = Fetcher(store, exchange, self._discover, self._announce)
        self._records = PathRecords(store)
        self._mirroring = Mirroring(store, self._keep, network, self._reach)
        self._gateway: Gateway | None = None
        self._running: dict[CID, trio.Lock] = {}
        self._read_later, self._unread = trio.open_memory_channel[CID](math.inf)
        self._started = time.time()
        self._untried = set(config.bootstrap)
        self._bootstrapped = trio.Event()
        self._elsewhere = trio.Event()  # the machine's network changed, or it was asleep

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config) -> AsyncIterator[Node]:
        """Lock the home, open the store, listen, and find peers. Raises HomeLocked, StoreError, NotListening."""
        with home.lock(config.home) as place:
            store = await trio.to_thread.run_sync(Store.open, place.root)
            try:
                async with cls._networked(config, place, store) as node:
                    yield node
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(store.close)

    @classmethod
    @asynccontextmanager
    async def _networked(cls, config: Config, place: home.Home, store: Store) -> AsyncIterator[Node]:
        identity = Identity.load(place.root)
        book = AddressBook(place.address_book)
        network_class, router_class, config_class = await trio.to_thread.run_sync(_import_network)
        async with (
            network_class.open(
                identity=identity,
                listen=config.listen,
                address_book=book,
                announce=config.announce,
                agent=AGENT,
                nat=_nat_settings(config),
            ) as network,
            trio.open_nursery() as nursery,
        ):
            router = router_class(network, config_class(rate=config.announce_rate))
            known = await trio.to_thread.run_sync(trust_policy.known_keys, config.trusted_public_keys)
            finder = partial(_find, router, book)
            exchange = Exchange(network, store, finder, agent=AGENT, keys=known)
            node = cls(config, store, network, router, exchange)
            NarinfoServer(network, node._records)
            CatalogServer(network, store, publish=config.publish)
            await nursery.start(exchange.run)
            await nursery.start(router.run)
            token = trio.lowlevel.current_trio_token()
            store.on_lost(lambda digests: _soon(token, node._withdraw_lost, list(digests)))
            network.on_change(node._moved)
            network.on_addrs(router.moved)
            nursery.start_soon(node._bootstrap)
            if config.mdns:
                nursery.start_soon(node._mdns, book)
            nursery.start_soon(node._keep_promises)
            nursery.start_soon(node._verify_later)
            if config.gateway:
                await nursery.start(node._serve_nix)
            try:
                yield node
            finally:
                with trio.move_on_after(GOODBYE_SECONDS, shield=True):
                    await exchange.close()
                    await router.close()
                nursery.cancel_scope.cancel()

    async def _serve_nix(self, task_status: trio.TaskStatus[None]) -> None:
        """Run the binary cache gateway. Raises NotListening, ConfigError."""
        from p2pnode.gateway.gateway import Gateway, Services, Settings  # httpx takes 0.1 s to import

        config = self._config
        host, _, port = config.gateway.rpartition(":")
        settings = Settings(
            host.strip("[]"),
            int(port),
            upstreams=config.gateway_upstreams,
            lookup_seconds=config.gateway_lookup_seconds,
            priority=config.gateway_priority,
            zstd=config.gateway_compression == "zstd",
            ipfs_cid=config.gateway_ipfs_cid,
        )
        services = Services(
            self._network,
            self._router,
            self._store,
            self._exchange,
            self._fetcher,
            self._records,
            self._discover,
            self._announce,
            self._fetching,
            self._connected_once,
            self._network.address_book,
        )
        # What Nix takes from us goes into its store, so what it would believe counts here.
        trust = await trio.to_thread.run_sync(
            partial(trust_policy.of_fetch, config.require_signatures, config.trusted_public_keys, (), into_store=True)
        )
        async with Gateway.open(settings, services, trust, config.home / "store" / "spool") as self._gateway:
            task_status.started()
            await trio.sleep_forever()

    def gateway_urls(self) -> list[str]:
        """Where Nix finds the binary cache of this node."""
        return [] if self._gateway is None else [f"http://{address}" for address in self._gateway.addresses]

    @asynccontextmanager
    async def _fetching(self, root: CID) -> AsyncIterator[None]:
        """Held by whoever fetches an image: there is one download of it at a time."""
        lock = self._running.setdefault(root, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._running.get(root) is lock:
                del self._running[root]

    @property
    def peer_id(self) -> str:
        return self._network.peer_id

    def addrs(self) -> list[str]:
        """Addresses others can dial."""
        return self._network.addrs()

    # Finding peers

    async def _bootstrap(self) -> None:
        """Stay connected to the bootstrap peers, or at least to somebody."""
        self._tried(None)
        async with trio.open_nursery() as nursery:
            for addr in self._config.bootstrap:
                nursery.start_soon(self._keep_connected, addr)

    def _tried(self, addr: str | None) -> None:
        """A bootstrap address was dialled, with or without success."""
        self._untried.discard(addr or "")
        if not self._untried:
            self._bootstrapped.set()

    async def _keep_connected(self, addr: str) -> None:
        delay = BOOTSTRAP_RETRY
        known = False
        while True:
            try:
                peer = await self._network.connect_addr(addr)
                self._router.add_peer(peer)
                if not known:
                    await self._router.bootstrap()
                known = True
                self._tried(addr)
                delay = BOOTSTRAP_RETRY
            except RemoteError as exc:
                log.warning("bootstrap: %s", exc)
                known = False
                self._tried(addr)
                delay = min(2 * delay, BOOTSTRAP_RETRY_MAX)
            with trio.move_on_after(delay):
                await self._elsewhere.wait()
                delay = BOOTSTRAP_RETRY

    def _moved(self, _change: object) -> None:
        """Dial the bootstrap peers anew, and at once."""
        self._elsewhere.set()
        self._elsewhere = trio.Event()

    async def _mdns(self, book: AddressBook) -> None:
        from p2pnode.net.mdns import run_mdns

        async with trio.open_nursery() as nursery:

            def found(peer: str, addrs: Sequence[str]) -> None:
                book.heard(peer, addrs)
                nursery.start_soon(self._meet, peer, addrs)

            # A relay is no way to a neighbour.
            await run_mdns(self.peer_id, lambda: [addr for addr in self.addrs() if "/p2p-circuit" not in addr], found)

    async def _meet(self, peer: str, addrs: Sequence[str]) -> None:
        try:
            await self._network.connect(peer, addrs)
        except RemoteError as exc:
            log.info("a neighbour cannot be reached: %s", exc)

    async def _connected_once(self) -> None:
        """Until there has been time to connect to somebody."""
        with trio.move_on_after(BOOTSTRAP_WAIT):
            await self._bootstrapped.wait()

    async def _discover(self, root: CID) -> int:
        """Find and join whoever is recorded to have an image."""
        await self._connected_once()
        found = await _find(self._router, self._network.address_book, root, ())
        await self._join_all((peer, ()) for peer in found)
        return len(found)

    async def _join_all(self, peers: Iterable[tuple[str, Sequence[str]]]) -> None:
        async with trio.open_nursery() as nursery:
            for peer, addrs in peers:
                nursery.start_soon(self._join, peer, addrs)

    async def _join(self, peer: str, addrs: Sequence[str]) -> None:
        try:
            await self._exchange.join(peer, addrs)
        except RemoteError as exc:
            log.info("%s", exc)

    # Announcing

    async def _keep_promises(self) -> None:
        """Announce what the store held before this start, and take back what Nix collects as garbage from then on."""
        announced = False
        while True:
            try:  # a full disk must not end a node that only wants to serve
                if not announced:
                    await trio.to_thread.run_sync(self._store.forget_vanished)
                    await self._announce_all()
                    if self._config.publish:
                        self._router.provide([publisher_key(self.peer_id)])
                    announced = True
                else:
                    await self._survey()
            except StoreError as error:
                log.warning("the survey of the store failed: %s", error)
            await trio.sleep(SURVEY_INTERVAL)

    async def _survey(self) -> None:
        """Drop what points into store paths that are gone, and tell the swarm which images are not whole any more."""
        if not await trio.to_thread.run_sync(self._store.forget_vanished):
            return
        broken: list[Image] = []
        whole: set[bytes] = set()
        for record in await trio.to_thread.run_sync(self._store.images):
            image = await trio.to_thread.run_sync(self._store.image, record.id)
            if image is None or record.id in self._running:
                continue
            if record.held_chunks == record.chunks:
                whole.update(_nar_keys(image))
                continue
            broken.append(image)
            if record.held_chunks == 0:
                self._router.withdraw([record.id.to_bytes()])
        for image in broken:
            self._router.withdraw([key for key in _nar_keys(image) if key not in whole])
            await self._exchange.tell(image.id)

    def _withdraw_lost(self, digests: list[bytes]) -> None:
        """The store has lost chunks, to Nix's garbage collector or because somebody changed an original."""
        self._router.withdraw([chunk_key(digest) for digest in digests])

    async def _announce_all(self) -> None:
        for record in await trio.to_thread.run_sync(self._store.images):
            image = await trio.to_thread.run_sync(self._store.image, record.id)
            if image is not None:
                await self._announce_held(image)

    def _announce(self, image: Image) -> None:
        """An image this node is fetching: others may ask it for the manifest and for what it has by now."""
        self._router.provide([image.id.to_bytes()])

    async def _announce_held(self, image: Image) -> None:
        digests = list(image.chunks)
        held = await trio.to_thread.run_sync(self._store.held, digests)
        keys = [image.id.to_bytes()]
        await trio.to_thread.run_sync(self._records.learn, image)
        here = {digest for digest, is_here in zip(digests, held, strict=True) if is_here}
        # Of an image that is here in part, such as a closure of which Nix wanted some paths, the whole objects.
        keys += _nar_keys(image, lambda obj: here.issuperset(obj.layout.digests))
        keys += map(chunk_key, here)
        self._router.provide(keys)

    # Operations

    async def provide(
        self, path: str, *, kind: str | None, name: str | None, report: Report, sign_keys: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Import a path and serve it. See DESIGN 6 for the result."""
        began = time.monotonic()
        keys = await trio.to_thread.run_sync(read_secret_keys, [*self._config.sign_keys, *sign_keys])
        imported = await in_thread(
            lambda cancelled, progress: import_path(
                self._store,
                Path(path),
                kind=None if kind is None else Kind(kind),
                name=name,
                chunking=self._chunking(),
                nix_store=self._config.nix_store,
                progress=progress,
                cancelled=cancelled,
            ),
            report,
        )
        image = imported.image
        await keep_claims(self._store, image, self._config.nix_store, keys)
        self._exchange.here([chunk_key(digest) for digest in image.chunks])
        await self._exchange.tell(image.id)
        await self._announce_held(image)
        return local.provided(imported, link.format(image.id, self.addrs(), imported.name), time.monotonic() - began)

    async def publish(
        self,
        cache: str,
        *,
        paths: Sequence[str],
        name: str | None,
        report: Report,
        tell: Callable[[dict[str, Any]], Awaitable[None]],
        sign_keys: Sequence[str] = (),
    ) -> None:
        """Import what a binary cache holds, or the closures of `paths` in it, and serve it.

        `tell` gets each image as soon as it is being served, and each fault: `local.published`.
        """
        from p2pnode.images import publish as publishing  # httpx takes 0.1 s to import

        settings = await trio.to_thread.run_sync(local.publish_settings, self._config, name, sign_keys)
        roots = [publishing.parse_root(path) for path in paths]

        async def told(outcome: publishing.Outcome) -> None:
            if isinstance(outcome, publishing.Published) and outcome.new:
                image = outcome.imported.image
                self._exchange.here([chunk_key(digest) for digest in image.chunks])
                await self._exchange.tell(image.id)
                await self._announce_held(image)
            result = local.published(outcome, self.addrs())
            if result is not None:
                await tell(result)

        async with publishing.parse_cache(cache, roots, name) as opened:
            await publishing.publish(self._store, opened, roots, settings, told, report)

    def _chunking(self) -> Chunking:
        return Chunking.fixed(self._config.chunk_size) if self._config.chunk_size else FASTCDC

    async def fetch(
        self,
        spec: str,
        *,
        out: str | None,
        force: bool,
        keep_chunks: bool,
        report: Report,
        timeout: float = 60.0,
        peers: Sequence[str] = (),
        into_store: bool = False,
        add_root: str | None = None,
        to_cache: str | None = None,
        require_signatures: str | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Fetch an image id or link. See DESIGN 6 for the result.

        It goes to `out`, into the Nix store (`add_root`: a link that keeps it there) or into the binary cache
        `to_cache`; `require_signatures` and `trusted_keys` go before what is configured.
        """
        wanted = link.parse(spec)
        if (out is not None) + into_store + (to_cache is not None) > 1 or (add_root is not None and not into_store):
            raise UsageError("an image goes to one place: a path, the Nix store (which may have a root), or a cache")
        to: IntoStore | ToCache | None = None
        if into_store:
            to = IntoStore(self._config.nix_store, None if add_root is None else Path(add_root), keep_chunks)
        elif to_cache is not None:
            keys = await trio.to_thread.run_sync(read_secret_keys, self._config.sign_keys)
            to = ToCache(Path(to_cache), tuple(keys))
        policy = require_signatures or self._config.require_signatures
        ours = self._config.trusted_public_keys
        trust = await trio.to_thread.run_sync(
            partial(trust_policy.of_fetch, policy, ours, trusted_keys, into_store=into_store)
        )
        async with self._fetching(wanted.image), trio.open_nursery() as nursery:
            nursery.start_soon(self._join_all, _by_peer([*wanted.peers, *peers]))
            options = FetchOptions(
                None if out is None else Path(out), force, keep_chunks, wanted.name, timeout, to, trust
            )
            fetched = await self._fetcher.fetch(wanted.image, options, report)
            nursery.cancel_scope.cancel()
        await self._announce_held(fetched.image)
        record = await trio.to_thread.run_sync(self._store.record, fetched.image.id)
        if record is not None and not record.complete and record.held_chunks == record.chunks:
            self._read_later.send_nowait(record.id)
        return _result(fetched)

    async def mirror(self, things: Sequence[str], *, timeout: float, report: Report) -> list[dict[str, Any]]:
        """Mirror images and publishers from now on: `swarm.mirroring.Mirroring.mirror`."""
        return await self._mirroring.mirror(things, timeout=timeout, report=report)

    async def mirrors(self) -> list[dict[str, Any]]:
        return await trio.to_thread.run_sync(local.mirrors, self._store)

    async def stop_mirror(self, thing: str) -> dict[str, Any]:
        mirror = await trio.to_thread.run_sync(local.find_mirror, self._store, thing)
        self._mirroring.stop(mirror.thing)
        return await trio.to_thread.run_sync(local.stop_mirror, self._store, mirror.thing)

    async def keep_mirrors(self) -> None:
        """What a daemon does all its life: look again and again at everything that is mirrored. Never returns."""
        await self._mirroring.run(self._config.mirror_interval)

    async def _keep(self, wanted: link.Link, *, timeout: float, hear: bool, report: Report) -> dict[str, Any]:
        """For `Mirroring`: an image that is here completely is not read again, only pinned."""
        async with self._fetching(wanted.image):
            image = await self._fetcher.whole(wanted.image)
            if image is not None:
                await trio.to_thread.run_sync(self._store.pin, image.id, Pin.MIRROR)
            if image is not None and not hear:
                return _result(Fetched.nothing(image))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._join_all, _by_peer(wanted.peers))
                if image is None:
                    keys, policy = self._config.trusted_public_keys, self._config.require_signatures
                    judge = partial(trust_policy.of_fetch, policy, keys, (), into_store=False)
                    trust = await trio.to_thread.run_sync(judge)
                    options = FetchOptions(name=wanted.name, timeout=timeout, trust=trust, mirror=True)
                    fetched = await self._fetcher.fetch(wanted.image, options, report)
                else:
                    await self._fetcher.hear(image)
                    fetched = Fetched.nothing(image)
                nursery.cancel_scope.cancel()
        if image is None:
            await self._announce_held(fetched.image)
        return _result(fetched)

    async def _reach(self, peer: str, addrs: Sequence[str]) -> None:
        """Be connected to a publisher, found by its id alone if need be. Raises RemoteError."""
        try:
            await self._network.connect(peer, addrs)
        except PeerUnreachable:
            await self._connected_once()
            key = publisher_key(peer)
            found = {each.peer: each.addrs for each in (await self._router.find([key])).get(key, ())}
            if not found.get(peer):
                raise
            await self._network.connect(peer, found[peer])

    async def pin(self, spec: str) -> dict[str, Any]:
        return await trio.to_thread.run_sync(partial(local.pin, self._store, spec, pinned=True))

    async def unpin(self, spec: str) -> dict[str, Any]:
        return await trio.to_thread.run_sync(partial(local.pin, self._store, spec, pinned=False))

    async def images(self) -> list[dict[str, Any]]:
        return await trio.to_thread.run_sync(local.images, self._store)

    async def show(self, spec: str) -> dict[str, Any]:
        return await trio.to_thread.run_sync(local.show, self._store, spec)

    async def verify(self, spec: str, report: Report) -> dict[str, Any]:
        def work(cancelled: Callable[[], bool], progress: Report) -> dict[str, Any]:
            def checked(now: Progress) -> None:
                check_cancelled(cancelled)
                progress(now)

            return local.verify(self._store, spec, checked)

        return await in_thread(work, report)

    async def _verify_later(self) -> None:
        """Read what a fetch into the Nix store did not, as it was there before; nobody waits for it."""
        async for id in self._unread:
            try:
                await self.verify(str(id), silent)
            except NodeError as error:
                log.warning("%s", error)

    async def remove(self, spec: str) -> dict[str, Any]:
        """Remove an image and tell the swarm."""
        record = await trio.to_thread.run_sync(local.find, self._store, spec)
        if record.id in self._running:
            raise UsageError(f"image {record.id} is being fetched; stop that first")
        image = await trio.to_thread.run_sync(self._store.image, record.id)
        result, gone = await trio.to_thread.run_sync(local.remove, self._store, str(record.id))
        if image is not None:
            self._router.withdraw([record.id.to_bytes(), *_nar_keys(image)])
        self._exchange.forget(record.id)
        self._router.withdraw([CID(Codec.RAW, digest).to_bytes() for digest in gone])
        return result

    async def status(self) -> dict[str, Any]:
        store = await trio.to_thread.run_sync(self._store.stats)
        problems = await trio.to_thread.run_sync(self._store.problems)
        dht = self._router.stats()
        return {
            "peer_id": self.peer_id,
            "addrs": self.addrs(),
            "version": __version__,
            "uptime": round(time.time() - self._started, 1),
            "home": str(self._config.home),
            "reachability": self._network.traversal.status(),
            "peers": len({connection.peer for connection in self._network.connections()}),
            "fetching": [str(root) for root in self._running],
            "banned": {peer: round(left) for peer, left in self._exchange.bans.items()},
            "store": local.statistics(store),
            "problems": [local.problem(problem) for problem in problems],
            "gateway": self._gateway and {"urls": self.gateway_urls(), **self._gateway.statistics().to_dict()},
            "dht": {
                name: getattr(dht, name) for name in dht.__slots__ if isinstance(getattr(dht, name), int | str | None)
            },
        }

    async def doctor(self, target: str | None, report: Report) -> dict[str, Any]:
        """Why something is slow or not found: `p2pnode.diagnosis.examine`, as JSON has it."""
        from p2pnode.diagnosis import Scene, examine  # here: it needs all of the network

        with trio.move_on_after(BOOTSTRAP_WAIT):  # a node that lives for this question only has just been started
            await self._bootstrapped.wait()
        scene = Scene(self._config, self._store, self._network, self._router, self._exchange)
        return (await examine(scene, target, report)).to_dict()

    async def peers(self) -> list[dict[str, Any]]:
        rows = []
        now = trio.current_time()
        for connection in self._network.connections():
            traffic = self._exchange.traffic(connection.peer)
            rows.append(
                {
                    "peer": connection.peer,
                    "addr": connection.addr,
                    "direction": connection.direction,
                    "relayed": connection.relayed,
                    "seconds": round(now - connection.since, 1),
                    "rtt": connection.rtt,
                    "received_bytes": traffic.received,
                    "sent_bytes": traffic.sent,
                    "waiting": traffic.waiting,
                }
            )
        return rows


def _import_network() -> tuple[Any, Any, Any]:
    """libp2p takes 1.6 s and 84 MB to import: only for a node that talks, and where Ctrl-C is heard meanwhile."""
    gc.disable()  # nothing of it becomes garbage
    try:
        from p2pnode.net.dht import DHTConfig, DHTRouter
        from p2pnode.net.network import Network
    finally:
        gc.enable()
    gc.freeze()  # 1,250 modules that every full collection would walk through
    return Network, DHTRouter, DHTConfig


def _nat_settings(config: Config) -> Any:
    from p2pnode.net.traversal import NatSettings, Wanted
    from protocols.relay import RelayLimits

    limits = RelayLimits(
        max_reservations=config.relay_reservations,
        max_circuits=config.relay_circuits,
        max_circuits_per_peer=config.relay_circuits_per_peer,
        circuit_bytes=config.relay_circuit_bytes,
        circuit_seconds=config.relay_circuit_seconds,
        bandwidth=config.relay_bandwidth,
    )
    return NatSettings(
        reachability=Wanted(config.reachability),
        relays=config.relays,
        serve=limits if config.relay else None,
        punch=config.hole_punching,
        upnp=config.upnp,
    )


def _result(fetched: Fetched) -> dict[str, Any]:
    """See DESIGN 6."""
    return {
        "image": str(fetched.image.id),
        "kind": str(fetched.image.kind),
        "path": None if fetched.path is None else str(fetched.path),
        "bytes": fetched.image.size,
        "received_bytes": fetched.received_bytes,
        "duplicate_bytes": fetched.duplicate_bytes,
        "from": fetched.sources,
        "banned": sorted(fetched.banned),
        "relayed_bytes": sum(fetched.relayed.values()),
        "connections": _paths(fetched),
        "seconds": round(fetched.seconds, 3),
        **fetched.delivered,
    }


def _paths(fetched: Fetched) -> dict[str, dict[str, Any]]:
    """How each source was reached at the end, and when a relayed one became direct."""
    paths: dict[str, dict[str, Any]] = {}
    for peer in fetched.sources:
        moved = fetched.direct_after.get(peer)
        relayed = peer in fetched.relayed and moved is None
        paths[peer] = {
            "path": "relayed" if relayed else "direct",
            "direct_after": None if moved is None else round(moved, 3),
        }
    return paths


def _soon(token: trio.lowlevel.TrioToken, call: Callable[[list[bytes]], None], digests: list[bytes]) -> None:
    """Call in the node's own thread, as a store that is being closed may find losses when that has ended."""
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(call, digests)


def _nar_keys(image: Image, of: Callable[[ImageObject], bool] = lambda obj: True) -> list[bytes]:
    """What the objects of an image are found by: NAR hashes, and hash parts of store paths."""
    keys = [nar_key(obj.nar_hash) for obj in image.objects if obj.nar_hash is not None and of(obj)]
    parts = zip(hash_parts(image), image.objects, strict=False)
    return keys + [provider_key(part) for part, obj in parts if of(obj)]


async def _find(router: Router, book: AddressBook, root: CID, keys: Sequence[bytes]) -> dict[str, list[bytes]]:
    """Providers of an image (with no keys) and of single chunks of it."""
    root_key = root.to_bytes()
    found: dict[bytes, list[Provider]] = await router.find([root_key, *keys])
    peers: dict[str, list[bytes]] = {}
    for key, providers in found.items():
        for provider in providers[:MAX_PROVIDERS]:
            book.heard(provider.peer, provider.addrs)
            held = peers.setdefault(provider.peer, [])
            if key != root_key:
                held.append(key)
    return peers


def _by_peer(addrs: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Multiaddrs that end in /p2p/<id>, by that id. Raises UsageError."""
    peers: dict[str, list[str]] = {}
    for text in addrs:
        address = addresses.parse(text)
        if address.peer is None:
            raise UsageError(f"the peer address {text} lacks /p2p/<peer id> at its end")
        peers.setdefault(address.peer, []).append(text)
    return list(peers.items())

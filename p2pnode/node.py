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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from p2pnode import __version__, home, link, local
from p2pnode.announcing import Announcer
from p2pnode.config import Config
from p2pnode.errors import NodeError, UsageError
from p2pnode.gateway.peers import NarinfoServer
from p2pnode.gateway.records import PathRecords
from p2pnode.images.chunker import check_cancelled
from p2pnode.images.importer import import_path
from p2pnode.images.paths import keep_claims
from p2pnode.neighbours import Neighbours, by_peer, find_providers
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.identity import Identity
from p2pnode.nix import trust_policy
from p2pnode.nix.registered import read_secret_keys
from p2pnode.progress import Progress, Report, silent
from p2pnode.store import Store
from p2pnode.store.records import Pin
from p2pnode.swarm.delivery import IntoStore, ToCache
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.fetcher import Fetched, Fetcher, FetchOptions
from p2pnode.swarm.mirroring import Mirroring
from p2pnode.swarm.publishing import CatalogServer
from p2pnode.threads import in_thread
from protocols.cid import CID
from protocols.manifest import FASTCDC, Chunking, Kind

if TYPE_CHECKING:
    from p2pnode.gateway.gateway import Gateway
    from p2pnode.net.dht import DHTRouter
    from p2pnode.net.network import Network

log = logging.getLogger(__name__)

AGENT = f"p2pnode/{__version__}"
GOODBYE_SECONDS = 2.5


class Node:
    """A running node. Get one from `Node.open`."""

    def __init__(self, config: Config, store: Store, network: Network, router: DHTRouter, exchange: Exchange) -> None:
        self._config = config
        self._store = store
        self._network = network
        self._router = router
        self._exchange = exchange
        self._running: dict[CID, trio.Lock] = {}
        self._records = PathRecords(store)
        self._neighbours = Neighbours(config, network, router, exchange)
        publisher = network.peer_id if config.publish else None
        self._announcer = Announcer(store, router, exchange, self._records, publisher, self._running)
        self._fetcher = Fetcher(store, exchange, self._neighbours.discover, self._announcer.fetching)
        self._mirroring = Mirroring(store, self._keep, network, self._neighbours.reach)
        self._gateway: Gateway | None = None
        self._read_later, self._unread = trio.open_memory_channel[CID](math.inf)
        self._started = time.time()

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
            finder = partial(find_providers, router, book)
            exchange = Exchange(network, store, finder, agent=AGENT, keys=known)
            router.busy_until = exchange.busy_until
            node = cls(config, store, network, router, exchange)
            NarinfoServer(network, node._records)
            CatalogServer(network, store, publish=config.publish)
            await nursery.start(exchange.run)
            await nursery.start(router.run)
            network.on_change(node._neighbours.moved)
            network.on_addrs(router.moved)
            nursery.start_soon(node._neighbours.run)
            nursery.start_soon(node._announcer.run)
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
            self._neighbours.discover,
            self._announcer.fetching,
            self._fetching,
            self._neighbours.connected_once,
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
        await self._announcer.imported(image)
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
        require_signatures: str | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> None:
        """Import what a binary cache holds, or the closures of `paths` in it, and serve it.

        `tell` gets each image as soon as it is being served, and each fault: `local.published`. `require_signatures`
        and `trusted_keys` as for `fetch`.
        """
        from p2pnode.images import publish as publishing  # httpx takes 0.1 s to import

        settings = await trio.to_thread.run_sync(
            local.publish_settings, self._config, name, sign_keys, require_signatures, trusted_keys
        )
        roots = [publishing.parse_root(path) for path in paths]

        async def told(outcome: publishing.Outcome) -> None:
            if isinstance(outcome, publishing.Published) and outcome.new:
                await self._announcer.imported(outcome.imported.image)
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
        sign_keys: Sequence[str] = (),
        require_signatures: str | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Fetch an image id or link. See DESIGN 6 for the result.

        It goes to `out`, into the Nix store (`add_root`: a link that keeps it there) or into the binary cache
        `to_cache`, which the keys in the files `sign_keys` sign beside those configured; `require_signatures` and
        `trusted_keys` go before what is configured.
        """
        wanted = link.parse(spec)
        if (out is not None) + into_store + (to_cache is not None) > 1 or (add_root is not None and not into_store):
            raise UsageError("an image goes to one place: a path, the Nix store (which may have a root), or a cache")
        to: IntoStore | ToCache | None = None
        if into_store:
            to = IntoStore(self._config.nix_store, None if add_root is None else Path(add_root), keep_chunks)
        elif to_cache is not None:
            keys = await trio.to_thread.run_sync(read_secret_keys, [*self._config.sign_keys, *sign_keys])
            to = ToCache(Path(to_cache), tuple(keys))
        policy = require_signatures or self._config.require_signatures
        ours = self._config.trusted_public_keys
        trust = await trio.to_thread.run_sync(
            partial(trust_policy.of_fetch, policy, ours, trusted_keys, into_store=into_store)
        )
        async with self._fetching(wanted.image), trio.open_nursery() as nursery:
            nursery.start_soon(self._neighbours.join_all, by_peer([*wanted.peers, *peers]))
            options = FetchOptions(
                None if out is None else Path(out), force, keep_chunks, wanted.name, timeout, to, trust
            )
            fetched = await self._fetcher.fetch(wanted.image, options, report)
            nursery.cancel_scope.cancel()
        await self._announcer.held(fetched.image)
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
                nursery.start_soon(self._neighbours.join_all, by_peer(wanted.peers))
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
            await self._announcer.held(fetched.image)
        return _result(fetched)

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
        self._announcer.removed(record.id, image, gone)
        return result

    async def status(self) -> dict[str, Any]:
        store = await trio.to_thread.run_sync(self._store.stats)
        problems = await trio.to_thread.run_sync(self._store.problems)
        mirrors = await trio.to_thread.run_sync(local.mirror_states, self._store)
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
            "mirrors": mirrors,
            "problems": [local.problem(problem) for problem in problems],
            "gateway": self._gateway and {"urls": self.gateway_urls(), **self._gateway.statistics().to_dict()},
            "dht": {
                name: getattr(dht, name) for name in dht.__slots__ if isinstance(getattr(dht, name), int | str | None)
            },
        }

    async def doctor(self, target: str | None, report: Report) -> dict[str, Any]:
        """Why something is slow or not found: `p2pnode.diagnosis.examine`, as JSON has it."""
        from p2pnode.diagnosis import Scene, examine  # here: it needs all of the network

        await self._neighbours.connected_once()  # a node that lives for this question only has just been started
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

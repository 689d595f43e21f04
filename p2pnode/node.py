"""The node: composes store, network, discovery and exchange; the public Python API.

    async with Node.open(config) as node:
        result = await node.provide("/srv/images/web.img", kind=None, name=None, report=silent)
        print(result["link"])

Results are plain dicts in the form the command line prints with --json (DESIGN 6).
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from p2pnode import __version__, home, link, local
from p2pnode.config import Config
from p2pnode.errors import RemoteError, UsageError
from p2pnode.images.importer import import_path
from p2pnode.net import addresses
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.identity import Identity
from p2pnode.net.transport import Provider, Router
from p2pnode.progress import Report
from p2pnode.store import Store
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.fetcher import Fetched, Fetcher, FetchOptions
from p2pnode.swarm.holdings import chunk_key
from p2pnode.threads import in_thread
from protocols.cid import CID, Codec
from protocols.manifest import FASTCDC, Chunking, Image, Kind

if TYPE_CHECKING:
    from p2pnode.net.dht import DHTRouter
    from p2pnode.net.network import Network

log = logging.getLogger(__name__)

AGENT = f"p2pnode/{__version__}"
BOOTSTRAP_RETRY = 5.0
BOOTSTRAP_RETRY_MAX = 20.0  # a node that is alone notices within 30 s that it need not be
BOOTSTRAP_WAIT = 10.0  # the longest a search waits for the first connections
GOODBYE_SECONDS = 2.5
MAX_PROVIDERS = 32  # of one key that are joined


class Node:
    """A running node. Get one from `Node.open`."""

    def __init__(self, config: Config, store: Store, network: Network, router: DHTRouter, exchange: Exchange) -> None:
        self._config = config
        self._store = store
        self._network = network
        self._router = router
        self._exchange = exchange
        self._fetcher = Fetcher(store, exchange, self._discover, self._announce)
        self._running: dict[CID, trio.Lock] = {}
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
            exchange = Exchange(network, store, lambda root, keys: _find(router, book, root, keys), agent=AGENT)
            node = cls(config, store, network, router, exchange)
            await nursery.start(exchange.run)
            await nursery.start(router.run)
            network.on_change(node._moved)
            network.on_addrs(router.moved)
            nursery.start_soon(node._bootstrap)
            if config.mdns:
                nursery.start_soon(node._mdns, book)
            nursery.start_soon(node._announce_all)
            try:
                yield node
            finally:
                with trio.move_on_after(GOODBYE_SECONDS, shield=True):
                    await exchange.close()
                    await router.close()
                nursery.cancel_scope.cancel()

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

    async def _discover(self, root: CID) -> int:
        """Find and join whoever is recorded to have an image."""
        with trio.move_on_after(BOOTSTRAP_WAIT):
            await self._bootstrapped.wait()
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

    async def _announce_all(self) -> None:
        """Announce what the store held before this start."""
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
        if all(held):
            keys += [_nar_key(obj.nar_hash) for obj in image.objects if obj.nar_hash is not None]
        keys += [chunk_key(digest) for digest, here in zip(digests, held, strict=True) if here]
        self._router.provide(keys)

    # Operations

    async def provide(self, path: str, *, kind: str | None, name: str | None, report: Report) -> dict[str, Any]:
        """Import a path and serve it. See DESIGN 6 for the result."""
        began = time.monotonic()
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
        self._exchange.here([chunk_key(digest) for digest in image.chunks])
        await self._exchange.tell(image.id)
        await self._announce_held(image)
        return local.provided(imported, link.format(image.id, self.addrs(), imported.name), time.monotonic() - began)

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
    ) -> dict[str, Any]:
        """Fetch an image id or link. See DESIGN 6 for the result."""
        wanted = link.parse(spec)
        lock = self._running.setdefault(wanted.image, trio.Lock())
        try:
            async with lock, trio.open_nursery() as nursery:
                nursery.start_soon(self._join_all, _by_peer([*wanted.peers, *peers]))
                options = FetchOptions(None if out is None else Path(out), force, keep_chunks, wanted.name, timeout)
                fetched = await self._fetcher.fetch(wanted.image, options, report)
                nursery.cancel_scope.cancel()
        finally:
            if not lock.locked() and self._running.get(wanted.image) is lock:
                del self._running[wanted.image]
        await self._announce_held(fetched.image)
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
        }

    async def images(self) -> list[dict[str, Any]]:
        return await trio.to_thread.run_sync(local.images, self._store)

    async def show(self, spec: str) -> dict[str, Any]:
        return await trio.to_thread.run_sync(local.show, self._store, spec)

    async def verify(self, spec: str, report: Report) -> dict[str, Any]:
        return await in_thread(lambda _, progress: local.verify(self._store, spec, progress), report)

    async def remove(self, spec: str) -> dict[str, Any]:
        """Remove an image and tell the swarm."""
        for record in await trio.to_thread.run_sync(self._store.find, spec):
            if record.id in self._running:
                raise UsageError(f"image {record.id} is being fetched; stop that first")
            image = await trio.to_thread.run_sync(self._store.image, record.id)
            if image is not None:
                nar_keys = [_nar_key(obj.nar_hash) for obj in image.objects if obj.nar_hash is not None]
                self._router.withdraw([record.id.to_bytes(), *nar_keys])
            self._exchange.forget(record.id)
        result, gone = await trio.to_thread.run_sync(local.remove, self._store, spec)
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
            "dht": {
                name: getattr(dht, name) for name in dht.__slots__ if isinstance(getattr(dht, name), int | str | None)
            },
        }

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


def _nar_key(nar_hash: bytes) -> bytes:
    """The provider-record key of a NAR, found by anybody who has only its signed narinfo."""
    return b"nar" + nar_hash


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

"""Nodes over an in-memory network, with real stores on disk: the world that the tests of exchange and gateway share."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from p2pnode.errors import NodeError
from p2pnode.images.importer import import_path
from p2pnode.net.memory import MemoryFabric, MemoryNetwork, MemoryRouter
from p2pnode.nix.trust import TrustedKeys
from p2pnode.progress import silent
from p2pnode.store import Store
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.fetcher import Fetched, Fetcher, FetchOptions
from p2pnode.swarm.holdings import chunk_key
from protocols.cid import CID
from protocols.manifest import Image


class BasePeer:
    """One node of a test: everything but libp2p is real."""

    def __init__(
        self, home: Path, network: MemoryNetwork, registry: dict[bytes, set[str]], keys: TrustedKeys | None = None
    ) -> None:
        home.mkdir()
        self.home = home
        self.name = network.peer_id
        self.store = Store.open(home)
        self.network = network
        self.router = MemoryRouter(registry, self.name)
        self.exchange = Exchange(network, self.store, self._find, agent="test", keys=keys)
        self.fetcher = Fetcher(self.store, self.exchange, self._discover, self._announce)

    async def _find(self, root: CID, keys: Sequence[bytes]) -> dict[str, list[bytes]]:
        found = await self.router.find([root.to_bytes(), *keys])
        peers: dict[str, list[bytes]] = {}
        for key, providers in found.items():
            for provider in providers:
                peers.setdefault(provider.peer, []).extend([key] if key != root.to_bytes() else [])
        return peers

    async def _discover(self, root: CID) -> int:
        found = await self._find(root, ())
        for peer in found:
            try:
                await self.exchange.join(peer)
            except NodeError:
                continue
        return len(found)

    def _announce(self, image: Image) -> None:
        self.router.provide([image.id.to_bytes()])


class Peer(BasePeer):
    """One that provides and fetches."""

    def provide(self, path: Path) -> Image:
        image = import_path(self.store, path).image
        self.router.provide([image.id.to_bytes(), *map(chunk_key, image.chunks)])
        return image

    async def fetch(self, root: CID, **options: object) -> Fetched:
        options.setdefault("timeout", 20.0)
        return await self.fetcher.fetch(root, FetchOptions(**options), silent)  # type: ignore[arg-type]


P = TypeVar("P", bound=BasePeer)


class BaseWorld:
    """The network, what its nodes announced, and the nodes."""

    def __init__(self, tmp_path: Path, nursery: trio.Nursery) -> None:
        self.tmp_path = tmp_path
        self.nursery = nursery
        self.fabric = MemoryFabric(nursery)
        self.registry: dict[bytes, set[str]] = {}
        self.peers: list[BasePeer] = []

    async def add(self, peer: P) -> P:
        """Let it take part."""
        self.peers.append(peer)
        await self.nursery.start(peer.exchange.run)
        return peer


class World(BaseWorld):
    async def peer(self, name: str, keys: TrustedKeys | None = None) -> Peer:
        return await self.add(Peer(self.tmp_path / name, self.fabric.node(name), self.registry, keys))


W = TypeVar("W", bound=BaseWorld)


@asynccontextmanager
async def open_world(kind: Callable[[Path, trio.Nursery], W], tmp_path: Path) -> AsyncIterator[W]:
    async with trio.open_nursery() as nursery:
        world = kind(tmp_path, nursery)
        yield world
        nursery.cancel_scope.cancel()
    for peer in world.peers:
        peer.store.close()


def drop(store: Store, digests: Sequence[bytes]) -> None:
    """Make a store forget chunks, as if it had never had them."""
    for digest in digests:
        for location in store.catalog.locations(digest):
            store.catalog.drop_chunk(digest, location.source.id)


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)

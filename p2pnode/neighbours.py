"""Whom this node is connected to: bootstrap peers, neighbours on the same network, and whoever has what is wanted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import trio

from p2pnode.config import Config
from p2pnode.errors import PeerUnreachable, RemoteError, UsageError
from p2pnode.net import addresses
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.transport import Provider, Router
from p2pnode.swarm.exchange import Exchange
from protocols.catalog import publisher_key
from protocols.cid import CID

if TYPE_CHECKING:
    from p2pnode.net.dht import DHTRouter
    from p2pnode.net.network import Network

log = logging.getLogger(__name__)

BOOTSTRAP_RETRY = 5.0
BOOTSTRAP_RETRY_MAX = 20.0  # a node that is alone notices within 30 s that it need not be
BOOTSTRAP_WAIT = 10.0  # the longest a search waits for the first connections
MAX_PROVIDERS = 32  # of one key that are joined


class Neighbours:
    """Finds peers and connects to them. `run` is a task of the node's."""

    def __init__(self, config: Config, network: Network, router: DHTRouter, exchange: Exchange) -> None:
        self._config = config
        self._network = network
        self._router = router
        self._exchange = exchange
        self._untried = set(config.bootstrap)
        self._bootstrapped = trio.Event()
        self._elsewhere = trio.Event()  # the machine's network changed, or it was asleep

    async def run(self) -> None:
        """Stay connected to the bootstrap peers, or at least to somebody, and to the neighbours."""
        self._tried(None)
        async with trio.open_nursery() as nursery:
            for addr in self._config.bootstrap:
                nursery.start_soon(self._keep_connected, addr)
            if self._config.mdns:
                nursery.start_soon(self._mdns)

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

    def moved(self, _change: object) -> None:
        """Dial the bootstrap peers anew, and at once."""
        self._elsewhere.set()
        self._elsewhere = trio.Event()

    async def _mdns(self) -> None:
        from p2pnode.net.mdns import run_mdns

        async with trio.open_nursery() as nursery:

            def found(peer: str, addrs: Sequence[str]) -> None:
                self._network.address_book.heard(peer, addrs)
                nursery.start_soon(self._meet, peer, addrs)

            await run_mdns(self._network.peer_id, self._near_addrs, found)

    def _near_addrs(self) -> list[str]:
        """A relay is no way to a neighbour."""
        return [addr for addr in self._network.addrs() if "/p2p-circuit" not in addr]

    async def _meet(self, peer: str, addrs: Sequence[str]) -> None:
        try:
            await self._network.connect(peer, addrs)
        except RemoteError as exc:
            log.info("a neighbour cannot be reached: %s", exc)

    async def connected_once(self) -> None:
        """Until there has been time to connect to somebody."""
        with trio.move_on_after(BOOTSTRAP_WAIT):
            await self._bootstrapped.wait()

    async def discover(self, root: CID) -> int:
        """Find and join whoever is recorded to have an image."""
        await self.connected_once()
        found = await find_providers(self._router, self._network.address_book, root, ())
        await self.join_all((peer, ()) for peer in found)
        return len(found)

    async def join_all(self, peers: Iterable[tuple[str, Sequence[str]]]) -> None:
        async with trio.open_nursery() as nursery:
            for peer, addrs in peers:
                nursery.start_soon(self._join, peer, addrs)

    async def _join(self, peer: str, addrs: Sequence[str]) -> None:
        try:
            await self._exchange.join(peer, addrs)
        except RemoteError as exc:
            log.info("%s", exc)

    async def reach(self, peer: str, addrs: Sequence[str]) -> None:
        """Be connected to a publisher, found by its id alone if need be. Raises RemoteError."""
        try:
            await self._network.connect(peer, addrs)
        except PeerUnreachable:
            await self.connected_once()
            key = publisher_key(peer)
            found = {each.peer: each.addrs for each in (await self._router.find([key])).get(key, ())}
            if not found.get(peer):
                raise
            await self._network.connect(peer, found[peer])


async def find_providers(router: Router, book: AddressBook, root: CID, keys: Sequence[bytes]) -> dict[str, list[bytes]]:
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


def by_peer(addrs: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Multiaddrs that end in /p2p/<id>, by that id. Raises UsageError."""
    peers: dict[str, list[str]] = {}
    for text in addrs:
        address = addresses.parse(text)
        if address.peer is None:
            raise UsageError(f"the peer address {text} lacks /p2p/<peer id> at its end")
        peers.setdefault(address.peer, []).append(text)
    return list(peers.items())

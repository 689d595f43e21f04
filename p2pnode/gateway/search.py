"""Asking the swarm who has a store path or a NAR: connected peers at once, and those that the DHT names."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from p2pnode.errors import RemoteError
from p2pnode.gateway.peers import NarinfoClient
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.transport import Router
from protocols.narinfo import PART_SIZE, Found, nar_key, provider_key

log = logging.getLogger(__name__)

MAX_NEIGHBOURS = 16  # connected peers asked about everything; beyond, the DHT has to know
MAX_PROVIDERS = 8

OnFound = Callable[[str, Found], bool]
"""Told of a peer and its answer; True ends the search."""


class SwarmSearch:
    """Searches by hash part (20 bytes) or NAR hash (32 bytes).

    `ready()` waits until this node has had the time to connect to anybody after its start.
    """

    def __init__(
        self, client: NarinfoClient, router: Router, book: AddressBook | None, ready: Callable[[], Awaitable[None]]
    ) -> None:
        self._ready = ready
        self._client = client
        self._router = router
        self._book = book

    async def find(self, key: bytes, on_found: OnFound) -> None:
        """Ask until `on_found` is content, or everybody has answered. Bounded in time by the peers' and the DHT's."""
        asked: set[str] = set()
        await self._ready()

        async with trio.open_nursery() as nursery:

            async def ask(peer: str) -> None:
                try:
                    found = await self._client.ask(peer, key)
                except RemoteError as error:
                    log.info("%s", error)
                    return
                if found is not None and on_found(peer, found):
                    nursery.cancel_scope.cancel()

            def start(peer: str) -> None:
                if peer not in asked:
                    asked.add(peer)
                    nursery.start_soon(ask, peer)

            for peer in self._client.neighbours(MAX_NEIGHBOURS):
                start(peer)
            record = provider_key(key) if len(key) == PART_SIZE else nar_key(key)
            for provider in (await self._router.find([record])).get(record, ())[:MAX_PROVIDERS]:
                if self._book is not None:
                    self._book.heard(provider.peer, provider.addrs)
                start(provider.peer)

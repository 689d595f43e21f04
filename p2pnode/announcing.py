"""What this node tells the swarm that it has, as long as that is true."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from p2pnode.errors import StoreError
from p2pnode.gateway.records import PathRecords, hash_parts
from p2pnode.store import Store
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.holdings import chunk_key
from protocols.catalog import publisher_key
from protocols.cid import CID
from protocols.manifest import Image, ImageObject
from protocols.narinfo import nar_key, provider_key

if TYPE_CHECKING:
    from p2pnode.net.dht import DHTRouter

log = logging.getLogger(__name__)

SURVEY_INTERVAL = 300.0  # s between looks at which store paths that are served from the Nix store are still there


class Announcer:
    """Keeps the provider records of this node true. `run` is a task of the node's.

    `publisher`: our peer id, if our list of images is for all to see. `busy`: images that are being fetched, of which
    it is no news that they are not whole.
    """

    def __init__(
        self,
        store: Store,
        router: DHTRouter,
        exchange: Exchange,
        records: PathRecords,
        publisher: str | None,
        busy: Container[CID],
    ) -> None:
        self._store = store
        self._router = router
        self._exchange = exchange
        self._records = records
        self._publisher = publisher
        self._busy = busy
        token = trio.lowlevel.current_trio_token()
        store.on_lost(lambda digests: _soon(token, self._lost, list(digests)))

    async def run(self) -> None:
        """Announce what the store held before this start, and take back what Nix collects as garbage from then on."""
        announced = False
        while True:
            try:  # a full disk must not end a node that only wants to serve
                if not announced:
                    await trio.to_thread.run_sync(self._store.forget_vanished)
                    await self._announce_everything()
                    if self._publisher is not None:
                        self._router.provide([publisher_key(self._publisher)])
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
            if image is None or record.id in self._busy:
                continue
            if record.held_chunks == record.chunks:
                whole.update(nar_keys(image))
                continue
            broken.append(image)
            if record.held_chunks == 0:
                self._router.withdraw([record.id.to_bytes()])
        for image in broken:
            self._router.withdraw([key for key in nar_keys(image) if key not in whole])
            await self._exchange.tell(image.id)

    def removed(self, id: CID, image: Image | None, gone: Iterable[bytes]) -> None:
        """An image was removed, and with it the chunks `gone`. `image`: None if nothing but its id is known."""
        if image is not None:
            self._router.withdraw([id.to_bytes(), *nar_keys(image)])
        self._exchange.forget(id)
        self._lost(gone)

    def _lost(self, digests: Iterable[bytes]) -> None:
        """The store has lost chunks, be it to Nix's garbage collector or because somebody changed an original."""
        self._router.withdraw([chunk_key(digest) for digest in digests])

    async def _announce_everything(self) -> None:
        for record in await trio.to_thread.run_sync(self._store.images):
            image = await trio.to_thread.run_sync(self._store.image, record.id)
            if image is not None:
                await self.held(image)

    def fetching(self, image: Image) -> None:
        """An image this node is fetching: others may ask it for the manifest and for what it has by now."""
        self._router.provide([image.id.to_bytes()])

    async def imported(self, image: Image) -> None:
        """An image that is here from now on."""
        self._exchange.here([chunk_key(digest) for digest in image.chunks])
        await self._exchange.tell(image.id)
        await self.held(image)

    async def held(self, image: Image) -> None:
        """An image, and of it whatever is here."""
        digests = list(image.chunks)
        held = await trio.to_thread.run_sync(self._store.held, digests)
        keys = [image.id.to_bytes()]
        await trio.to_thread.run_sync(self._records.learn, image)
        here = {digest for digest, is_here in zip(digests, held, strict=True) if is_here}
        # Of an image that is here in part, such as a closure of which Nix wanted some paths, the whole objects.
        keys += nar_keys(image, lambda obj: here.issuperset(obj.layout.digests))
        keys += map(chunk_key, here)
        self._router.provide(keys)


def _soon(token: trio.lowlevel.TrioToken, call: Callable[[list[bytes]], None], digests: list[bytes]) -> None:
    """Call in the node's own thread, as a store that is being closed may find losses when that has ended."""
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(call, digests)


def nar_keys(image: Image, of: Callable[[ImageObject], bool] = lambda obj: True) -> list[bytes]:
    """What the objects of an image are found by: NAR hashes, and hash parts of store paths."""
    keys = [nar_key(obj.nar_hash) for obj in image.objects if obj.nar_hash is not None and of(obj)]
    parts = zip(hash_parts(image), image.objects, strict=False)
    return keys + [provider_key(part) for part, obj in parts if of(obj)]

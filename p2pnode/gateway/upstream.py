"""Upstream binary caches: asked for narinfos beside the swarm, and for a NAR when the swarm has too little of it.

A cache that hangs or fails is left alone for a while: Nix asks for thousands of paths, and each would wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from p2pnode.errors import NarInfoError, NodeError, StoreError
from p2pnode.images.nar_file import land_nar, read_nar
from p2pnode.nix.binary_cache import BinaryCache, open_cache
from p2pnode.nix.content_address import check_beside_nar_hash
from p2pnode.nix.narinfo import NarInfo
from p2pnode.store import Store
from p2pnode.store.records import Origin
from p2pnode.store.space import check_space, write_failure
from protocols.manifest import FASTCDC, Image

log = logging.getLogger(__name__)

REST_SECONDS = 30.0
FAILURES = 2  # in a row, after which a cache rests: one may be this path's fault


class Upstream:
    """One cache, and whether it is worth asking."""

    def __init__(self, cache: BinaryCache) -> None:
        self.cache = cache
        self._failures = 0
        self._resting_until = float("-inf")

    @property
    def resting(self) -> bool:
        return trio.current_time() < self._resting_until

    async def narinfo(self, part: str, seconds: float) -> NarInfo | None:
        """What the cache says about a hash part (32 digits); None also if it fails, which is logged."""
        finished = False
        try:
            with trio.move_on_after(seconds):
                narinfo = await self.cache.narinfo(part)
                finished = True
            if not finished:
                self.failed(f"no answer within {seconds:g} s")
                return None
        except NarInfoError as error:  # of this path; says nothing of others
            log.warning("upstream %s: %s", self.cache.url, error)
            return None
        except NodeError as error:
            self.failed(str(error))
            return None
        self._failures = 0
        return narinfo

    def failed(self, reason: str) -> None:
        self._failures += 1
        if self._failures >= FAILURES:
            self._resting_until = trio.current_time() + REST_SECONDS
            reason += f"; it is not asked for {REST_SECONDS:.0f} s"
        log.warning("upstream %s: %s", self.cache.url, reason)


@asynccontextmanager
async def open_upstreams(urls: Sequence[str]) -> AsyncIterator[list[Upstream]]:
    """The caches, closed at the end. Raises UsageError for what is no URL of a cache."""
    async with contextlib.AsyncExitStack() as stack:
        yield [Upstream(await stack.enter_async_context(open_cache(url))) for url in urls]


class Spool:
    """A NAR on its way from an upstream cache, in a nameless file that readers follow as it grows.

    The last piece is written only when the whole was verified.
    """

    def __init__(self, narinfo: NarInfo, directory: Path) -> None:
        self.narinfo = narinfo
        self.size = narinfo.info.nar_size
        self.written = 0
        self.finished = trio.Event()
        self.imported = trio.Event()  # it is in the store now, or will never be
        self.failure: NodeError | None = None
        self._changed = trio.Event()
        self._directory = directory
        self._fd = -1

    def __enter__(self) -> Spool:
        try:
            self._fd = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise write_failure(self._directory, error) from error
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    async def fill(self, cache: BinaryCache) -> None:
        """Download and verify. Raises NodeError of any kind; readers then see `failure`."""
        info = self.narinfo.info
        await trio.to_thread.run_sync(check_space, self._directory, self.size)
        proof = check_beside_nar_hash(info)
        held: bytes = b""
        async with contextlib.aclosing(cache.nar(self.narinfo)) as pieces:
            async for piece in pieces:
                await self._write(held)
                if proof is not None:
                    await trio.to_thread.run_sync(proof.feed, piece)
                held = piece
        if proof is not None:
            await trio.to_thread.run_sync(proof.finish)
        await self._write(held)

    async def _write(self, data: bytes) -> None:
        while data:
            try:
                count = await trio.to_thread.run_sync(os.pwrite, self._fd, data, self.written)
            except OSError as error:
                raise write_failure(self._directory, error) from error
            self.written += count
            data = data[count:]
        self._change()

    def end(self, failure: NodeError | None) -> None:
        self.failure = failure
        self.finished.set()
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, offset: int) -> None:
        """Until there are bytes at `offset`. Raises what ended the download before."""
        while self.written <= offset:
            if self.failure is not None:
                raise self.failure
            await self._changed.wait()

    @contextmanager
    def reader(self) -> Iterator[Callable[[int, int], bytes]]:
        """Reads `size` bytes at `offset`; goes on when the download has ended and this object is closed.

        Raises StoreError if it is closed already: then the NAR is in the store."""
        if self._fd < 0:
            raise StoreError(f"the NAR of {self.narinfo.info.path} has gone into the store meanwhile; ask again")
        fd = os.dup(self._fd)
        try:
            yield lambda offset, size: os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def into_store(self, store: Store) -> Image:
        """Make it an image of kind `store-path`, the same that a machine with this path would provide. Blocks.

        Raises NarError for what is no NAR though it has the right hash, StoreError.
        """
        info = self.narinfo.info
        return land_nar(store, read_nar(self._fd, info, FASTCDC), self._fd, info.path.name, Origin.FETCHED)

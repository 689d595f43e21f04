"""What stands between verified contents and the world: no store path passes that the signature policy refuses.

A `Gate` is wrapped around the exporter of a fetch. An object that has its NAR hash is judged; what is missing for it, a
signature that some peer may still tell, is waited for a while.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import trio

from p2pnode.errors import NarError, UsageError, VerificationFailed
from p2pnode.images.exporter import Exporter
from p2pnode.images.paths import STORE_KINDS, ImagePaths
from p2pnode.nix.content_address import ContentCheck
from p2pnode.nix.nar_reader import Buffer
from p2pnode.nix.signatures import SignedInfo
from p2pnode.nix.trust import Policy, require
from p2pnode.nix.trust_policy import Trust
from p2pnode.store import Store
from protocols.manifest import Image

PATIENCE = 10.0
"""Seconds that a path waits for its proof while peers are still being looked for, or have not told all they know."""

POLL = 0.5
"""Seconds after which it is looked at again who has told all: peers leave without a word."""

Settled = Callable[[], bool]
Heard = Callable[[], Awaitable[None]]


class Gate:
    """An `Exporter` around that of a fetch, and who may go on after it.

    `settled()` tells whether all who have the image have told what they know beside it, `heard()` waits for more.
    """

    def __init__(
        self, store: Store, image: Image, inner: Exporter, trust: Trust, settled: Settled, heard: Heard
    ) -> None:
        self.trust = trust
        self._store = store
        self._image = image
        self._inner = inner
        self._settled = settled
        self._heard = heard
        self.paths = ImagePaths(store, image) if image.kind in STORE_KINDS else None
        self._judging = trust.demanded and self.paths is not None
        self._check: ContentCheck | None = None
        self._checked: set[int] = set()
        self._index = -1
        self._passed: dict[int, trio.Event] = {}
        self._signed: dict[int, SignedInfo] = {}

    # Exporter

    def check(self) -> None:
        self._inner.check()

    def begin_object(self, index: int) -> None:
        self._index = index
        self._check = None
        if self._judging and self.paths is not None:
            best = self.paths.best(index, self.trust.keys)
            if best is not None and best[1].needs_contents:
                self._check = ContentCheck(best[0].info)
        self._inner.begin_object(index)

    def feed(self, data: Buffer) -> None:
        self._inner.feed(data)
        if self._check is not None:
            self._guarded(self._check.feed, data)

    def end_object(self) -> None:
        self._inner.end_object()
        if self._check is not None:
            self._guarded(self._check.finish)
        if self._check is not None:
            self._checked.add(self._index)

    def finish(self) -> Path | None:
        return self._inner.finish()

    def abort(self) -> None:
        self._inner.abort()

    def _guarded(self, step: Callable[..., None], *args: Buffer) -> None:
        """A content address that does not hold proves nothing, and is no more than that: a signature may."""
        try:
            step(*args)
        except (NarError, VerificationFailed):
            self._check = None

    # Judging

    async def judge(self, index: int) -> None:
        """Let the object pass whose NAR hash was verified. Raises Untrusted."""
        if self._judging:
            deadline = trio.current_time() + PATIENCE
            while not await trio.to_thread.run_sync(self._proved, index, False):
                if self._settled() or trio.current_time() > deadline:
                    await trio.to_thread.run_sync(self._proved, index, True)
                    break
                with trio.move_on_after(POLL):
                    await self._heard()
        self._event(index).set()

    def _proved(self, index: int, last: bool) -> bool:
        """Whether something proves the path. `last`: if not, raise Untrusted."""
        assert self.paths is not None
        self.paths.reload_if_changed()
        best = self.paths.best(index, self.trust.keys)
        signed, verdict = best if best is not None else (SignedInfo(self.paths.info(index)), None)
        if verdict is not None and verdict.trusted:
            if not verdict.needs_contents or index in self._checked:
                return True
            if self._read_again(index, signed):
                return True
        if last:  # without `ca`, which did not prove it: the contents are others, or it does not give the path
            require(replace(signed.info, ca=None), signed.signatures, self.trust.keys, Policy.ALWAYS)
        return False

    def _read_again(self, index: int, signed: SignedInfo) -> bool:
        """The content address came later than the contents."""
        check = ContentCheck(signed.info)
        try:
            for digest in self._image.objects[index].layout.digests:
                check.feed(self._store.read(digest))
            check.finish()
        except (NarError, VerificationFailed):
            return False
        self._checked.add(index)
        return True

    def _event(self, index: int) -> trio.Event:
        return self._passed.setdefault(index, trio.Event())

    async def signed(self, index: int) -> SignedInfo | None:
        """What a trusted signature says of an object: all that is left to be checked is that it has its NAR hash.

        None if there is none yet, or nothing is judged. Once it is not None it stays so.
        """
        found = self._signed.get(index)
        if found is None and self._judging and self.paths is not None:
            await self.paths.refresh()
            best = self.paths.best(index, self.trust.keys)
            if best is not None and best[1].trusted and not best[1].needs_contents:
                found = self._signed[index] = best[0]
        return found

    async def vouched(self, index: int) -> SignedInfo:
        """Wait until it is known who vouches for a path: whoever takes its contents then must not have the last of them
        before it `passed`, unless they check the NAR hash themselves. Raises UsageError as that does."""
        while self._judging and not self._event(index).is_set():
            if (signed := await self.signed(index)) is not None:
                return signed
            with trio.move_on_after(POLL):
                await self._heard()
        return await self.passed(index)

    async def passed(self, index: int) -> SignedInfo:
        """Wait for an object to be verified and judged; what is known of it then, to be handed to a store.

        Raises UsageError if nobody tells what the path refers to.
        """
        await self._event(index).wait()
        assert self.paths is not None
        await self.paths.refresh()
        best = self.paths.best(index, self.trust.keys)
        if best is None:
            raise UsageError(
                f"{self.paths.paths[index]} cannot be imported alone: no peer says what it refers to; fetch its closure"
            )
        return best[0]

"""What we tell Nix about a store path: from our own images, from the swarm, or from upstream caches, if it is trusted.

All sources are asked at once, and the first answer that is trusted counts: Nix waits, and asks for thousands of paths.
A look-up that takes longer than Nix is made to wait goes on, so that the next request is answered at once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import trio

from p2pnode.errors import NarInfoError
from p2pnode.failures import one_line
from p2pnode.gateway.records import PathRecords, Record
from p2pnode.gateway.search import SwarmSearch
from p2pnode.gateway.upstream import Upstream
from p2pnode.nix.hashes import nix32_encode
from p2pnode.nix.narinfo import NarInfo, parse
from p2pnode.nix.signatures import Signature, SignedInfo
from p2pnode.nix.trust import judge
from p2pnode.nix.trust_policy import Trust
from protocols.cid import CID
from protocols.narinfo import Found

log = logging.getLogger(__name__)

LOOKUP_LIMIT = 10.0  # seconds for a look-up that nobody waits for any more
NEGATIVE_SECONDS = 10.0  # Nix itself does not ask again for an hour
POSITIVE_SECONDS = 600.0
MAX_NEGATIVE = 16_384  # 200 bytes each
MAX_OFFERS = 4096


@dataclass(frozen=True, slots=True)
class Offer:
    """A path that was found and is trusted, and where its NAR may be: at a peer, in an upstream cache, or here.

    `proved`: the signatures that trusted keys made, none if the contents prove it; None if nothing does.
    """

    signed: SignedInfo
    proved: tuple[Signature, ...] | None
    peer: str | None = None
    image: CID | None = None
    number: int = 0
    upstream: Upstream | None = None
    narinfo: NarInfo | None = None


@dataclass(eq=False)
class _Flight:
    done: trio.Event = field(default_factory=trio.Event)
    offer: Offer | None = None


class Narinfos:
    """Looks paths up. `spawn` starts a task that outlives the request; `trust` says what is demanded now."""

    def __init__(
        self,
        records: PathRecords,
        search: SwarmSearch,
        upstreams: Sequence[Upstream],
        trust: Trust,
        spawn: Callable[..., None],
        *,
        lookup_seconds: float,
    ) -> None:
        self._records = records
        self._search = search
        self._upstreams = upstreams
        self._trust = trust
        self._spawn = spawn
        self._lookup_seconds = lookup_seconds
        self._flights: dict[bytes, _Flight] = {}
        self._absent: OrderedDict[bytes, float] = OrderedDict()
        self._offers: OrderedDict[bytes, tuple[Offer, float]] = OrderedDict()
        self._by_nar: dict[bytes, bytes] = {}

    async def find(self, part: bytes) -> SignedInfo | None:
        """What is known and trusted about a hash part, within the configured time; None: nobody has it (yet)."""
        local = await trio.to_thread.run_sync(self._local, part)
        if local is not None:
            return local
        offer = self._cached(part)
        if offer is not None:
            return offer.signed
        until = self._absent.get(part)
        if until is not None and until > trio.current_time():
            return None
        flight = self._flights.get(part)
        if flight is None:
            flight = self._flights[part] = _Flight()
            self._spawn(self._fly, part, flight)
        with trio.move_on_after(self._lookup_seconds):
            await flight.done.wait()
        return None if flight.offer is None else flight.offer.signed

    def offer(self, nar_hash: bytes) -> Offer | None:
        """What was found lately of the path with this NAR."""
        part = self._by_nar.get(nar_hash)
        return None if part is None else self._cached(part)

    def known(self, parts: Sequence[bytes]) -> None:
        """Paths that are here now, whatever was said of them before."""
        for part in parts:
            self._absent.pop(part, None)

    def _local(self, part: bytes) -> SignedInfo | None:
        refused: str | None = None
        for record in self._by_worth(self._records.of_part(part)):
            proved, complaint = self._judge(record.signed)
            if proved is not None or not self._trust.demanded:
                # What counts comes first: of a hundred signatures that peers added a narinfo takes some.
                first = proved or ()
                others = (each for each in record.signed.signatures if each not in first)
                return SignedInfo(record.signed.info, (*first, *others))
            refused = refused or complaint
        if refused is not None:
            log.warning("not offered: %s", refused)
        return None

    def _by_worth(self, records: list[Record]) -> list[Record]:
        """Complete ones first, and of these the ones that are trusted: two closures may say different things."""
        return sorted(records, key=lambda each: (self._judge(each.signed)[0] is None, not each.complete))

    def _judge(self, signed: SignedInfo) -> tuple[tuple[Signature, ...] | None, str]:
        """What proves a path, as `Offer` has it, and if nothing does, what to say about it."""
        verdict = judge(signed.info, signed.signatures, self._trust.keys)
        if verdict.trusted:
            return tuple(self._trust.keys.verifying(signed.info, signed.signatures)), ""
        keys = ", ".join(verdict.seen[:5]) or "nobody"
        return None, f"{signed.info.path} is signed by {keys}, trusted are {', '.join(self._trust.keys.names)}"

    def _accept(self, narinfo: NarInfo, origin: str) -> Offer | None:
        """What it offers, less where that is; None if it is refused, which is logged."""
        proved, complaint = self._judge(narinfo.signed)
        if self._trust.demanded and proved is None:
            log.warning("%s offers what is not trusted: %s", origin, one_line(complaint, 500))
            return None
        return Offer(narinfo.signed, proved)

    async def _fly(self, part: bytes, flight: _Flight) -> None:
        """The top of a look-up's task."""
        try:
            with trio.move_on_after(LOOKUP_LIMIT) as limit:
                flight.offer = await self._look_up(part)
            if flight.offer is not None:
                self._remember(part, flight.offer)
            elif not limit.cancelled_caught:
                self._absent.pop(part, None)
                self._absent[part] = trio.current_time() + NEGATIVE_SECONDS
                while len(self._absent) > MAX_NEGATIVE:
                    self._absent.popitem(last=False)
        except Exception:
            log.exception("a look-up failed")
        finally:
            del self._flights[part]
            flight.done.set()

    async def _look_up(self, part: bytes) -> Offer | None:
        digest = nix32_encode(part)
        offer: Offer | None = None

        async with trio.open_nursery() as nursery:

            def take(new: Offer) -> None:
                nonlocal offer
                offer = offer or new
                nursery.cancel_scope.cancel()

            def on_found(peer: str, found: Found) -> bool:
                try:
                    narinfo = parse(found.narinfo, expect=digest)
                except NarInfoError as error:
                    log.warning("peer %s: %s", peer, one_line(str(error), 500))
                    return False
                accepted = self._accept(narinfo, f"peer {peer}")
                if accepted is None:
                    return False
                take(replace(accepted, peer=peer, image=found.image, number=found.number))
                return True

            async def ask(upstream: Upstream) -> None:
                narinfo = await upstream.narinfo(digest, self._lookup_seconds)
                if narinfo is not None and (accepted := self._accept(narinfo, upstream.cache.url)) is not None:
                    take(replace(accepted, upstream=upstream, narinfo=narinfo))

            for upstream in self._upstreams:
                if not upstream.resting:
                    nursery.start_soon(ask, upstream)
            nursery.start_soon(self._search.find, part, on_found)
        return offer

    async def upstream_of(self, signed: SignedInfo) -> Offer | None:
        """An upstream cache that has just this NAR, asked now, and what it says of the path."""
        for upstream in self._upstreams:
            if upstream.resting:
                continue
            narinfo = await upstream.narinfo(signed.info.path.digest, LOOKUP_LIMIT)
            if narinfo is None or narinfo.info.nar_hash != signed.info.nar_hash:
                continue
            accepted = self._accept(narinfo, upstream.cache.url)
            if accepted is not None:
                return replace(accepted, upstream=upstream, narinfo=narinfo)
        return None

    def _remember(self, part: bytes, offer: Offer) -> None:
        self._absent.pop(part, None)
        self._forget(part)
        self._offers[part] = offer, trio.current_time() + POSITIVE_SECONDS
        self._by_nar[offer.signed.info.nar_hash] = part
        while len(self._offers) > MAX_OFFERS:
            self._forget(next(iter(self._offers)))

    def _forget(self, part: bytes) -> None:
        known = self._offers.pop(part, None)
        if known is not None and self._by_nar.get(known[0].signed.info.nar_hash) == part:
            del self._by_nar[known[0].signed.info.nar_hash]

    def _cached(self, part: bytes) -> Offer | None:
        known = self._offers.get(part)
        if known is None:
            return None
        if known[1] <= trio.current_time():
            self._forget(part)
            return None
        return known[0]

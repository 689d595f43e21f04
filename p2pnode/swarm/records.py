"""RECORDS of the exchange: what peers are told of an image's store paths beside the image, and what they tell.

A peer's word is kept only within limits. A signature in the name of a key that we trust is checked before anything
else, and costs its sender score if it is wrong; those under other names cannot be told from noise, and few are kept, to
be handed on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import trio

from p2pnode.errors import NixError, VerificationFailed
from p2pnode.images.paths import STORE_KINDS, ImagePaths
from p2pnode.nix.signatures import Signature
from p2pnode.nix.storepath import StorePath
from p2pnode.nix.trust import TrustedKeys
from p2pnode.store import Store
from p2pnode.store import claims as claims_table
from p2pnode.store.claims import PathClaims
from protocols.cid import CID
from protocols.exchange import messages as m

MAX_PER_NAME = 4  # signatures of one path by one key's name that are checked: 0.1 ms each
MAX_REPEATS = 8  # times that a peer may speak of each path of an image: at every interest, and of what came since
CACHED = 8  # images whose frames are kept: every peer that joins asks for the same

FORGED = "claims signatures that our keys have not made"
MALFORMED = "sends records that no store path can have"
REPETITIVE = "repeats its records over and over"


@dataclass(frozen=True, slots=True)
class Learnt:
    """What came of one frame: `news` to hand on, and what is to be held against the sender, if anything."""

    news: tuple[m.Records, ...] = ()
    fault: str | None = None


class RecordBook:
    """The records of one node. Everything but `frames` and `learn` returns at once."""

    def __init__(self, store: Store, keys: TrustedKeys) -> None:
        self._store = store
        self._keys = keys
        self._frames: OrderedDict[CID, list[m.Records]] = OrderedDict()
        self._generation = 0
        self._taken: dict[tuple[CID, str], int] = {}
        self._faulted: set[tuple[CID, str]] = set()
        self._complete: dict[CID, set[str]] = {}
        self._heard = trio.Event()

    # Telling

    async def frames(self, root: CID) -> list[m.Records]:
        """All that is known here of an image's paths; nothing for an image that has no store paths."""
        cached = self._frames.get(root)
        if cached is not None:
            self._frames.move_to_end(root)
            return cached
        generation = self._generation
        frames = await trio.to_thread.run_sync(self._read, root)
        if generation != self._generation:
            return frames  # of before the change, which is told by itself
        self._frames[root] = frames
        while len(self._frames) > CACHED:
            self._frames.popitem(last=False)
        return frames

    def changed(self) -> None:
        """Claims came into the store by another way, or an image came or went."""
        self._generation += 1
        self._frames.clear()

    def _read(self, root: CID) -> list[m.Records]:
        image = self._store.image(root)
        if image is None or image.kind not in STORE_KINDS:
            return []
        try:
            paths = ImagePaths(self._store, image)
        except VerificationFailed:
            return []
        said = []
        for number in range(len(image.objects)):
            best = paths.best(number, self._keys)
            if best is None:
                continue
            signed, _ = best
            claims = next((each for each in paths.claims(number) if _references(each) == signed.info.references), None)
            if claims is not None:
                said.append(_record(paths, number, claims))
        return list(m.records_frames(root, said))

    # Learning

    async def learn(self, peer: str, message: m.Records) -> Learnt:
        """Check a frame of a peer and keep what may be true of it."""
        root = message.root
        image = await trio.to_thread.run_sync(self._store.image, root)
        if image is None or image.kind not in STORE_KINDS:
            return Learnt()  # its manifest is not here yet: we ask again when it is
        taken = self._taken[root, peer] = self._taken.get((root, peer), 0) + 1 + len(message.paths)
        if taken > MAX_REPEATS * (len(image.objects) + 8):
            return Learnt(fault=self._fault(root, peer, REPETITIVE))
        try:
            paths = await trio.to_thread.run_sync(ImagePaths, self._store, image)
        except VerificationFailed:
            return Learnt()  # whoever made the image is to blame
        new, fault = await trio.to_thread.run_sync(self._keep, paths, message.paths)
        if not message.more:
            self._complete.setdefault(root, set()).add(peer)
        self._heard.set()
        self._heard = trio.Event()
        if new:
            self.changed()
        return Learnt(
            tuple(m.records_frames(root, new)) if new else (), None if fault is None else self._fault(root, peer, fault)
        )

    def _fault(self, root: CID, peer: str, fault: str) -> str | None:
        """Once per image: a peer may have been told the same lie, and says it of every path."""
        if (root, peer) in self._faulted:
            return None
        self._faulted.add((root, peer))
        return fault

    def _keep(self, paths: ImagePaths, records: Iterable[m.PathRecord]) -> tuple[list[m.PathRecord], str | None]:
        proved: list[PathClaims] = []
        unproved: list[PathClaims] = []
        fault = None
        numbers: dict[tuple[str, tuple[str, ...]], int] = {}
        for record in records:
            if record.number >= len(paths.image.objects):
                return [], MALFORMED
            try:
                good, rest, forged = self._check(paths, record)
            except NixError:
                fault = MALFORMED
                continue
            fault = FORGED if forged else fault
            numbers[rest.path, rest.references] = record.number
            if good is not None:
                proved.append(good)
            if good is None or rest.signatures:
                unproved.append(rest)
        new: dict[int, PathClaims] = {}
        for claims in claims_table.merge(self._store.catalog, proved, unproved):
            number = numbers[claims.path, claims.references]
            known = new.get(number, claims)
            signatures = tuple(sorted({*known.signatures, *claims.signatures}))[: m.MAX_SIGNATURES]
            new[number] = replace(known, signatures=signatures)
        return [_record(paths, number, new[number]) for number in sorted(new)], fault

    def _check(self, paths: ImagePaths, record: m.PathRecord) -> tuple[PathClaims | None, PathClaims, bool]:
        """What of a record is proved by a key of ours, the rest of it, and whether it lies. Raises NixError."""
        obj = paths.image.objects[record.number]
        references = tuple(path.base_name for path in paths.references(record.number))
        if record.references is not None and not paths.complete:
            references = record.references
        assert obj.nar_hash is not None
        claims = PathClaims(obj.path, obj.nar_hash, references, (), record.deriver, record.ca)
        info = paths.info(record.number, claims)
        known = {
            text for each in paths.claims(record.number) if each.references == references for text in each.signatures
        }
        good: list[str] = []
        other: list[str] = []
        tried: dict[str, int] = {}
        forged = False
        for text in record.signatures:
            if text in known:
                continue
            signature = Signature.parse(text)
            if signature.key_name not in self._keys.names:
                other.append(text)
                continue
            tried[signature.key_name] = tried.get(signature.key_name, 0) + 1
            if tried[signature.key_name] > MAX_PER_NAME:
                continue
            if self._keys.verifying(info, [signature]):
                good.append(text)
            else:
                forged = True
        # A content address that does not give the path (`info` has none then) is not worth a row.
        claims = replace(claims, ca=None if obj.ca is not None else info.ca)
        if good:
            return replace(claims, signatures=tuple(good)), replace(claims, signatures=tuple(other)), forged
        return None, replace(claims, signatures=tuple(other)), forged

    # Waiting

    def told_all(self, root: CID) -> set[str]:
        """Peers that have said all they know of an image's paths."""
        return self._complete.get(root, set())

    async def heard(self) -> None:
        """Until some peer's records come."""
        await self._heard.wait()

    def left(self, peer: str) -> None:
        """A session ended."""
        self._taken = {key: count for key, count in self._taken.items() if key[1] != peer}
        self._faulted = {key for key in self._faulted if key[1] != peer}
        for peers in self._complete.values():
            peers.discard(peer)

    def ended(self, root: CID) -> None:
        """Nobody here wants to know of an image any more."""
        self._taken = {key: count for key, count in self._taken.items() if key[0] != root}
        self._faulted = {key for key in self._faulted if key[0] != root}
        self._complete.pop(root, None)


def _references(claims: PathClaims) -> tuple[StorePath, ...]:
    try:
        return tuple(sorted(map(StorePath.from_base_name, claims.references)))
    except NixError:
        return ()


def _record(paths: ImagePaths, number: int, claims: PathClaims) -> m.PathRecord:
    return m.PathRecord(
        number,
        claims.signatures[: m.MAX_SIGNATURES],
        None if paths.complete else claims.references,
        claims.deriver,
        claims.ca if paths.image.objects[number].ca is None else None,
    )

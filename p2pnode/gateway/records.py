"""Which store paths this node has an image of, by hash part and by NAR hash: what it can tell peers and Nix about.

A row of the index leads to an object of an image. What Nix registers about it is put together of the image and of the
claims beside it (store/claims.py) whenever it is asked for; that a row is here makes no path trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2pnode.errors import NixError
from p2pnode.gateway.routes import nar_url
from p2pnode.images.paths import STORE_KINDS, claims_of
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.content_address import names_path
from p2pnode.nix.hashes import nix32_decode
from p2pnode.nix.narinfo import MAX_SIGNATURES, NarInfo
from p2pnode.nix.signatures import Signature, SignedInfo
from p2pnode.nix.storepath import StorePath
from p2pnode.store import Store, claims
from protocols.cid import CID
from protocols.manifest import Image, Kind

MAX_CANDIDATES = 8  # images that claim one hash part or NAR hash: usually one, or a closure and its parts

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS store_paths (part BLOB NOT NULL, nar BLOB NOT NULL, image BLOB NOT NULL,"
    " number INTEGER NOT NULL, PRIMARY KEY (part, nar, image)) STRICT, WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS store_paths_nar ON store_paths (nar)",
    "CREATE INDEX IF NOT EXISTS store_paths_image ON store_paths (image)",
)


@dataclass(frozen=True, slots=True)
class Record:
    """What is said of a path, and the object of an image that is its NAR. `complete`: the image is all here."""

    signed: SignedInfo
    image: CID
    number: int
    complete: bool


def part_of(path: StorePath) -> bytes:
    """The 20 bytes of a store path's hash part."""
    return nix32_decode(path.digest, 20)


def hash_parts(image: Image) -> list[bytes]:
    """Those of an image's objects, in order; none if it is not one of store paths."""
    if image.kind not in STORE_KINDS:
        return []
    try:
        return [part_of(StorePath.from_base_name(obj.path)) for obj in image.objects]
    except NixError:  # an image that somebody made up
        return []


def narinfo_of(signed: SignedInfo, *, zstd: bool = False) -> NarInfo:
    """A narinfo as our cache gives it: one form and one place for all paths, and what is signed as it came."""
    info, signatures = signed.info, signed.signatures[:MAX_SIGNATURES]
    url = nar_url(info.nar_hash, zstd=zstd)
    if zstd:
        return NarInfo(info, signatures, url, "zstd")
    # Without FileSize Nix says that there is nothing to download.
    return NarInfo(info, signatures, url, "none", ("sha256", info.nar_hash), info.nar_size)


class PathRecords:
    """The index, in the store's catalog. Thread-safe, blocking: call it from worker threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        with store.catalog.transaction() as db:
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute("DELETE FROM store_paths WHERE image NOT IN (SELECT id FROM images)")

    def learn(self, image: Image) -> bool:
        """Index the store paths of an image; whether it has any."""
        parts = hash_parts(image)
        if not parts:
            return False
        id = image.id.to_bytes()
        rows = [
            (part, obj.nar_hash, id, number)
            for number, (part, obj) in enumerate(zip(parts, image.objects, strict=True))
            if obj.nar_hash is not None
        ]
        with self._store.catalog.transaction() as db:
            db.executemany("INSERT OR IGNORE INTO store_paths VALUES (?, ?, ?, ?)", rows)
        return True

    def keep(self, signed: SignedInfo, *, proved: Sequence[Signature] | None) -> None:
        """Keep what a narinfo says beside an image that is here.

        `proved`: its signatures by trusted keys, none if the contents prove it; None if nothing does. All others are
        kept within limits: whoever passes a good signature on may add any number of his own.
        """
        good = [] if proved is None else [claims_of(SignedInfo(signed.info, tuple(proved)))]
        others = tuple(each for each in signed.signatures if each not in (proved or ()))
        rest = [claims_of(SignedInfo(signed.info, others))] if others or proved is None else []
        claims.merge(self._store.catalog, good, rest)

    def of_part(self, part: bytes) -> list[Record]:
        """What is here for a hash part (20 bytes)."""
        return self._records("part", part)

    def of_nar(self, nar_hash: bytes) -> list[Record]:
        """What is here with this NAR (SHA-256, 32 bytes)."""
        return self._records("nar", nar_hash)

    def places(self, nar_hash: bytes) -> list[tuple[CID, int, bool]]:
        """(image, number of the object, whether the image is complete) of a NAR, complete images first."""
        return self._places("nar", nar_hash)

    def of_image(self, image: CID) -> list[tuple[bytes, bytes, int]]:
        """(hash part, NAR hash, number of the object) of an image's paths."""
        sql = "SELECT part, nar, number FROM store_paths WHERE image = ?"
        return [(part, nar, number) for part, nar, number in self._store.catalog.query(sql, image.to_bytes())]

    def _places(self, column: str, value: bytes) -> list[tuple[CID, int, bool]]:
        rows = self._store.catalog.query(
            "SELECT s.image, s.number, i.complete FROM store_paths s JOIN images i ON i.id = s.image"
            f" WHERE s.{column} = ? ORDER BY i.complete DESC, i.size LIMIT {MAX_CANDIDATES}",
            value,
        )
        return [(CID.from_bytes(image), number, bool(complete)) for image, number, complete in rows]

    def _records(self, column: str, value: bytes) -> list[Record]:
        found = []
        for id, number, complete in self._places(column, value):
            image = self._store.image(id)
            if image is not None and number < len(image.objects):
                found += [Record(signed, id, number, complete) for signed in self._candidates(image, number)]
        return found

    def _candidates(self, image: Image, number: int) -> list[SignedInfo]:
        """What the path may be; `images.paths.ImagePaths` for a single object of a closure of thousands."""
        obj = image.objects[number]
        assert obj.nar_hash is not None
        own = tuple(sorted(image.objects[index].path for index in obj.references))
        said = [each for each in claims.of_path(self._store.catalog, obj.path) if each.nar_hash == obj.nar_hash]
        if image.kind is Kind.CLOSURE:
            said = [each for each in said if each.references == own] or [claims.PathClaims(obj.path, obj.nar_hash, own)]
        found = []
        for each in said:
            try:
                info = PathInfo(
                    StorePath.from_base_name(obj.path),
                    obj.nar_hash,
                    obj.size,
                    tuple(sorted(map(StorePath.from_base_name, each.references))),
                    None if each.deriver is None else StorePath.from_base_name(each.deriver),
                    obj.ca or each.ca,
                )
                signatures = tuple(map(Signature.parse, each.signatures))
            except NixError:
                continue
            # A content address that does not give the path would only make Nix refuse what a signature proves.
            found.append(SignedInfo(info if names_path(info) else replace(info, ca=None), signatures))
        return found

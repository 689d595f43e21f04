"""What is said of store paths beside their images: signatures, references, derivers, content addresses.

An image's id vouches for names and contents; these records come from the Nix database of whoever provides it and from
peers. They are claims: `nix.trust` says which of them prove anything. They belong to path and NAR hash, not to an
image, so that what is known of a path serves every image that holds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pnode.store.catalog import Catalog
from protocols.cid import CID

MAX_VARIANTS = 4  # sets of references that are kept of one path and NAR hash: one is right, and liars get few tries
MAX_UNPROVED = 32  # signatures kept of one path without a key to check them: for peers that may have it

_REFERENCES, _SIGNATURE, _DERIVER, _CA = "refs", "sig", "deriver", "ca"


@dataclass(frozen=True, slots=True)
class PathClaims:
    """Claims about one path that refers to exactly `references`.

    `path`, `references` and `deriver` are base names, references all and sorted; `signatures` are `NAME:BASE64`.
    """

    path: str
    nar_hash: bytes
    references: tuple[str, ...]
    signatures: tuple[str, ...] = ()
    deriver: str | None = None
    ca: str | None = None


def of_image(catalog: Catalog, image: CID) -> dict[tuple[str, bytes], list[PathClaims]]:
    """All claims about paths with the NAR hashes of an image's objects, by path and NAR hash."""
    return _collected(
        catalog.query(
            "SELECT c.path, c.nar_hash, c.variant, c.kind, c.value FROM claims c JOIN nars n ON n.hash = c.nar_hash"
            " WHERE n.image = ?",
            image.to_bytes(),
        )
    )


def of_path(catalog: Catalog, path: str) -> list[PathClaims]:
    """All claims about the path with this base name, or with this hash part of 32 digits and a dash at its end."""
    rows = catalog.query(
        "SELECT path, nar_hash, variant, kind, value FROM claims WHERE path >= ? AND path < ?",
        path,
        path + "\x7f",
    )
    found = _collected(row for row in rows if row[0] == path or path.endswith("-"))
    return [each for variants in found.values() for each in variants]


def _collected(rows: Iterable[tuple[str, bytes, bytes, str, str]]) -> dict[tuple[str, bytes], list[PathClaims]]:
    variants: dict[tuple[str, bytes, bytes], dict[str, list[str]]] = {}
    for path, nar_hash, variant, kind, value in rows:
        variants.setdefault((path, nar_hash, variant), {}).setdefault(kind, []).append(value)
    found: dict[tuple[str, bytes], list[PathClaims]] = {}
    for (path, nar_hash, _), values in sorted(variants.items()):
        claims = PathClaims(
            path,
            nar_hash,
            tuple(values.get(_REFERENCES, [""])[0].split()),
            tuple(sorted(values.get(_SIGNATURE, ()))),
            min(values.get(_DERIVER, [None]), key=lambda value: value or ""),
            min(values.get(_CA, [None]), key=lambda value: value or ""),
        )
        found.setdefault((path, nar_hash), []).append(claims)
    return found


def merge(catalog: Catalog, proved: Sequence[PathClaims], unproved: Sequence[PathClaims] = ()) -> list[PathClaims]:
    """Keep claims; what was new of them.

    `proved`: by signatures that were checked, or the machine's own Nix database. Of `unproved` ones no more are kept
    than the limits above allow, and one deriver and one `ca` per path.
    """
    new: list[PathClaims] = []
    with catalog.transaction() as db:
        for claims, limited in [*((each, False) for each in proved), *((each, True) for each in unproved)]:
            key = (claims.path, claims.nar_hash)
            text = " ".join(claims.references)
            variant = hashlib.sha256(text.encode()).digest()[:16]
            known: dict[bytes, dict[str, set[str]]] = {}
            rows = db.execute("SELECT variant, kind, value FROM claims WHERE path = ? AND nar_hash = ?", key)
            for of, kind, value in rows.fetchall():
                known.setdefault(of, {}).setdefault(kind, set()).add(value)
            if limited and variant not in known and len(known) >= MAX_VARIANTS:
                continue
            here = known.get(variant, {})
            signatures = [each for each in claims.signatures if each not in here.get(_SIGNATURE, ())]
            if limited:
                signatures = signatures[: max(0, MAX_UNPROVED - len(here.get(_SIGNATURE, ())))]
            deriver = claims.deriver if _DERIVER not in here else None
            ca = claims.ca if _CA not in here else None
            added = [(_SIGNATURE, each) for each in signatures]
            added += [(kind, value) for kind, value in ((_DERIVER, deriver), (_CA, ca)) if value is not None]
            if variant not in known:
                added.append((_REFERENCES, text))
            if added:
                db.executemany(
                    "INSERT OR IGNORE INTO claims VALUES (?, ?, ?, ?, ?)",
                    ((*key, variant, kind, value) for kind, value in added),
                )
                new.append(PathClaims(*key, claims.references, tuple(signatures), deriver, ca))
        catalog.claims_generation += bool(new)
    return new


def forget_unused(catalog: Catalog) -> None:
    """Drop claims about what no image holds."""
    with catalog.transaction() as db:
        db.execute("DELETE FROM claims WHERE nar_hash NOT IN (SELECT hash FROM nars)")

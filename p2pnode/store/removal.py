"""Forgetting an image, and finding out what nobody needs any more."""

from __future__ import annotations

from p2pnode.store.catalog import Catalog
from p2pnode.store.claims import forget_unused
from p2pnode.store.records import Source
from protocols.cid import CID, DIGEST_SIZE


def image_digests(catalog: Catalog, id: CID) -> list[bytes]:
    """The distinct chunks of one image."""
    rows = catalog.query("SELECT digests FROM images WHERE id = ?", id.to_bytes())
    return _split(rows[0][0]) if rows else []


def remove_image(catalog: Catalog, id: CID) -> tuple[list[bytes], list[Source]]:
    """Drop an image's rows: the digests no longer held at all, and our own sources whose files are to be deleted.

    A source goes when it holds chunks of this image and other images need none of its; one of ours also when other
    images find what they need of it elsewhere.
    """
    with catalog.transaction() as db:
        digests = image_digests(catalog, id)
        others: set[bytes] = set()
        for (blob,) in catalog.query("SELECT digests FROM images WHERE id <> ?", id.to_bytes()):
            others.update(_split(blob))
        touched = _touched(catalog, id, digests)
        gone: set[bytes] = set()
        deleted: list[Source] = []
        for source in sorted(touched, key=lambda source: source.owned):  # the user's files first: they cost nothing
            needed = others.intersection(catalog.source_digests(source.id))
            if source.owned:
                needed = {digest for digest in needed if len(catalog.locations(digest)) == 1}
            if not needed:
                gone.update(catalog.drop_source(source.id))
                if source.owned:
                    deleted.append(source)
        key = id.to_bytes()
        db.execute("DELETE FROM images WHERE id = ?", (key,))
        db.execute("DELETE FROM nars WHERE image = ?", (key,))
        forget_unused(catalog)
        db.execute("DELETE FROM image_blocks WHERE image = ?", (key,))
        db.execute("DELETE FROM blocks WHERE cid NOT IN (SELECT cid FROM image_blocks)")
        found = catalog.held(gone)
    return [digest for digest in digests if digest in gone and digest not in found], deleted


def _touched(catalog: Catalog, id: CID, digests: list[bytes]) -> list[Source]:
    mine = set(digests)
    return [
        source
        for source in catalog.sources("1")
        if source.image == id or not mine.isdisjoint(catalog.source_digests(source.id))
    ]


def _split(blob: bytes) -> list[bytes]:
    return [blob[i : i + DIGEST_SIZE] for i in range(0, len(blob), DIGEST_SIZE)]

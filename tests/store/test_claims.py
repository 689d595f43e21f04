"""What is said of store paths: kept by path and NAR hash, merged within limits, gone with the last image."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

from p2pnode.images.directory import import_directory
from p2pnode.images.objects import ImportRun
from p2pnode.progress import silent
from p2pnode.store import Store, catalog, claims
from p2pnode.store.claims import MAX_UNPROVED, MAX_VARIANTS, PathClaims
from p2pnode.store.records import Origin
from protocols.manifest import FASTCDC, Image, ImageObject, Kind, encode_image

PATH = "1" * 32 + "-a"


def keep_tree(store: Store, tree: Path, name: str = PATH, filler: bytes = b"") -> Image:
    """A `store-path` image of a tree, in which there are two files of 300 KB."""
    tree.mkdir(parents=True)
    for number in range(2):
        (tree / f"file{number}").write_bytes(filler + bytes([number]) * 300_000)
    (obj,) = import_directory(ImportRun(store, FASTCDC, silent, lambda: False), tree)
    objects = [ImageObject(name, obj.size, obj.layout, obj.nar_hash)]
    encoded = encode_image(Kind.STORE_PATH, {}, objects)
    store.put_blocks(encoded.blocks)
    image = Image(encoded.id, Kind.STORE_PATH, {}, tuple(objects), tuple(encoded.blocks))
    store.add_image(image, name="a", origin=Origin.PROVIDED, complete=True, path=str(tree))
    return image


def test_merged_by_path_and_nar_hash(store: Store, tmp_path: Path) -> None:
    image = keep_tree(store, tmp_path / "tree")
    nar_hash = image.objects[0].nar_hash
    assert nar_hash is not None
    first = PathClaims(PATH, nar_hash, ("x", "y"), ("k:1", "k:2"), "a.drv", None)
    assert claims.merge(store.catalog, [first]) == [first]
    assert claims.merge(store.catalog, [], [first]) == []
    more = PathClaims(PATH, nar_hash, ("x", "y"), ("k:2", "k:3"), "other.drv", "fixed:x")
    assert claims.merge(store.catalog, [], [more]) == [
        PathClaims(PATH, nar_hash, ("x", "y"), ("k:3",), None, "fixed:x")
    ]
    assert claims.of_path(store.catalog, PATH) == [
        PathClaims(PATH, nar_hash, ("x", "y"), ("k:1", "k:2", "k:3"), "a.drv", "fixed:x")
    ]
    assert claims.of_path(store.catalog, PATH[:33]) == claims.of_path(store.catalog, PATH)
    assert claims.of_path(store.catalog, PATH[:-1] + "b") == []
    assert claims.of_image(store.catalog, image.id) == {(PATH, nar_hash): claims.of_path(store.catalog, PATH)}
    store.remove_image(image.id)
    assert claims.of_path(store.catalog, PATH) == []


def test_limits_hold_for_what_nothing_proves(store: Store, tmp_path: Path) -> None:
    nar_hash = keep_tree(store, tmp_path / "tree").objects[0].nar_hash
    assert nar_hash is not None
    for number in range(MAX_VARIANTS + 3):
        claims.merge(store.catalog, [], [PathClaims(PATH, nar_hash, (f"r{number}",))])
    assert len(claims.of_path(store.catalog, PATH)) == MAX_VARIANTS
    noise = PathClaims(PATH, nar_hash, ("r0",), tuple(f"k{n}:x" for n in range(100)))
    claims.merge(store.catalog, [], [noise])
    proved = [PathClaims(PATH, nar_hash, ("r0",), ("good:1",)), PathClaims(PATH, nar_hash, ("true",), ("good:2",))]
    assert claims.merge(store.catalog, proved) == proved
    found = {each.references: each.signatures for each in claims.of_path(store.catalog, PATH)}
    assert len(found) == MAX_VARIANTS + 1 and len(found["r0",]) == MAX_UNPROVED + 1


def test_a_catalog_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    with Store.open(tmp_path / "home") as store:
        image = keep_tree(store, tmp_path / "tree")
    with sqlite3.connect(tmp_path / "home/store/catalog.sqlite") as db:
        for table in ("claims", "mirrors", "mirrored", "boot"):
            db.execute(f"DROP TABLE {table}")
        db.execute("ALTER TABLE sources DROP COLUMN ctime_ns")
        db.execute("PRAGMA user_version = 1")
    with Store.open(tmp_path / "home") as store:
        assert store.verify(image.id).ok
        nar_hash = image.objects[0].nar_hash
        assert nar_hash is not None
        claims.merge(store.catalog, [PathClaims(PATH, nar_hash, (), ("k:1",))])
        assert store.catalog.query("PRAGMA user_version") == [(catalog.SCHEMA_VERSION,)]


def test_what_nix_collects_is_forgotten_and_what_a_user_moves_is_not(store: Store, tmp_path: Path) -> None:
    collected = tmp_path / "nix/store" / PATH
    image = keep_tree(store, collected, filler=b"c")
    keep_tree(store, tmp_path / "own", filler=b"o")
    lost: list[bytes] = []
    store.on_lost(lost.extend)
    assert store.forget_vanished() == []
    shutil.rmtree(collected)
    os.rename(tmp_path / "own", tmp_path / "moved")
    assert set(store.forget_vanished()) == set(lost) == set(image.chunks)
    record = store.record(image.id)
    assert record is not None and record.held_chunks == 0 and not record.complete
    assert [problem.path for problem in store.problems()] == [str(collected)]


def test_packs_go_when_every_chunk_is_in_the_nix_store(store: Store, tmp_path: Path) -> None:
    with Store.open(tmp_path / "other") as other:
        image = keep_tree(other, tmp_path / "nix/store" / PATH)
        store.put_blocks({cid: block for cid in image.blocks if (block := other.block(cid)) is not None})
        store.add_image(image, name="a", origin=Origin.FETCHED, complete=False, path=None)
        landing = store.landing(image)
        chunks = [(digest, other.read(digest)) for digest in image.chunks]
    assert all(landing.accept(digest, data) for digest, data in chunks)
    landing.close()
    assert store.stats().owned_bytes > 0
    (tmp_path / "wrong").mkdir()
    store.adopt_store_paths(image, {0: tmp_path / "wrong"}, keep_chunks=False)
    assert store.stats().owned_bytes > 0, "another tree has not the chunks"
    store.adopt_store_paths(image, {0: tmp_path / "nix/store" / PATH}, keep_chunks=True)
    assert store.stats().owned_bytes > 0
    store.adopt_store_paths(image, {0: tmp_path / "nix/store" / PATH}, keep_chunks=False)
    assert store.stats().owned_bytes == 0 and store.verify(image.id).ok

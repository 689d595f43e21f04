"""The memory of what is mirrored, pins, and what of a store is fit to be published."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pnode import local
from p2pnode.cli import status
from p2pnode.errors import NotFound, UsageError
from p2pnode.images.importer import import_path
from p2pnode.store import Store, catalog, mirrors
from p2pnode.store.mirrors import Mirrors
from p2pnode.store.records import Origin, Pin
from protocols.catalog import Entry
from protocols.cid import CID, Codec
from protocols.manifest import Image
from tests.store.samples import add, export, sample_file

PEER, OTHER = "12D3KooWSMTjKMnLmfEDoZhQH2RniDbw9jce1aNK6SnAkHVEPGaR", "12D3KooWOther"


def complete(store: Store, seed: int) -> Image:
    image, blocks, parts, _ = sample_file(seed, 3)
    add(store, image, blocks, f"image-{seed}")
    landing = store.landing(image)
    for digest, data in parts.items():
        assert landing.accept(digest, data)
    landing.close()
    export(store, image, None)
    return image


def incomplete(store: Store, seed: int) -> Image:
    image, blocks, _, _ = sample_file(seed, 3)
    add(store, image, blocks, f"image-{seed}")
    return image


def entry(image: Image, name: str = "") -> Entry:
    return Entry(image.id, name, image.size)


def pinned(store: Store, image: Image) -> bool:
    record = store.record(image.id)
    assert record is not None
    return record.pinned


def keep(store: Store, *images: Image) -> None:
    """What fetching for a mirror does."""
    for image in images:
        store.pin(image.id, Pin.MIRROR)


def test_a_publishers_list_is_followed_and_what_was_complete_is_kept(store: Store) -> None:
    here, gone, never = complete(store, 1), complete(store, 2), incomplete(store, 3)
    listed = Mirrors(store)
    listed.add(PEER, ("/ip4/192.0.2.1/tcp/1/p2p/" + PEER,), None)
    listed.keep_list(PEER, [entry(here, "a"), entry(gone, "b"), entry(never, "c")])
    keep(store, here, gone, never)
    listed.keep_list(PEER, [entry(here, "")])
    found = {each.image: each for each in listed.images(PEER)}
    assert found.keys() == {here.id, gone.id}
    assert found[here.id].listed and not found[gone.id].listed
    assert found[here.id].name == "a"  # a name once heard is kept
    assert pinned(store, here) and pinned(store, gone) and not pinned(store, never)
    listed.keep_list(PEER, [entry(gone)])
    assert all(each.listed == (each.image == gone.id) for each in listed.images(PEER))
    listed.keep_list(OTHER, [entry(here)])  # mirrored no longer, when its list came
    assert listed.wanted_by(here.id) == [PEER]


def test_a_pin_lasts_as_long_as_anybody_wants_the_image(store: Store) -> None:
    one, two = complete(store, 1), complete(store, 2)
    listed = Mirrors(store)
    listed.add(PEER, (), None)
    listed.add(str(one.id), (), "one")
    listed.keep_list(PEER, [entry(one), entry(two)])
    keep(store, one, two)
    store.pin(two.id, Pin.USER)
    listed.stop(PEER)
    assert pinned(store, one) and pinned(store, two)
    listed.stop(str(one.id))
    assert not pinned(store, one) and pinned(store, two)
    store.pin(two.id, Pin.USER, False)
    assert not pinned(store, two)
    assert listed.all() == []


def test_rm_and_unpin_of_what_is_mirrored(store: Store) -> None:
    image = complete(store, 1)
    listed = Mirrors(store)
    listed.add(PEER, (), None)
    listed.keep_list(PEER, [entry(image)])
    keep(store, image)
    for refused in (local.remove, lambda *args: local.pin(*args, pinned=False)):
        with pytest.raises(UsageError, match=f"mirror --stop {PEER}"):
            refused(store, "image-1")
    listed.keep_list(PEER, [])  # the publisher has collected it
    with pytest.raises(UsageError, match="p2pnode unpin"):
        local.remove(store, "image-1")
    assert local.pin(store, "image-1", pinned=False)["pinned"] is False
    assert listed.images(PEER) == []
    assert local.remove(store, "image-1")[0]["image"] == str(image.id)


def test_things_are_found_as_users_name_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    image = complete(store, 1)
    listed = Mirrors(store)
    listed.add(str(image.id), ("/ip4/192.0.2.1/tcp/1/p2p/" + PEER,), "web")
    listed.add(PEER, (), None)
    listed.add(OTHER, (), None)
    for text in (str(image.id), str(image.id)[:12], "web", f"p2pnode:{image.id}?name=other"):
        assert local.find_mirror(store, text).thing == str(image.id)
    for text in (PEER, PEER[:14], f"/ip4/192.0.2.9/tcp/9/p2p/{PEER}"):
        assert local.find_mirror(store, text).thing == PEER
    with pytest.raises(UsageError, match="2 of the things"):
        local.find_mirror(store, "12D3KooW")
    for text in ("nothing", "12D3", "%", "", "12D3Koo_"):
        with pytest.raises(NotFound):
            local.find_mirror(store, text)
    listed.looked(PEER, "a problem")
    listed.judged(str(image.id), image.id, "another")
    first, second, third = local.mirrors(store)
    assert (first["kind"], first["name"], first["complete"]) == ("image", "web", True)
    assert (first["bytes"], first["held_bytes"]) == (image.size, image.size)
    assert (second["kind"], second["problem"], second["complete"]) == ("publisher", "a problem", False)
    assert second["looked"] and third["looked"] is None and third["complete"] is False
    assert first["images"][0]["problem"] == "another"
    again = listed.add(str(image.id), ("/ip4/192.0.2.2/tcp/1/p2p/" + PEER,), None)
    assert [addr.split("/")[2] for addr in again.addrs] == ["192.0.2.2", "192.0.2.1"]
    monkeypatch.setattr(mirrors, "MAX_MIRRORS", 3)
    with pytest.raises(UsageError, match="already"):
        listed.add("12D3KooWFourth", (), None)


def test_what_went_wrong_waits_at_the_end(store: Store) -> None:
    images = [incomplete(store, seed) for seed in range(4)]
    listed = Mirrors(store)
    listed.add(PEER, (), None)
    listed.keep_list(PEER, [entry(image) for image in images])
    first = listed.images(PEER)[0].image
    listed.judged(PEER, first, "nobody has it")
    assert listed.images(PEER)[-1].image == first
    listed.judged(PEER, first, None)
    assert listed.images(PEER)[0].image == first


NUMBERS = st.lists(st.integers(1, 6), unique=True)


@given(st.lists(st.tuples(st.sampled_from([PEER, OTHER, "stop " + PEER]), NUMBERS), max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_pinned_is_what_something_wants(store: Store, steps: list[tuple[str, list[int]]]) -> None:
    images = {seed: (complete if seed % 2 else incomplete)(store, seed) for seed in range(1, 7)}
    listed = Mirrors(store)
    for thing in (PEER, OTHER):
        listed.add(thing, (), None)
    for thing, numbers in steps:
        if thing.startswith("stop "):
            listed.stop(PEER)
            listed.add(PEER, (), None)
        else:
            listed.keep_list(thing, [entry(images[number]) for number in numbers])
            keep(store, *(images[number] for number in numbers))
        for image in images.values():
            assert pinned(store, image) == bool(listed.wanted_by(image.id))
    for thing in (PEER, OTHER):
        listed.stop(thing)
    assert not any(pinned(store, image) for image in images.values())


def test_only_complete_images_of_ones_own_are_published_in_pages(store: Store, tmp_path: Path) -> None:
    own = []
    for number in range(7):
        path = tmp_path / f"own-{number}"
        path.write_bytes(bytes([number]) * 1000)
        own.append(import_path(store, path).image.id)
    complete(store, 1)
    (tmp_path / "own-0").unlink()
    gone = store.image(own[0])
    assert gone is not None and not store.look_again(gone.chunks)
    expected = sorted(own[1:], key=CID.to_bytes)
    found: list[CID] = []
    while page := store.provided(found[-1] if found else None, 4):
        assert len(page) <= 4 and all(each.origin is Origin.PROVIDED for each in page)
        found += [each.id for each in page]
    assert found == expected


def test_what_is_gone_is_forgotten(store: Store, tmp_path: Path) -> None:
    kept, tree = tmp_path / "file", tmp_path / "tree"
    kept.write_bytes(b"f" * 100_000)
    tree.mkdir()
    (tree / "x").write_bytes(b"t" * 100_000)
    fetched = complete(store, 1)
    images = [fetched, *(import_path(store, path).image for path in (kept, tree))]
    for image in images:
        assert store.look_again(image.chunks)
    next((tmp_path / "home/store/packs").iterdir()).unlink()
    kept.write_bytes(b"g" * 100_000)
    (tree / "x").unlink()
    tree.rmdir()
    for image in images:
        assert not store.look_again(image.chunks)
        record = store.record(image.id)
        assert record is not None and not record.complete and record.held_chunks == 0


def test_a_catalog_of_the_second_version_is_taken_over(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        image = complete(store, 1)
    with sqlite3.connect(tmp_path / "store/catalog.sqlite") as db:
        db.execute("DROP TABLE mirrors")
        db.execute("DROP TABLE mirrored")
        db.execute("ALTER TABLE sources DROP COLUMN ctime_ns")
        db.execute("DROP TABLE boot")
        db.execute("PRAGMA user_version = 2")
    with Store.open(tmp_path) as store:
        assert store.catalog.query("PRAGMA user_version") == [(catalog.SCHEMA_VERSION,)]
        assert Mirrors(store).all() == [] and store.verify(image.id).ok


def test_an_image_id_and_a_peer_id_are_told_apart(store: Store) -> None:
    image = CID(Codec.DAG_CBOR, bytes(32))
    assert Mirrors(store).add(str(image), (), None).image == image
    assert Mirrors(store).add(PEER, (), None).image is None


def test_status_tells_of_mirrors_in_short(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.mirror_states(store) == []
    here, also, never = complete(store, 1), complete(store, 2), incomplete(store, 3)
    listed = Mirrors(store)
    listed.add(PEER, (), None)
    listed.add(str(here.id), (), None)
    listed.add(OTHER, (), None)
    listed.keep_list(PEER, [entry(here), entry(also), entry(never)])
    listed.judged(PEER, never.id, "nobody has it")
    listed.looked(PEER, "1 of 3 images: nobody has it")
    listed.looked(str(here.id), None)
    states = local.mirror_states(store)
    assert [(each["mirror"], each["kind"]) for each in states] == [
        (PEER, "publisher"),
        (str(here.id), "image"),
        (OTHER, "publisher"),
    ]
    assert [(each["complete_images"], each["images"]) for each in states] == [(2, 3), (1, 1), (0, 0)]
    assert [each["name"] for each in states] == [None, "image-1", None]
    (location,) = store.catalog.locations(next(iter(also.chunks)))
    store.forget_source(location.source.id)
    assert local.mirror_states(store)[0]["complete_images"] == 1

    pairs = status._mirrors(local.mirror_states(store))
    assert pairs == [
        ("mirrors", f"{PEER}: 1 of 3 images complete; 1 of 3 images: nobody has it"),
        ("mirrors", "image-1: complete"),
        ("mirrors", f"{OTHER}: not looked at yet"),
    ]
    monkeypatch.setattr(status, "MAX_MIRRORS", 1)
    assert status._mirrors(local.mirror_states(store)) == [
        pairs[0],
        ("mirrors", "and 2 more; `p2pnode mirror` lists them"),
    ]


def test_damage_to_a_copy_that_the_publisher_has_no_more_lets_nothing_go(store: Store) -> None:
    """It may be the last: it is mended from wherever it can be, and told of until then."""
    image = complete(store, 1)
    listed = Mirrors(store)
    listed.add(PEER, (), None)
    listed.keep_list(PEER, [entry(image)])
    keep(store, image)
    listed.keep_list(PEER, [])
    digest = next(iter(image.chunks))
    store.catalog.drop_chunk(digest, store.catalog.locations(digest)[0].source.id)
    listed.keep_list(PEER, [])
    (row,) = listed.images(PEER)
    assert row.image == image.id and not row.listed and not row.complete
    assert pinned(store, image)
    assert local.mirror_states(store)[0]["complete_images"] == 0
    local.pin(store, str(image.id), pinned=False)  # until somebody here lets it go
    assert listed.images(PEER) == [] and not pinned(store, image)

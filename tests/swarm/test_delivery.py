"""Into a real Nix store through a real daemon, over an in-memory network: interruptions, and stores that differ."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2pnode.errors import DaemonError, DiskFull, OutputExists, VerificationFailed
from p2pnode.images.importer import import_path
from p2pnode.images.paths import keep_claims
from p2pnode.nix.cache_dir import CacheDir, to_cache
from p2pnode.nix.daemon import DaemonConnection, OpenNar
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import SecretKey, SignedInfo
from p2pnode.nix.storepath import StorePath
from p2pnode.nix.trust import TrustedKeys
from p2pnode.nix.trust_policy import Trust
from p2pnode.store.records import Origin
from p2pnode.swarm.delivery import IntoStore, ToCache
from p2pnode.swarm.fetcher import Fetched
from protocols.manifest import Image, ImageObject, Kind, encode_image
from tests.nix.stores import ChrootStore, NixDaemon

from .peers import Peer, World

pytestmark = pytest.mark.nix

KEY = SecretKey.generate("ours-1")
TRUST = Trust(TrustedKeys([KEY.public_key()]), True)
DEP, LIB, TOP = [StorePath(digit * 32, name) for digit, name in (("1", "dep"), ("2", "lib"), ("3", "top"))]
SIZE = 1 << 20


def data(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChrootStore]:
    """The consumer's Nix store, with a daemon that `fetch` finds."""
    made = ChrootStore(tmp_path / "c", f"trusted-public-keys = {KEY.public_key()}")
    with NixDaemon(made):
        yield made


@pytest.fixture
async def seed(world: World, tmp_path: Path) -> tuple[Peer, Image]:
    source = ChrootStore(tmp_path / "source")
    source.register([(DEP, data("dep"), []), (LIB, data("lib"), [DEP]), (TOP, data("top"), [LIB, TOP])])
    peer = await world.peer("seed")
    image = import_path(peer.store, Path(str(TOP)), nix_store=source.root).image
    await keep_claims(peer.store, image, source.root, [KEY])
    peer.router.provide([image.id.to_bytes()])
    return peer, image


async def fetch(peer: Peer, image: Image, store: ChrootStore, link: Path | None = None) -> Fetched:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIX_DAEMON_SOCKET_PATH", str(store.base / "socket"))
        return await peer.fetch(image.id, to=IntoStore(store.root, link), trust=TRUST)


async def test_an_import_that_stops_halfway_goes_on(
    world: World, seed: tuple[Peer, Image], store: ChrootStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leech, image = await world.peer("leech"), seed[1]
    add_path = DaemonConnection.add_path

    async def failing(
        self: DaemonConnection, signed: SignedInfo, open_nar: OpenNar, *, check_signatures: bool = True
    ) -> None:
        if signed.info.path == LIB:
            raise DiskFull("the Nix store is full")
        await add_path(self, signed, open_nar, check_signatures=check_signatures)

    link = tmp_path / "result"
    monkeypatch.setattr(DaemonConnection, "add_path", failing)
    with pytest.raises(DiskFull):
        await fetch(leech, image, store, link)
    assert store.valid() == {DEP} and not os.path.lexists(link)
    assert leech.store.stats().owned_bytes >= 2 * SIZE, "what came is kept for the next try"
    monkeypatch.undo()
    again = await fetch(leech, image, store, link)
    assert again.received_bytes < 1.5 * SIZE  # what was in flight when it stopped: at most the third
    assert again.delivered == {"store": {"added": 2, "present": 1, "root": str(link)}}
    assert store.valid() == {DEP, LIB, TOP}
    assert leech.store.stats().owned_bytes == 0 and leech.store.verify(image.id).ok


async def test_a_path_that_was_built_differently_here_is_left_alone(
    world: World, seed: tuple[Peer, Image], store: ChrootStore
) -> None:
    leech, image = await world.peer("leech"), seed[1]
    store.register([(DEP, b"built here, and not reproducible", [])])
    fetched = await fetch(leech, image, store)
    assert fetched.delivered["store"] == {"added": 2, "present": 1, "root": None}
    assert 2 * SIZE < fetched.received_bytes < 2.5 * SIZE
    assert store.real(DEP).read_bytes() == b"built here, and not reproducible"
    record = leech.store.record(image.id)
    assert record is not None and not record.complete and 0 < record.held_chunks < record.chunks
    assert not leech.store.verify(image.id).ok
    assert not leech.store.record(image.id).complete  # type: ignore[union-attr]
    # The next one gets from the leech what it has, and the rest from the seed.
    other = await world.peer("other")
    leech.router.provide([image.id.to_bytes()])
    await other.fetch(image.id)
    assert other.store.verify(image.id).ok


async def test_what_was_there_makes_the_image_complete_once_it_was_read(
    world: World, seed: tuple[Peer, Image], store: ChrootStore
) -> None:
    leech, image = await world.peer("leech"), seed[1]
    store.register([(DEP, data("dep"), [])])
    await fetch(leech, image, store)
    record = leech.store.record(image.id)
    assert record is not None and record.held_chunks == record.chunks and not record.complete
    assert leech.store.verify(image.id).ok
    record = leech.store.record(image.id)
    assert record is not None and record.complete


async def test_an_image_that_lies_about_what_is_there_spoils_no_import(
    world: World, seed: tuple[Peer, Image], store: ChrootStore
) -> None:
    """Right names and NAR hashes, wrong chunks: what Nix has is not read, so nobody notices until it is provided."""
    leech, (peer, image) = await world.peer("leech"), seed
    store.register([(DEP, data("dep"), []), (LIB, data("lib"), [DEP]), (TOP, data("top"), [LIB, TOP])])
    objects = [replace(obj, layout=image.objects[number - 1].layout) for number, obj in enumerate(image.objects)]
    encoded = encode_image(Kind.CLOSURE, image.attributes, objects)
    peer.store.put_blocks(encoded.blocks)
    bad = Image(encoded.id, Kind.CLOSURE, image.attributes, tuple(objects), tuple(encoded.blocks))
    peer.store.add_image(bad, name="bad", origin=Origin.PROVIDED, complete=True, path=None)
    peer.router.provide([bad.id.to_bytes()])
    for _ in range(2):
        fetched = await fetch(leech, bad, store)
        assert fetched.delivered["store"] == {"added": 0, "present": 3, "root": None}
    assert import_path(leech.store, Path(str(TOP)), nix_store=store.root).image.id == image.id
    assert leech.store.verify(image.id).ok
    assert not leech.store.verify(bad.id).ok


async def test_one_path_needs_its_references_in_the_store(
    world: World, seed: tuple[Peer, Image], store: ChrootStore, tmp_path: Path
) -> None:
    leech, peer = await world.peer("leech"), seed[0]
    image = import_path(peer.store, Path(str(LIB)), kind=Kind.STORE_PATH, nix_store=tmp_path / "source/root").image
    peer.router.provide([image.id.to_bytes()])
    with pytest.raises(DaemonError, match="is not valid"):
        await fetch(leech, image, store)
    store.register([(DEP, data("dep"), [])])
    fetched = await fetch(leech, image, store)
    assert fetched.delivered["store"]["added"] == 1 and fetched.received_bytes == 0
    assert store.info(LIB)[0].info.references == (DEP,)


@pytest.fixture
async def cache(seed: tuple[Peer, Image], tmp_path: Path) -> Path:
    """A binary cache with all paths of the image, unsigned."""
    source = ChrootStore(tmp_path / "source")
    await to_cache(CacheDir(tmp_path / "cache"), source.info(DEP, LIB, TOP), source.open_nar)
    return tmp_path / "cache"


@pytest.mark.parametrize("planted", [{"nar_hash": bytes(32)}, {"references": ()}], ids=["contents", "references"])
async def test_a_cache_with_something_else_is_told_of_before_anything_is_fetched(
    world: World, seed: tuple[Peer, Image], cache: Path, planted: dict[str, Any]
) -> None:
    leech, image = await world.peer("leech"), seed[1]
    (cache / f"{DEP.digest}.narinfo").unlink()
    file = cache / f"{LIB.digest}.narinfo"
    narinfo = parse(file.read_bytes())
    file.write_text(replace(narinfo, info=replace(narinfo.info, **planted)).format())
    before = {each.name: each.read_bytes() for each in cache.glob("*.narinfo")}
    with pytest.raises(OutputExists, match=str(LIB)):
        await leech.fetch(image.id, to=ToCache(cache, (KEY,)))
    assert {each.name: each.read_bytes() for each in cache.glob("*.narinfo")} == before
    assert leech.exchange.traffic("seed").received < SIZE


@pytest.mark.parametrize("demanded", [False, True])
async def test_what_nothing_proves_does_not_get_our_signature(
    world: World, seed: tuple[Peer, Image], cache: Path, demanded: bool
) -> None:
    """Where proof is demanded, a path that was in the cache before is not taken for proved."""
    leech, image = await world.peer("leech"), seed[1]
    mine, stranger = SecretKey.generate("mine-1"), SecretKey.generate("stranger-1")
    trust = Trust(TrustedKeys([stranger.public_key()]), demanded)
    fetched = await leech.fetch(image.id, to=ToCache(cache, (mine,)), trust=trust)
    assert fetched.delivered["cache"]["present"] == 3
    for path in (DEP, LIB, TOP):
        names = {each.key_name for each in parse((cache / f"{path.digest}.narinfo").read_bytes()).signatures}
        assert ("mine-1" in names) is not demanded


async def test_references_in_a_circle_are_the_images_fault(
    world: World, seed: tuple[Peer, Image], store: ChrootStore
) -> None:
    leech, (peer, image) = await world.peer("leech"), seed
    objects = [
        ImageObject(obj.path, obj.size, obj.layout, obj.nar_hash, None, references)
        for obj, references in zip(image.objects, ((1,), (2,), (0,)), strict=True)
    ]
    encoded = encode_image(Kind.CLOSURE, {"root": 2}, objects)
    peer.store.put_blocks(encoded.blocks)
    bad = Image(encoded.id, Kind.CLOSURE, {"root": 2}, tuple(objects), tuple(encoded.blocks))
    peer.store.add_image(bad, name="bad", origin=Origin.PROVIDED, complete=True, path=None)
    peer.router.provide([bad.id.to_bytes()])
    with pytest.raises(VerificationFailed, match="refers to itself"):
        await leech.fetch(bad.id, to=IntoStore(store.root), trust=Trust(TRUST.keys, False))
    assert store.valid() == set()


async def test_what_the_disk_damaged_comes_again(world: World, seed: tuple[Peer, Image], store: ChrootStore) -> None:
    """The daemon gets chunks as they were written; that it refuses them makes us look again."""
    leech, image = await world.peer("leech"), seed[1]
    await leech.fetch(image.id, trust=TRUST)
    (source,) = leech.store.catalog.sources("owned")
    with source.path.open("r+b") as pack:
        pack.seek(200_000)
        byte = pack.read(1)
        pack.seek(200_000)
        pack.write(bytes([byte[0] ^ 1]))
    again = await fetch(leech, image, store)
    assert 0 < again.received_bytes < SIZE, "the damaged chunk, and nothing else"
    assert store.valid() == {DEP, LIB, TOP} and store.real(DEP).read_bytes() == data("dep")
    assert leech.store.stats().owned_bytes == 0 and leech.store.verify(image.id).ok


async def test_contents_that_a_signature_was_not_made_for_are_the_images_fault(
    world: World, seed: tuple[Peer, Image], store: ChrootStore
) -> None:
    leech, (peer, image) = await world.peer("leech"), seed
    dep, lib, top = image.objects
    objects = [ImageObject(dep.path, dep.size, lib.layout, dep.nar_hash, None, dep.references), lib, top]
    encoded = encode_image(Kind.CLOSURE, {"root": 2}, objects)
    peer.store.put_blocks(encoded.blocks)
    bad = Image(encoded.id, Kind.CLOSURE, {"root": 2}, tuple(objects), tuple(encoded.blocks))
    peer.store.add_image(bad, name="bad", origin=Origin.PROVIDED, complete=True, path=None)
    peer.router.provide([bad.id.to_bytes()])
    with pytest.raises(VerificationFailed, match="NAR hash is not the one its image promises"):
        await fetch(leech, bad, store)
    assert store.valid() == set()
    record = leech.store.record(bad.id)
    assert record is not None and not record.complete


async def test_a_path_that_somebody_else_makes_valid_meanwhile_is_left_alone(
    world: World, seed: tuple[Peer, Image], store: ChrootStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    leech, image = await world.peer("leech"), seed[1]
    add_path = DaemonConnection.add_path

    async def late(self: DaemonConnection, signed: SignedInfo, *args: Any, **options: Any) -> None:
        if signed.info.path == DEP:
            store.register([(DEP, b"built here, and not reproducible", [])])
        await add_path(self, signed, *args, **options)

    monkeypatch.setattr(DaemonConnection, "add_path", late)
    fetched = await fetch(leech, image, store)
    assert fetched.delivered["store"]["added"] == 2
    assert store.real(DEP).read_bytes() == b"built here, and not reproducible"
    assert leech.store.verify(image.id).ok, "the image's own contents of it are kept"

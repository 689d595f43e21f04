"""Signatures and other records beside an image: told, asked, merged, judged; and peers that lie about them."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pnode.errors import Untrusted, VerificationFailed
from p2pnode.images.objects import ImportRun
from p2pnode.images.paths import ImagePaths, claims_of
from p2pnode.net.transport import Stream
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.content_address import names_path
from p2pnode.nix.signatures import SecretKey, Signature, SignedInfo
from p2pnode.nix.storepath import CAMethod, ContentAddress, StorePath, make_fixed_output_path
from p2pnode.nix.trust import TrustedKeys
from p2pnode.nix.trust_policy import Trust
from p2pnode.progress import silent
from p2pnode.store import Store, claims
from p2pnode.store.records import Origin
from p2pnode.swarm.records import FORGED, MALFORMED, MAX_REPEATS, REPETITIVE, RecordBook
from protocols.cid import CID, Codec
from protocols.exchange import PROTOCOL_ID
from protocols.exchange import messages as m
from protocols.manifest import FASTCDC, Image, ImageObject, Kind, encode_image

from .peers import Peer, World, content

KEY, OTHER = SecretKey.generate("ours-1"), SecretKey.generate("theirs-1")
KEYS = TrustedKeys([KEY.public_key()])
DEMANDED = Trust(KEYS, True)
A, B = StorePath("1" * 32, "a"), StorePath("2" * 32, "b")
STRANGE = StorePath("3" * 32, "outside")


def keep_image(store: Store, tmp_path: Path, *, kind: Kind = Kind.CLOSURE, ca: str | None = None) -> Image:
    """An image of B, which refers to A and itself; as `store-path` of B alone."""
    objects = []
    for path, references in ((A, ()), (B, (0, 1))):
        (tmp_path / path.base_name).write_bytes(content(300_000))
        obj = ImportRun(store, FASTCDC, silent, lambda: False).nar(tmp_path / path.base_name, path.base_name)
        objects.append(ImageObject(obj.path, obj.size, obj.layout, obj.nar_hash, None, references, ca))
    attributes = {"root": 1}
    if kind is Kind.STORE_PATH:
        objects, attributes = [replace(objects[1], references=(0,))], {}
    encoded = encode_image(kind, attributes, objects)
    store.put_blocks(encoded.blocks)
    image = Image(encoded.id, kind, attributes, tuple(objects), tuple(encoded.blocks))
    store.add_image(image, name="b", origin=Origin.PROVIDED, complete=True, path=None)
    return image


def sign(store: Store, image: Image, *keys: SecretKey) -> list[SignedInfo]:
    paths = ImagePaths(store, image)
    infos = [paths.info(number) for number in range(len(image.objects))]
    return [SignedInfo(info, tuple(key.sign(info) for key in keys)) for info in infos]


def keep_signed(store: Store, image: Image, *keys: SecretKey) -> None:
    claims.merge(store.catalog, list(map(claims_of, sign(store, image, *keys))))


def kept(peer: Peer, image: Image) -> list[tuple[str, ...]]:
    paths = ImagePaths(peer.store, image)
    return [tuple(text for each in paths.claims(n) for text in each.signatures) for n in range(len(image.objects))]


def provide(peer: Peer, image: Image) -> None:
    peer.router.provide([image.id.to_bytes()])


async def test_signatures_come_with_the_image_and_go_on_to_the_next(world: World, tmp_path: Path) -> None:
    seed, middle, last = [await world.peer(name, KEYS) for name in ("seed", "middle", "last")]
    image = keep_image(seed.store, tmp_path)
    keep_signed(seed.store, image, KEY, OTHER)
    provide(seed, image)
    await middle.fetch(image.id, trust=DEMANDED)
    await world.fabric.stop("seed")
    world.registry.clear()
    provide(middle, image)
    await last.fetch(image.id, out=tmp_path / "out", trust=DEMANDED)
    assert kept(last, image) == kept(seed, image)
    assert [len(each) for each in kept(last, image)] == [2, 2]
    assert (tmp_path / "out" / B.base_name).is_file()


async def test_what_no_key_of_ours_signed_is_not_exported(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech", KEYS)
    image = keep_image(seed.store, tmp_path)
    keep_signed(seed.store, image, OTHER)
    provide(seed, image)
    began = trio.current_time()
    with pytest.raises(Untrusted, match=r"/nix/store/1+-a is not trusted: it is signed by 'theirs-1'.*'ours-1'"):
        await leech.fetch(image.id, out=tmp_path / "out", trust=DEMANDED)
    assert trio.current_time() - began < 5  # the only peer has said all it knows: nothing to wait for
    assert not (tmp_path / "out").exists()
    assert leech.store.record(image.id).complete is False  # type: ignore[union-attr]


async def test_a_signature_that_comes_during_the_fetch_counts(world: World, tmp_path: Path) -> None:
    """The provider has one path signed only after the fetch has begun."""
    seed, leech = await world.peer("seed"), await world.peer("leech", KEYS)
    image = keep_image(seed.store, tmp_path)
    provide(seed, image)
    searching = trio.Event()

    async def slow_discovery(root: CID) -> int:
        searching.set()
        await leech.exchange.join("seed")
        await trio.sleep_forever()
        return 0

    leech.fetcher._discover = slow_discovery

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: leech.fetch(image.id, trust=DEMANDED))
        await searching.wait()
        with trio.fail_after(10):
            while "seed" not in leech.exchange.records.told_all(image.id):
                await leech.exchange.records.heard()
        keep_signed(seed.store, image, KEY)
        await seed.exchange.tell(image.id)
    assert leech.store.record(image.id).complete  # type: ignore[union-attr]


async def test_a_store_path_alone_brings_its_references(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech", KEYS)
    image = keep_image(seed.store, tmp_path, kind=Kind.STORE_PATH)
    info = replace(ImagePaths(seed.store, image).info(0), references=tuple(sorted((A, B, STRANGE))))
    claims.merge(seed.store.catalog, [claims_of(SignedInfo(info, (KEY.sign(info),)))])
    provide(seed, image)
    await leech.fetch(image.id, trust=DEMANDED)
    (found,) = ImagePaths(leech.store, image).candidates(0)
    assert found.info.references == info.references


# Peers that lie


def speaker(image: Image, store: Store, frames: Sequence[m.Records]) -> Callable[[Stream], Awaitable[None]]:
    """A peer that has the image and says `frames` of it."""

    async def handle(stream: Stream) -> None:
        reader = m.FrameReader()
        await stream.send_parts(m.encode(m.Hello()))
        while data := await stream.receive_some(1 << 16):
            for message in reader.feed(data):
                if isinstance(message, m.Interest) and message.active:
                    await stream.send_parts(m.encode(m.Availability(message.root, len(image.chunks))))
                    for frame in frames:
                        await stream.send_parts(m.encode(frame))
                elif isinstance(message, m.Want):
                    for key in message.ids:
                        cid = CID.from_bytes(key)
                        block = store.block(cid) if cid.codec is Codec.DAG_CBOR else store.read(cid.digest)
                        assert block is not None
                        await stream.send_parts(m.encode(m.Block(key, m.Encoding.RAW, len(block), (block,))))

    return handle


async def test_forged_signatures_do_not_pass_and_true_ones_do(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech", KEYS)
    image = keep_image(seed.store, tmp_path)
    forged = tuple(str(Signature(KEY.name, bytes([n]) * 64)) for n in range(64))
    lies = m.Records(image.id, tuple(m.PathRecord(n, forged) for n in range(2)))
    world.fabric.node("bad").handle(PROTOCOL_ID, speaker(image, seed.store, [lies]))
    world.registry[image.id.to_bytes()] = {"bad"}
    with pytest.raises(Untrusted):
        await leech.fetch(image.id, out=tmp_path / "out", trust=DEMANDED)
    assert kept(leech, image) == [(), ()]
    assert "bad" not in leech.exchange.bans  # once per image is no ban: it may have been told so itself

    honest = await world.peer("honest")
    keep_image(honest.store, tmp_path)
    keep_signed(honest.store, image, KEY)
    world.registry[image.id.to_bytes()] = {"bad", "honest"}
    await leech.fetch(image.id, out=tmp_path / "out", trust=DEMANDED)
    assert [len(each) for each in kept(leech, image)] == [1, 1]


async def test_a_content_address_is_believed_when_the_contents_have_it(world: World, tmp_path: Path) -> None:
    """`ca` of a flat file proves its path only together with the file."""
    seed, leech = await world.peer("seed"), await world.peer("leech", KEYS)
    data = content(400_000)
    for claimed, error in ((data, None), (b"something else", Untrusted)):
        address = ContentAddress(CAMethod.FLAT, "sha256", hashlib.sha256(claimed).digest())
        path = make_fixed_output_path(address, "flat", (), self_reference=False)
        (tmp_path / path.base_name).write_bytes(data)
        obj = ImportRun(seed.store, FASTCDC, silent, lambda: False).nar(tmp_path / path.base_name, path.base_name)
        encoded = encode_image(Kind.STORE_PATH, {}, [replace(obj, ca=str(address))])
        seed.store.put_blocks(encoded.blocks)
        image = Image(encoded.id, Kind.STORE_PATH, {}, (replace(obj, ca=str(address)),), tuple(encoded.blocks))
        seed.store.add_image(image, name="flat", origin=Origin.PROVIDED, complete=True, path=None)
        assert names_path(ImagePaths(seed.store, image).info(0))
        provide(seed, image)
        if error is None:
            await leech.fetch(image.id, out=tmp_path / "good", trust=DEMANDED)
            assert (tmp_path / "good").read_bytes() == data
        else:
            with pytest.raises(error):
                await leech.fetch(image.id, out=tmp_path / "bad", trust=DEMANDED)
            assert not (tmp_path / "bad").exists()


@pytest.fixture
async def book(world: World, tmp_path: Path) -> tuple[RecordBook, Peer, Image]:
    peer = await world.peer("p", KEYS)
    return RecordBook(peer.store, KEYS), peer, keep_image(peer.store, tmp_path)


async def test_what_is_held_against_a_peer(book: tuple[RecordBook, Peer, Image]) -> None:
    records, peer, image = book
    forged = m.Records(image.id, (m.PathRecord(0, (str(Signature(KEY.name, bytes(64))),)),))
    assert (await records.learn("x", forged)).fault == FORGED
    assert (await records.learn("x", forged)).fault is None  # once per image
    assert (await records.learn("y", m.Records(image.id, (m.PathRecord(2),)))).fault == MALFORMED
    assert (await records.learn("z", m.Records(image.id, (m.PathRecord(0, ("no signature",)),)))).fault == MALFORMED
    unknown = m.Records(image.id, (m.PathRecord(0, (str(Signature("who-1", bytes(64))),)),))
    assert (await records.learn("u", unknown)).fault is None  # noise, to us
    faults = [(await records.learn("r", m.Records(image.id, ()))).fault for _ in range(MAX_REPEATS * 10 + 1)]
    assert faults == [None] * (MAX_REPEATS * 10) + [REPETITIVE]
    assert kept(peer, image) == [unknown.paths[0].signatures, ()]


async def test_noise_is_bounded_and_does_not_crowd_out_the_truth(book: tuple[RecordBook, Peer, Image]) -> None:
    records, peer, image = book
    for frame in range(4):
        noise = tuple(str(Signature(f"noise-{frame}-{n}", bytes(64))) for n in range(m.MAX_SIGNATURES))
        await records.learn("bad", m.Records(image.id, (m.PathRecord(0, noise),)))
    assert len(kept(peer, image)[0]) == claims.MAX_UNPROVED
    good = str(sign(peer.store, image, KEY)[0].signatures[0])
    learnt = await records.learn("good", m.Records(image.id, (m.PathRecord(0, (good,)),)))
    assert good in kept(peer, image)[0]
    assert learnt.news == (m.Records(image.id, (m.PathRecord(0, (good,)),)),)
    assert (await records.learn("another", m.Records(image.id, (m.PathRecord(0, (good,)),)))).news == ()


async def test_false_content_addresses_and_derivers_do_no_harm(book: tuple[RecordBook, Peer, Image]) -> None:
    records, peer, image = book
    lie = m.PathRecord(0, (), (), f"{A.base_name}.drv", "fixed:r:sha256:" + "0" * 52)
    assert (await records.learn("bad", m.Records(image.id, (lie,)))).fault is None
    (found,) = ImagePaths(peer.store, image).candidates(0)
    assert found.info.ca is None and found.info.deriver == StorePath(A.digest, "a.drv")
    assert isinstance(found.info, PathInfo)


async def test_images_whose_objects_are_no_store_paths_are_refused(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "tree").write_bytes(b"x" * 1000)
    obj = ImportRun(seed.store, FASTCDC, silent, lambda: False).nar(tmp_path / "tree", "tree")
    encoded = encode_image(Kind.CLOSURE, {"root": 0}, [obj])
    seed.store.put_blocks(encoded.blocks)
    image = Image(encoded.id, Kind.CLOSURE, {"root": 0}, (obj,), tuple(encoded.blocks))
    seed.store.add_image(image, name="t", origin=Origin.PROVIDED, complete=True, path=None)
    provide(seed, image)
    with pytest.raises(VerificationFailed):
        await leech.fetch(image.id, out=tmp_path / "out")

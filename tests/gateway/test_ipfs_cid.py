"""`IpfsCid` in a narinfo: a walk from there over blocks and nothing else gives the NAR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cbor2
import httpx
import pytest
import trio

from p2pnode.errors import DiskFull
from p2pnode.nix.narinfo import parse
from p2pnode.store import Store
from p2pnode.swarm.exchange import manifest_id
from protocols.cid import CID, Codec
from protocols.exchange.messages import Payload
from tests.gateway.nodes import Node, Path_, World
from tests.swarm.peers import content

ONE, FEW, MANY = 1000, 1 << 20, 8 << 20  # bytes: one chunk; some, which an image inlines; more than it inlines


def walk(store: Store, cid: CID) -> Iterator[bytes]:
    """The raw blocks below `cid`, in order, as any IPLD tool finds them: by their links alone."""
    if cid.codec is Codec.RAW:
        data = bytes(store.read(cid.digest))
        assert cid.matches(data)
        yield data
        return
    block = store.block(cid)
    assert block is not None and cid.matches(block)
    stack: list[Any] = [cbor2.loads(block)]
    while stack:
        match stack.pop():
            case cbor2.CBORTag(tag=42, value=link):
                yield from walk(store, CID.from_bytes(link[1:]))
            case list() as items:
                stack.extend(reversed(items))
            case dict() as fields:
                stack.extend(reversed(fields.values()))


async def ipfs_cid(client: httpx.AsyncClient, path: Path_) -> CID | None:
    answer = await client.get(path.narinfo_url)
    narinfo = parse(answer.content, expect=path.path)
    return None if narinfo.ipfs_cid is None else CID.parse(narinfo.ipfs_cid)


async def root_of(client: httpx.AsyncClient, path: Path_) -> CID:
    cid = await ipfs_cid(client, path)
    assert cid is not None
    return cid


def chunks(node: Node, path: Path_) -> int:
    (_, number, _), *_ = node.records.places(path.signed.info.nar_hash)
    image = node.store.image(node.store.images()[0].id)
    assert image is not None
    return len(image.objects[number].layout.digests)


async def test_the_walk_gives_the_nar(world: World) -> None:
    node = await world.node("p")
    paths = node.provide({str(size): (content(size, size), ()) for size in (ONE, FEW, MANY)})
    client = await world.gateway(node, ipfs_cid=True)
    counts = sorted(chunks(node, each) for each in paths)
    assert counts[0] == 1 < counts[1] <= 16 < counts[2]
    for each in paths:
        cid = await root_of(client, each)
        assert cid.codec is (Codec.RAW if chunks(node, each) == 1 else Codec.DAG_CBOR)
        assert b"".join(walk(node.store, cid)) == each.nar
    assert all([await ipfs_cid(await world.gateway(node), each) is None for each in paths])  # only when asked for


async def test_one_nar_has_one_root_in_every_image_and_on_every_machine(world: World) -> None:
    p, q, c = await world.node("p"), await world.node("q"), await world.node("c")
    lib = (content(FEW), ())
    (alone,) = p.provide({"lib": lib})
    both = q.provide({"lib": lib, "tool": (content(50_000, 2), ("lib",))})
    assert p.store.images()[0].id != q.store.images()[0].id
    expected = await root_of(await world.gateway(p, ipfs_cid=True), alone)
    (same,) = (each for each in both if each.path == alone.path)
    assert await root_of(await world.gateway(q, ipfs_cid=True), same) == expected
    # Somebody else's NAR has no root that we could vouch for, until it was fetched and verified.
    client = await world.gateway(c, ipfs_cid=True)
    assert await ipfs_cid(client, alone) is None
    assert (await client.get(alone.nar_url)).content == alone.nar
    assert await ipfs_cid(client, alone) == expected
    assert b"".join(walk(c.store, expected)) == alone.nar


class Kept:
    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}

    def accept_many(self, blocks: Sequence[tuple[bytes, Payload]]) -> list[bool]:
        self.blocks |= {key: b"".join(pieces) for key, pieces in blocks}
        return [CID.from_bytes(key).matches(self.blocks[key]) for key, _ in blocks]


async def test_a_peer_can_have_the_block_and_it_stays_as_long_as_the_image(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    (lib,) = p.provide({"lib": (content(FEW), ())})
    cid = await root_of(await world.gateway(p, ipfs_cid=True), lib)
    image = p.store.images()[0].id
    await c.exchange.join("p")
    kept, key = Kept(), cid.to_bytes()
    with trio.fail_after(10):
        async with c.exchange.download(
            manifest_id(image), image, [key], [64 << 10], [0], kept, lambda _: None
        ) as download:
            await download.wait()
    assert kept.blocks == {key: p.store.block(cid)}

    p.store.close()
    p.store = Store.open(p.home)  # sweeps what belongs to no image
    assert p.store.block(cid) is not None
    p.store.remove_image(image)
    assert p.store.block(cid) is None


@pytest.mark.parametrize("size", [ONE, FEW])
async def test_a_nar_whose_chunks_are_lost_has_no_root(world: World, size: int) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (content(size), ())})
    client = await world.gateway(node, ipfs_cid=True)
    await root_of(client, lib)
    image = node.store.image(node.store.images()[0].id)
    assert image is not None
    digest = list(image.chunks)[-1]
    for location in node.store.catalog.locations(digest):
        node.store.catalog.drop_chunk(digest, location.source.id)
    assert await ipfs_cid(client, lib) is None


async def test_a_full_disk_takes_the_field_away_and_not_the_path(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = await world.node("p")
    (path,) = node.provide({"path": (content(FEW), ())})
    client = await world.gateway(node, ipfs_cid=True)

    def full(*arguments: object, **named: object) -> None:
        raise DiskFull("there is no room")

    with monkeypatch.context() as patch:
        patch.setattr(node.store, "put_blocks", full)
        assert await ipfs_cid(client, path) is None
    assert "there is no room" in caplog.text
    assert await ipfs_cid(client, path) is not None

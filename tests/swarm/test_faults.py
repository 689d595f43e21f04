"""Peers that attack the node's memory, and moments at which a swarm must not fall apart."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import trio
import zstandard

from p2pnode.errors import NodeError
from p2pnode.net.transport import Stream
from p2pnode.progress import silent
from p2pnode.store.records import Origin
from p2pnode.swarm.fetcher import Fetched, FetchOptions
from p2pnode.swarm.holdings import Holding
from p2pnode.swarm.session import MAX_CONTROL
from protocols.cid import CID, Codec
from protocols.exchange import PROTOCOL_ID
from protocols.exchange import messages as m
from protocols.exchange.uploads import MAX_QUEUED_TOTAL, Uploads

from .peers import World, content, drop


async def test_a_peer_that_was_asked_too_early_tells_what_it_gets_later(world: World, tmp_path: Path) -> None:
    """B asks A while A does not know the image yet; only A gets it whole, and the seed dies."""
    seed, part, a, b = [await world.peer(name) for name in ("seed", "part", "a", "b")]
    (tmp_path / "img").write_bytes(content(8 << 20))
    image = seed.provide(tmp_path / "img")
    part.provide(tmp_path / "img")
    drop(part.store, list(image.chunks)[2:])
    world.registry.clear()
    world.registry[image.id.to_bytes()] = {"part", "a"}
    results: list[Fetched] = []

    async def fetch() -> None:
        options = FetchOptions(out=tmp_path / "of-b", timeout=20.0)
        results.append(await b.fetcher.fetch(image.id, options, silent))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch)
        with trio.fail_after(10):
            while not b.exchange.answers(image.id).keys() >= {"a", "part"}:
                await b.exchange.next_answer()
        await a.exchange.join("seed")
        await a.fetch(image.id, out=tmp_path / "of-a")
        await world.fabric.stop("seed")
    assert results[0].sources["a"] > 4 << 20


@pytest.mark.parametrize("said", [4 << 20, 1000])  # what the frame says its content has
async def test_a_zstd_bomb_is_not_decoded(world: World, tmp_path: Path, said: int) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "img").write_bytes(content(1 << 20))
    image = seed.provide(tmp_path / "img")
    leech.store.put_blocks({cid: block for cid in image.blocks if (block := seed.store.block(cid))})
    leech.store.add_image(image, name="img", origin=Origin.FETCHED, complete=False, path=None)
    await world.fabric.stop("seed")
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(max(said, 64 << 20 if said == 1000 else 0)))

    async def bomber(stream: Stream) -> None:
        reader = m.FrameReader()
        await stream.send_parts(m.encode(m.Hello()))
        while data := await stream.receive_some(1 << 16):
            for message in reader.feed(data):
                if isinstance(message, m.Interest):
                    await stream.send_parts(m.encode(m.Availability(message.root, len(image.chunks))))
                elif isinstance(message, m.Want):
                    frame = b"".join(
                        bytes(p) for p in m.encode(m.Block(message.ids[0], m.Encoding.ZSTD, said, (bomb,)))
                    )
                    await stream.send_all(frame * 400)

    bad = world.fabric.node("bad")
    bad.handle(PROTOCOL_ID, bomber)
    world.registry[image.id.to_bytes()] = {"bad"}
    tracemalloc.start()
    try:
        with pytest.raises(NodeError):
            await leech.fetch(image.id, timeout=2.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert "bad" in leech.exchange.bans


async def test_a_flood_of_interest_queues_a_bounded_answer(world: World) -> None:
    seed = await world.peer("seed")
    root = CID.of(Codec.DAG_CBOR, b"an image of a million chunks")
    index = {number.to_bytes(4, "big"): number for number in range(1_000_000)}
    seed.exchange._holdings._images[root] = Holding(index, bytearray(b"\x55" * 125_000), 500_000)
    attacker = world.fabric.node("attacker")
    stream = await attacker.open_stream("seed", PROTOCOL_ID)
    await stream.send_parts(m.encode(m.Hello()))
    flood = b"".join(bytes(part) for part in m.encode(m.Interest(root))) * 4000
    with trio.move_on_after(2):
        await stream.send_all(flood)
        await trio.sleep_forever()  # never reads
    session = seed.exchange._sessions["attacker"]
    assert sum(map(len, session._control)) < MAX_CONTROL + 200_000


async def test_what_a_gone_peer_followed_is_forgotten(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "img").write_bytes(content(1 << 20))
    image = seed.provide(tmp_path / "img")
    await leech.fetch(image.id, out=tmp_path / "out")
    follower = world.fabric.node("follower")
    stream = await follower.open_stream("seed", PROTOCOL_ID)
    await stream.send_parts([*m.encode(m.Hello()), *m.encode(m.Interest(image.id))])
    reader = m.FrameReader()
    with trio.fail_after(10):
        while not any(isinstance(each, m.Availability) for each in reader.feed(await stream.receive_some(1 << 16))):
            pass
        assert image.id in seed.exchange._holdings._images
        await world.fabric.stop("follower")
        while "follower" in seed.exchange.sessions:
            await seed.exchange.left()
    assert image.id not in seed.exchange._holdings._images


def test_peers_that_do_not_read_hold_up_nobody() -> None:
    uploads = Uploads()
    keys = [bytes([number]) * 36 for number in range(200)]
    for number in range(200):
        uploads.want(f"mute{number}", keys[:20], m.Priority.NORMAL)
    queued = 0
    while (turn := uploads.next()) is not None:
        uploads.queued(*turn, 1 << 20)
        queued += 1 << 20
    assert queued <= MAX_QUEUED_TOTAL + (200 << 20)
    uploads.want("honest", keys, m.Priority.NORMAL)
    turn = uploads.next()
    assert turn is not None
    assert turn[0] == "honest"

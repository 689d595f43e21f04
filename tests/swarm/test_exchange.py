"""The exchange and the fetcher over an in-memory network, with real stores on disk."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from p2pnode.errors import NotFound, PeerUnreachable
from p2pnode.net.transport import Stream
from p2pnode.swarm.fetcher import Fetched
from p2pnode.swarm.holdings import chunk_key
from p2pnode.swarm.traffic import QUIET
from protocols.cid import CID, Codec
from protocols.exchange import PROTOCOL_ID
from protocols.exchange import messages as m
from tests.swarm.peers import Peer, World, content, drop


async def test_a_file_goes_from_one_node_to_another(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "a.img").write_bytes(content(5 << 20))
    image = seed.provide(tmp_path / "a.img")
    fetched = await leech.fetch(image.id, out=tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == content(5 << 20)
    assert fetched.sources.keys() == {"seed"}
    assert (5 << 20) <= fetched.received_bytes < (5 << 20) + 10_000
    assert fetched.duplicate_bytes == 0


async def test_both_ends_of_a_fetch_are_busy_until_soon_after_it(world: World, tmp_path: Path) -> None:
    seed, leech, third = [await world.peer(name) for name in ("seed", "leech", "third")]
    (tmp_path / "a.img").write_bytes(content(1 << 20))
    image = seed.provide(tmp_path / "a.img")
    began = trio.current_time()
    await leech.fetch(image.id, out=tmp_path / "out.img")
    for peer in (seed, leech):
        assert began < peer.exchange.busy_until() <= trio.current_time() + QUIET
    assert third.exchange.busy_until() < began


async def test_an_empty_file_and_an_empty_directory(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "dir").mkdir()
    await leech.fetch(seed.provide(tmp_path / "empty").id, out=tmp_path / "out")
    await leech.fetch(seed.provide(tmp_path / "dir").id, out=tmp_path / "outdir")
    assert (tmp_path / "out").read_bytes() == b""
    assert list((tmp_path / "outdir").iterdir()) == []


async def test_a_directory_and_serving_on_from_the_export(world: World, tmp_path: Path) -> None:
    seed, middle, last = [await world.peer(name) for name in ("seed", "middle", "last")]
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "big").write_bytes(content(3 << 20))
    (tree / "link").symlink_to("sub/big")
    (tree / "run").write_bytes(b"#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    image = seed.provide(tree)
    await middle.fetch(image.id, out=tmp_path / "copy")
    await world.fabric.stop("seed")
    fetched = await last.fetch(image.id, out=tmp_path / "copy2")
    assert fetched.sources.keys() == {"middle"}
    assert (tmp_path / "copy2/sub/big").read_bytes() == content(3 << 20)
    assert (tmp_path / "copy2/link").readlink() == Path("sub/big")
    assert (tmp_path / "copy2/run").stat().st_mode & 0o100


async def test_what_is_on_the_disk_is_read_two_batches_at_a_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "img").write_bytes(content(16 << 20))
    image = seed.provide(tmp_path / "img")
    read, together, calls = seed.store.read, threading.Barrier(2, timeout=30), itertools.count()
    lock, readers = threading.Lock(), set[int]()

    def slow(digest: bytes) -> bytes:
        with lock:
            first = threading.get_ident() not in readers
            readers.add(threading.get_ident())
            meet = first and next(calls) < 2
        if meet:
            together.wait()
        return read(digest)

    monkeypatch.setattr(seed.store, "read", slow)
    monkeypatch.setattr(seed.store, "read_at_hand", lambda digests: [None] * len(digests))
    await leech.fetch(image.id, out=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content(16 << 20)
    assert not together.broken and len(readers) >= 2


async def test_version_two_transfers_only_what_is_missing(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    one = content(8 << 20)
    (tmp_path / "v1").write_bytes(one)
    (tmp_path / "v2").write_bytes(one[: 4 << 20] + b"an insertion" + one[4 << 20 :])
    await leech.fetch(seed.provide(tmp_path / "v1").id, out=tmp_path / "o1")
    fetched = await leech.fetch(seed.provide(tmp_path / "v2").id, out=tmp_path / "o2")
    assert (tmp_path / "o2").read_bytes() == (tmp_path / "v2").read_bytes()
    assert fetched.received_bytes < 3 << 20


async def test_four_partial_providers_make_a_whole(world: World, tmp_path: Path) -> None:
    (tmp_path / "img").write_bytes(content(16 << 20))
    partial = [await world.peer(f"p{i}") for i in range(4)]
    for number, peer in enumerate(partial):
        image = peer.provide(tmp_path / "img")
        digests = list(image.chunks)
        drop(peer.store, [d for i, d in enumerate(digests) if i % 4 != number])
    leech = await world.peer("leech")
    fetched = await leech.fetch(image.id, out=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content(16 << 20)
    assert fetched.sources.keys() == {"p0", "p1", "p2", "p3"}


async def test_chunk_records_find_what_the_images_own_swarm_lacks(world: World, tmp_path: Path) -> None:
    holder, other, leech = [await world.peer(name) for name in ("holder", "other", "leech")]
    data = content(4 << 20)
    (tmp_path / "img").write_bytes(data)
    (tmp_path / "longer").write_bytes(data + content(1 << 20, 2))
    image = holder.provide(tmp_path / "img")
    other.provide(tmp_path / "longer")  # another image with nearly all chunks of the first
    lost = list(image.chunks)[3]
    drop(holder.store, [lost])
    fetched = await leech.fetch(image.id, out=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert fetched.sources["other"] > 0


async def liar(stream: Stream) -> None:
    """Says it has everything, and sends garbage."""
    session_reader = m.FrameReader()
    await stream.send_parts(m.encode(m.Hello()))
    while data := await stream.receive_some(1 << 16):
        for message in session_reader.feed(data):
            if isinstance(message, m.Interest):
                await stream.send_parts(m.encode(m.Availability(message.root, LIAR_COUNT[0])))
            elif isinstance(message, m.Want):
                for key in message.ids:
                    size = LIAR_SIZES.get(key, 1000)
                    await stream.send_parts(m.encode(m.Block(key, m.Encoding.RAW, size, (b"\xff" * size,))))


async def staller(stream: Stream) -> None:
    """Says it has everything, and never answers."""
    reader = m.FrameReader()
    await stream.send_parts(m.encode(m.Hello()))
    while data := await stream.receive_some(1 << 16):
        for message in reader.feed(data):
            if isinstance(message, m.Interest):
                await stream.send_parts(m.encode(m.Availability(message.root, LIAR_COUNT[0])))


LIAR_COUNT = [0]
LIAR_SIZES: dict[bytes, int] = {}


@pytest.mark.parametrize("behaviour", [liar, staller])
async def test_a_peer_that_lies_or_stalls_does_not_stop_the_fetch(
    world: World, tmp_path: Path, behaviour: Callable[[Stream], object]
) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "img").write_bytes(content(6 << 20))
    image = seed.provide(tmp_path / "img")
    LIAR_COUNT[0] = len(image.chunks)
    LIAR_SIZES.update({chunk_key(d): size for d, size in image.chunks.items()})
    bad = world.fabric.node("bad")
    bad.handle(PROTOCOL_ID, behaviour)  # type: ignore[arg-type]
    world.registry[image.id.to_bytes()].add("bad")
    with trio.fail_after(30):
        fetched = await leech.fetch(image.id, out=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content(6 << 20)
    assert fetched.sources.keys() == {"seed"}
    if behaviour is liar:
        assert list(fetched.banned) == ["bad"]
        assert "bad" in leech.exchange.bans


async def test_garbage_on_the_exchange_stream_harms_nobody(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "img").write_bytes(content(1 << 20))
    image = seed.provide(tmp_path / "img")
    attacker = world.fabric.node("attacker")
    rng = random.Random(7)
    for _ in range(50):
        stream = await attacker.open_stream("seed", PROTOCOL_ID)
        await stream.send_all(rng.randbytes(rng.randrange(1, 2000)))
        await stream.reset()
    await leech.fetch(image.id, out=tmp_path / "out")


async def test_unknown_image_with_peers_is_not_found(world: World) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    await leech.exchange.join(seed.name)
    with pytest.raises(NotFound, match="none of the 1 peers"), trio.fail_after(15):
        await leech.fetch(CID.of(Codec.DAG_CBOR, b"nothing"))


async def test_unknown_image_without_peers_is_a_network_error(world: World) -> None:
    leech = await world.peer("leech")
    with pytest.raises(PeerUnreachable, match="no peer could be reached"), trio.fail_after(15):
        await leech.fetch(CID.of(Codec.DAG_CBOR, b"nothing"))


async def test_a_provider_that_dies_half_way_is_replaced(world: World, tmp_path: Path) -> None:
    first, second, leech = [await world.peer(name) for name in ("first", "second", "leech")]
    (tmp_path / "img").write_bytes(content(24 << 20))
    image = first.provide(tmp_path / "img")
    second.provide(tmp_path / "img")

    async def kill() -> None:
        while leech.exchange.traffic("first").received < 4 << 20:
            await leech.exchange.progress()
        await world.fabric.stop("first")

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            fetched = await leech.fetch(image.id, out=tmp_path / "out")
            nursery.cancel_scope.cancel()
    assert (tmp_path / "out").read_bytes() == content(24 << 20)
    assert fetched.sources["second"] > 0


async def test_a_cancelled_fetch_is_resumed(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    (tmp_path / "img").write_bytes(content(24 << 20))
    image = seed.provide(tmp_path / "img")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: leech.fetch(image.id, out=tmp_path / "out"))
            while leech.exchange.traffic("seed").received < 6 << 20:
                await leech.exchange.progress()
            nursery.cancel_scope.cancel()
    before = leech.exchange.traffic("seed").received
    fetched = await leech.fetch(image.id, out=tmp_path / "out")
    # What was on its way when the first was cancelled comes all the same.
    assert fetched.received_bytes <= (24 << 20) - before + (4 << 20)
    assert (tmp_path / "out").read_bytes() == content(24 << 20)


async def test_a_flash_crowd_feeds_itself(world: World, tmp_path: Path) -> None:
    (tmp_path / "img").write_bytes(content(16 << 20))
    seed = await world.peer("seed")
    image = seed.provide(tmp_path / "img")
    crowd = [await world.peer(f"leech{i}") for i in range(4)]
    results: list[Fetched] = []

    async def fetch(peer: Peer) -> None:
        results.append(await peer.fetch(image.id, out=tmp_path / f"out-{peer.name}"))

    async with trio.open_nursery() as nursery:
        for peer in crowd:
            nursery.start_soon(fetch, peer)
    assert len(results) == 4
    for peer in crowd:
        assert (tmp_path / f"out-{peer.name}").read_bytes() == content(16 << 20)

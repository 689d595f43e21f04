"""An exchange that begins over a relay and moves to a direct connection."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import trio

from p2pnode.errors import StreamClosed
from p2pnode.net.memory import PIPE_LIMIT
from p2pnode.net.transport import Stream, receive_exactly
from p2pnode.swarm.holdings import chunk_key
from protocols.exchange import PROTOCOL_ID
from protocols.exchange import messages as m
from tests.swarm.peers import Peer, World, content

SIZE = 24 << 20


async def received(peer: Peer, at_least: int, root: bytes) -> None:
    while True:
        with trio.move_on_after(1):
            await peer.exchange.progress()
        try:
            stats = peer.exchange.stats(root)
        except KeyError:
            continue
        if sum(stats.received.values()) >= at_least:
            return


async def drain(stream: Stream) -> None:
    with suppress(StreamClosed):
        while await stream.receive_some(1 << 20):
            pass


async def blocks(stream: Stream, expected: set[bytes]) -> None:
    """Read until all of these have come."""
    reader = m.FrameReader()
    while expected:
        for message in reader.feed(await stream.receive_some(1 << 20)):
            if isinstance(message, m.Block):
                expected.remove(message.id)


@pytest.mark.parametrize("upgrader", ["leech", "seed"])
async def test_the_exchange_moves_without_losing_or_repeating_a_chunk(
    world: World,
    tmp_path: Path,
    upgrader: str,
) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    world.fabric.relay("seed", "leech")
    (tmp_path / "a.img").write_bytes(content(SIZE))
    image = seed.provide(tmp_path / "a.img")
    if upgrader == "seed":  # whoever dialled the session moves it
        await seed.exchange.join("leech")

    async def upgrade() -> None:
        await received(leech, SIZE // 8, image.id.to_bytes())
        world.fabric.upgrade("seed", "leech")

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upgrade)
            fetched = await leech.fetch(image.id, out=tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == content(SIZE)
    assert fetched.duplicate_bytes == 0
    assert SIZE // 8 <= fetched.relayed["seed"] < SIZE * 3 // 4
    assert sum(fetched.sources.values()) == fetched.received_bytes < SIZE + (1 << 16)
    assert 0 < fetched.direct_after["seed"] < fetched.seconds + 1
    assert not leech.exchange.bans and not seed.exchange.bans


async def test_a_relay_that_dies_while_it_is_left_costs_only_what_it_carried(
    world: World,
    tmp_path: Path,
) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    world.fabric.relay("seed", "leech")
    (tmp_path / "a.img").write_bytes(content(SIZE))
    image = seed.provide(tmp_path / "a.img")

    async def upgrade() -> None:
        await received(leech, SIZE // 8, image.id.to_bytes())
        world.fabric.upgrade("seed", "leech")
        while len(leech.network.links["seed"]) < 2:  # the direct stream is on its way
            await trio.lowlevel.checkpoint()
        await world.fabric.stop_relay("seed", "leech")

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upgrade)
            fetched = await leech.fetch(image.id, out=tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == content(SIZE)
    assert fetched.received_bytes < SIZE + (8 << 20)
    assert not leech.exchange.bans and not seed.exchange.bans


@pytest.mark.parametrize("at_hand", [True, False])
async def test_the_retired_session_ends_with_the_one_that_took_over(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_hand: bool
) -> None:
    """What it had yet to send is neither sent to a session that comes later, nor taken off its account."""
    seed, leech = await world.peer("seed"), world.fabric.node("leech")
    if not at_hand:
        monkeypatch.setattr(seed.store, "read_at_hand", lambda digests: [None] * len(digests))
    (tmp_path / "a.img").write_bytes(content(SIZE))
    wanted = [chunk_key(digest) for digest in seed.provide(tmp_path / "a.img").chunks]
    world.fabric.relay("seed", "leech")
    relayed = await leech.open_stream("seed", PROTOCOL_ID)
    await relayed.send_parts([*m.encode(m.Hello()), *m.encode(m.Want(tuple(wanted), m.Priority.NORMAL))])
    await receive_exactly(relayed, PIPE_LIMIT // 2)  # and there it waits for more room
    world.fabric.upgrade("seed", "leech")
    direct = await leech.open_stream("seed", PROTOCOL_ID)
    await direct.send_parts(m.encode(m.Hello()))
    with trio.fail_after(5):
        while not seed.exchange._retired:
            await receive_exactly(relayed, 1)
        await direct.reset()
        while "leech" in seed.exchange.sessions:
            await seed.exchange.left()
        assert not seed.exchange._retired
        again = await leech.open_stream("seed", PROTOCOL_ID)
        await again.send_parts([*m.encode(m.Hello()), *m.encode(m.Want(tuple(wanted[:8]), m.Priority.NORMAL))])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, relayed)
            await blocks(again, set(wanted[:8]))
            while seed.exchange._uploads._queued:
                await trio.lowlevel.checkpoint()


async def test_without_an_upgrade_all_of_it_is_relayed(world: World, tmp_path: Path) -> None:
    seed, leech = await world.peer("seed"), await world.peer("leech")
    world.fabric.relay("seed", "leech")
    (tmp_path / "a.img").write_bytes(content(1 << 20))
    image = seed.provide(tmp_path / "a.img")
    fetched = await leech.fetch(image.id, out=tmp_path / "out.img")
    assert sum(fetched.relayed.values()) == fetched.received_bytes
    assert fetched.direct_after == {}

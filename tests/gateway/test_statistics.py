"""What the gateway counts, against what clients did."""

from __future__ import annotations

from pathlib import Path

import trio

from p2pnode.gateway.statistics import GatewayStatistics, Served
from tests.gateway.nodes import World
from tests.gateway.test_upstream import cache
from tests.nix.test_binary_cache import files, serving
from tests.swarm.peers import content


def latest(world: World) -> GatewayStatistics:
    """Of the gateway that was opened last."""
    return world.gateways[-1].statistics()


async def settled(world: World) -> GatewayStatistics:
    """When nothing is being sent any more: a client has the last byte before the server knows that it was taken."""
    with trio.fail_after(10):
        while latest(world).in_progress:
            await trio.sleep(0.01)
    return latest(world)


async def test_everything_is_counted_once(world: World, tmp_path: Path) -> None:
    p, c, o = await world.node("p"), await world.node("c"), await world.node("o")
    (lib,) = p.provide({"lib": (content(3 << 20), ())})
    (own,) = c.provide({"own": (content(100_000, 2), ())})
    (far,) = o.provide({"far": (content(200_000, 3), ())})
    await world.fabric.stop("o")
    cache(tmp_path / "cache", [far])
    async with serving(files(tmp_path / "cache")) as url:
        client = await world.gateway(c, upstreams=(url,))
        nothing = latest(world)
        assert (nothing.requests, nothing.nars, nothing.bytes, nothing.in_progress) == (0, 0, 0, 0)
        await client.get("/nix-cache-info")
        for each in (lib, own, far):
            assert (await client.get(each.narinfo_url)).status_code == 200
            assert (await client.head(each.narinfo_url)).status_code == 200
            assert (await client.get(each.nar_url)).content == each.nar
        assert (await client.head(own.nar_url)).status_code == 200  # no body, so no NAR
        assert (await client.get(own.nar_url, headers={"Range": "bytes=99000-"})).status_code == 206
        assert (await client.get(own.nar_url, headers={"Range": "bytes=999999-"})).status_code == 416
        assert (await client.get("/" + "0" * 32 + ".narinfo")).status_code == 404
        assert (await client.get("/nar/" + "0" * 52 + ".nar", timeout=60)).status_code == 404
        assert (await client.get("/favicon.ico")).status_code == 404
        assert (await client.post("/nix-cache-info")).status_code == 405
        counted = await settled(world)
    assert counted.requests == 1 + 3 * 3 + 3 + 2 + 2
    assert (counted.narinfo_hits, counted.narinfo_misses, counted.nar_misses) == (6, 1, 1)
    assert counted.store == Served(2, 2 * len(own.nar) - 99_000)
    assert counted.swarm == Served(1, len(lib.nar))
    assert counted.upstream == Served(1, len(far.nar))
    assert (counted.nars, counted.bytes) == (4, 2 * len(own.nar) - 99_000 + len(lib.nar) + len(far.nar))
    assert counted.connections == 1


async def test_what_comes_from_the_swarm_is_later_from_the_store(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    (lib,) = p.provide({"lib": (content(1 << 20), ())})
    client = await world.gateway(c, zstd=True)
    await client.get(lib.narinfo_url)
    first = await client.get(lib.nar_url + ".zst")
    counted = await settled(world)
    assert (counted.swarm, counted.store) == (Served(1, len(first.content)), Served())
    await client.get(lib.nar_url + ".zst")
    counted = await settled(world)
    assert (counted.swarm, counted.store) == (Served(1, len(first.content)), Served(1, len(first.content)))


async def test_a_client_that_leaves_is_no_longer_in_progress(world: World) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (content(64 << 20), ())})  # more than fits into socket buffers
    client = await world.gateway(node)
    async with client.stream("GET", lib.nar_url) as response:
        assert response.status_code == 200
        sending = latest(world)
        assert (sending.in_progress, sending.store.nars) == (1, 1)
    counted = await settled(world)
    assert counted.store.nars == 1 and counted.store.bytes < len(lib.nar)

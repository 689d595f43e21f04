"""What Nix would ask of a gateway, and what it gets: from the own store, and from a peer."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest
import trio
import zstandard

from p2pnode.gateway.records import part_of
from p2pnode.images.paths import keep_registered
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.trust import judge
from p2pnode.store.records import Origin
from protocols.manifest import Image, Kind, encode_image
from protocols.narinfo import nar_key, provider_key
from tests.gateway.nodes import NOT_DEMANDED, World
from tests.nix.caches import KEYS, OTHER_SECRET
from tests.swarm.peers import content

CLOSURE = {"lib": (content(3 << 20), ()), "tool": (content(1000, 2), ("lib",))}


async def test_cache_info(world: World) -> None:
    client = await world.gateway(await world.node("c"), priority=35)
    response = await client.get("/nix-cache-info")
    assert response.text == "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 35\n"


async def test_what_is_in_the_own_store(world: World) -> None:
    node = await world.node("p")
    lib, tool = node.provide(CLOSURE)
    client = await world.gateway(node)
    for each in (lib, tool):
        response = await client.get(each.narinfo_url)
        assert response.status_code == 200 and response.headers["content-type"] == "text/x-nix-narinfo"
        narinfo = parse(response.content, expect=each.path)
        assert narinfo.info == each.signed.info
        assert judge(narinfo.info, narinfo.signatures, KEYS).trusted
        head = await client.head(each.narinfo_url)
        assert head.status_code == 200 and head.headers["content-length"] == str(len(response.content))
        body = await client.get("/" + narinfo.url)
        assert body.content == each.nar
        assert body.headers["accept-ranges"] == "bytes" and body.headers["content-length"] == str(len(each.nar))
        assert (await client.head("/" + narinfo.url)).headers["content-length"] == str(len(each.nar))


async def test_a_closure_comes_from_a_peer_path_by_path(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    lib, tool = p.provide(CLOSURE)
    client = await world.gateway(c)
    narinfo = parse((await client.get(tool.narinfo_url)).content, expect=tool.path)
    assert (await client.get("/" + narinfo.url)).content == tool.nar
    # Only what was asked for was fetched.
    assert p.exchange.traffic("c").sent < 100_000
    assert (await client.get(lib.narinfo_url)).status_code == 200
    assert (await client.get(lib.nar_url)).content == lib.nar
    record = c.store.images()[0]
    assert record.complete and record.held_bytes == record.chunk_bytes
    # C serves it on: P is not needed any more, and asked from scratch by somebody who knows only NAR hash and path.
    await world.fabric.stop("p")
    d = await world.gateway(await world.node("d"))
    assert (await d.get(tool.narinfo_url)).status_code == 200
    assert (await d.get(lib.nar_url)).content == lib.nar


async def test_who_asks_at_once_shares_one_fetch(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    (lib,) = p.provide({"lib": (content(6 << 20), ())})
    client = await world.gateway(c)
    bodies: list[bytes] = []

    async def get() -> None:
        await client.get(lib.narinfo_url)
        bodies.append((await client.get(lib.nar_url)).content)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(get)
    assert bodies == [lib.nar] * 5
    assert c.exchange.traffic("p").received < (6 << 20) + 50_000


async def test_ranges_and_compressed_ranges(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    (lib,) = p.provide({"lib": (content(1 << 20) + bytes(2 << 20), ())})
    client = await world.gateway(c)
    await client.get(lib.narinfo_url)
    size = len(lib.nar)
    for start, stop in ((0, 1), (1_000_000, size), (size - 1, size), (300_000, 1_700_000)):
        response = await client.get(lib.nar_url, headers={"Range": f"bytes={start}-{stop - 1}"})
        assert response.status_code == 206 and response.content == lib.nar[start:stop]
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    assert (await client.get(lib.nar_url, headers={"Range": f"bytes={size}-"})).status_code == 416
    tail = await client.get(lib.nar_url, headers={"Range": "bytes=-10"})
    assert tail.content == lib.nar[-10:]
    whole = await client.get(lib.nar_url + ".zst")
    assert int(whole.headers["content-length"]) == len(whole.content) < 1_200_000
    plain = zstandard.ZstdDecompressor().stream_reader(whole.content, read_across_frames=True).read()
    assert plain == lib.nar
    rest = await client.get(lib.nar_url + ".zst", headers={"Range": "bytes=700000-"})
    assert rest.content == whole.content[700_000:]


@pytest.mark.parametrize("suffix", ["", ".zst"])
async def test_head_tells_what_get_gives_and_what_is_unchanged_is_not_sent(world: World, suffix: str) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (content(1 << 20), ())})
    client = await world.gateway(node)
    url = lib.nar_url + suffix
    whole = await client.get(url)
    for headers in ({}, {"Range": "bytes=0-9"}, {"Range": "bytes=99999999-"}, {"If-None-Match": '"other"'}):
        head = await client.head(url, headers=headers)  # ranges are for GET alone
        assert head.status_code == 200 and head.headers == whole.headers and not head.content
    for method in ("GET", "HEAD"):
        same = await client.request(method, url, headers={"If-None-Match": whole.headers["etag"]})
        assert same.status_code == 304 and not same.content and "content-length" not in same.headers
        assert same.headers["etag"] == whole.headers["etag"]
    absent = "/nar/" + "0" * 52 + ".nar" + suffix
    assert (await client.get(absent, headers={"If-None-Match": "*"})).status_code == 404


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "OPTIONS"])
async def test_nothing_can_be_written(world: World, method: str) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (b"x" * 100, ())})
    client = await world.gateway(node)
    for body in (b"", b"x" * 1000):
        answer = await client.request(method, lib.narinfo_url, content=body)
        assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD"
    assert (await client.get(lib.narinfo_url)).status_code == 200


async def test_unsigned_and_wrongly_signed_paths_are_not_there(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    (unsigned,) = p.provide({"unsigned": (b"u" * 100, ())}, key=None)
    (strange,) = p.provide({"strange": (b"s" * 100, ())}, key=OTHER_SECRET)
    forger = SecretKey("lab-1", OTHER_SECRET.seed)
    (forged,) = p.provide({"forged": (b"f" * 100, ())}, key=forger)
    for client in (await world.gateway(c), await world.gateway(p)):
        for each in (unsigned, strange, forged):
            assert (await client.get(each.narinfo_url)).status_code == 404
    # Where nothing is demanded Nix itself has to decide.
    lax = await world.gateway(await world.node("d"), NOT_DEMANDED)
    assert (await lax.get(unsigned.narinfo_url)).status_code == 200
    assert (await lax.get(unsigned.nar_url)).content == unsigned.nar


async def test_a_nar_is_refused_before_its_first_byte_when_chunks_are_missing(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    (lib,) = p.provide({"lib": (content(3 << 20), ())})
    (image,) = p.store.images()
    loaded = p.store.image(image.id)
    assert loaded is not None
    for digest in list(loaded.chunks)[-2:]:
        for location in p.store.catalog.locations(digest):
            p.store.catalog.drop_chunk(digest, location.source.id)
    client = await world.gateway(c, swarm_seconds=2.0)
    assert (await client.get(lib.narinfo_url)).status_code == 200
    assert (await client.get(lib.nar_url)).status_code == 404


async def test_an_image_that_lies_about_its_nar_hash_never_arrives_in_whole(world: World) -> None:
    """The chunks are those of the image, but the image is not that of the NAR that was signed."""
    p, evil, c = await world.node("p"), await world.node("evil"), await world.node("c")
    (lib,) = p.provide({"lib": (content(3 << 20), ())})
    await world.fabric.stop("p")
    world.registry.clear()
    evil.provide({"lib": (content(1 << 20) + bytes(2 << 20), ())})
    (record,) = evil.store.images()
    honest = evil.store.image(record.id)
    assert honest is not None
    fake = [replace(honest.objects[0], path=lib.path.base_name, nar_hash=lib.signed.info.nar_hash)]
    encoded = encode_image(Kind.CLOSURE, {"root": 0}, fake)
    image = Image(encoded.id, Kind.CLOSURE, {"root": 0}, tuple(fake), tuple(encoded.blocks))
    evil.store.put_blocks(encoded.blocks)
    evil.store.add_image(image, name="fake", origin=Origin.PROVIDED, complete=True, path=None)
    keep_registered(evil.store, image, [lib.signed])
    evil.records.learn(image)
    evil.router.provide([image.id.to_bytes(), provider_key(part_of(lib.path)), nar_key(lib.signed.info.nar_hash)])
    client = await world.gateway(c, swarm_seconds=2.0)
    assert (await client.get(lib.narinfo_url)).status_code == 200
    received = 0
    with suppress(httpx.RemoteProtocolError):
        async with client.stream("GET", lib.nar_url) as response:
            assert response.status_code in (200, 404)
            if response.status_code == 200:
                async for piece in response.aiter_raw():
                    received += len(piece)
                pytest.fail("the whole of a wrong NAR was sent")
    assert received < len(lib.nar)
    assert not c.store.images()[0].complete


async def test_a_broken_transfer_is_resumed_and_fetches_nothing_twice(world: World) -> None:
    p, c = await world.node("p"), await world.node("c")
    (lib,) = p.provide({"lib": (content(8 << 20), ())})
    client = await world.gateway(c)
    await client.get(lib.narinfo_url)
    got = b""
    async with client.stream("GET", lib.nar_url) as response:
        assert response.headers["accept-ranges"] == "bytes"
        async for piece in response.aiter_raw():
            got += piece
            if len(got) > 1 << 20:
                break
    rest = await client.get(lib.nar_url, headers={"Range": f"bytes={len(got)}-", "If-Range": response.headers["etag"]})
    assert rest.status_code == 206
    assert got + rest.content == lib.nar
    assert c.exchange.traffic("p").received < (8 << 20) + 100_000


async def test_a_provider_that_dies_breaks_the_connection_and_another_goes_on(world: World) -> None:
    p, q, c = await world.node("p"), await world.node("q"), await world.node("c")
    (lib,) = p.provide({"lib": (content(8 << 20), ())})
    q.provide({"lib": (content(8 << 20), ())})
    client = await world.gateway(c)
    await client.get(lib.narinfo_url)
    body = b""
    async with client.stream("GET", lib.nar_url) as response:
        async for piece in response.aiter_raw():
            if not body:
                await world.fabric.stop("p")
            body += piece
    assert body == lib.nar


async def test_the_hash_of_what_is_served(world: World) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (content(2 << 20), ())})
    client = await world.gateway(node)
    body = (await client.get(lib.nar_url)).content
    assert hashlib.sha256(body).digest() == lib.signed.info.nar_hash


async def test_misses_and_nonsense(world: World) -> None:
    c = await world.node("c")
    client = await world.gateway(c)
    for target in (
        "/",
        "/" + "0" * 32 + ".narinfo",
        "/" + "0" * 31 + "e.narinfo",
        "/nar/../../etc/passwd",
        "/nar/%2e%2e/%2e%2e/etc/passwd",
        "/nar/" + "0" * 52 + ".nar",
        "/nar/" + "z" * 52 + ".nar",
        "/nar/" + "0" * 52 + ".nar.xz",
        "//etc/passwd",
        "/log/" + "0" * 32 + "-x.drv",
        "/realisations/sha256:00!out.doi",
    ):
        response = await client.get(target)
        assert response.status_code == 404, target
    assert (await client.post("/nix-cache-info")).status_code == 405

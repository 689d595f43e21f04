"""Peers that answer look-ups with anything but the truth."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio

from p2pnode.errors import StreamClosed
from p2pnode.gateway.records import narinfo_of, part_of
from p2pnode.images.objects import ImportRun
from p2pnode.images.paths import claims_of
from p2pnode.net.frames import receive_frame
from p2pnode.net.transport import Stream
from p2pnode.nix.narinfo import MAX_SIGNATURES, parse
from p2pnode.nix.signatures import Signature, SignedInfo
from p2pnode.nix.trust import judge
from p2pnode.progress import silent
from p2pnode.store import claims
from p2pnode.store.records import Origin
from protocols.cid import CID, Codec
from protocols.manifest import FASTCDC, Image, Kind, encode_image
from protocols.narinfo import MAX_REQUEST, PROTOCOL, Found, decode_request, encode_answer
from tests.gateway.nodes import World
from tests.nix.caches import KEYS, path, text, vectors
from tests.swarm.peers import content

Reply = Callable[[Stream, tuple[bytes, ...]], Awaitable[None]]
NO_IMAGE = CID(Codec.DAG_CBOR, bytes(32))


async def liar(world: World, name: str, reply: Reply) -> None:
    """A peer that is connected and answers every look-up with `reply`."""

    async def serve(stream: Stream) -> None:
        while (body := await receive_frame(stream, MAX_REQUEST)) is not None:
            await reply(stream, decode_request(body))

    world.fabric.node(name).handle(PROTOCOL, serve)


@pytest.mark.parametrize("each", vectors("reject"))
async def test_rejected_vectors(world: World, each: dict[str, Any]) -> None:
    async def reply(stream: Stream, keys: tuple[bytes, ...]) -> None:
        found = Found(text(each).decode("utf-8", "replace"), NO_IMAGE, 0)
        await stream.send_all(encode_answer([found] * len(keys)))

    await liar(world, "evil", reply)
    node = await world.node("c")
    await node.network.connect("evil")
    client = await world.gateway(node)
    answer = await client.get(f"/{path(each).digest}.narinfo")
    if each["stage"] in ("parse", "identity", "signature") and each["name"] != "other-name":
        assert answer.status_code == 404
    else:  # the contents are wrong, and an image that has them does not exist
        assert answer.status_code in (200, 404)
    assert not node.store.images()


@pytest.mark.parametrize("kind", ["garbage", "huge", "silent", "too many", "closes"])
async def test_nonsense_is_bounded_in_time_and_hurts_nobody_else(world: World, kind: str) -> None:
    async def reply(stream: Stream, keys: tuple[bytes, ...]) -> None:
        match kind:
            case "garbage":
                await stream.send_all(b"\0\0\0\5hello")
            case "huge":
                await stream.send_all(b"\xff\xff\xff\xff")
            case "silent":
                await trio.sleep_forever()
            case "too many":
                await stream.send_all(encode_answer([None] * (len(keys) + 1)))
            case "closes":
                await stream.reset()

    await liar(world, "evil", reply)
    good, node = await world.node("p"), await world.node("c")
    (lib,) = good.provide({"lib": (content(1000), ())})
    await node.network.connect("evil")
    client = await world.gateway(node, lookup_seconds=0.5)
    assert (await client.get(lib.narinfo_url)).status_code == 200
    assert (await client.get(lib.nar_url)).content == lib.nar
    began = trio.current_time()
    assert (await client.get("/" + "0" * 32 + ".narinfo")).status_code == 404
    assert trio.current_time() - began < 2


async def test_slow_peers_keep_nix_no_longer_than_configured(world: World) -> None:
    """Look-ups of many paths at once, of which a peer that needs longer than Nix is made to wait has one."""
    good, node = await world.node("p"), await world.node("c")
    (lib,) = good.provide({"lib": (content(1000), ())})
    await world.fabric.stop("p")
    world.registry.clear()

    async def reply(stream: Stream, keys: tuple[bytes, ...]) -> None:
        await trio.sleep(0.5)
        (record,) = good.records.of_part(part_of(lib.path))
        text = narinfo_of(record.signed).format()
        wanted = (part_of(lib.path), lib.signed.info.nar_hash)
        await stream.send_all(encode_answer([Found(text, record.image, 0) if key in wanted else None for key in keys]))

    for number in range(4):
        await liar(world, f"slow{number}", reply)
        await node.network.connect(f"slow{number}")
    client = await world.gateway(node, lookup_seconds=0.2)
    longest = 0.0

    async def miss(number: int) -> None:
        nonlocal longest
        began = trio.current_time()
        assert (await client.get(f"/{number:032}.narinfo")).status_code == 404
        longest = max(longest, trio.current_time() - began)

    assert (await client.get(lib.narinfo_url)).status_code == 404
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(miss, number)
    assert longest < 2
    with trio.fail_after(10):  # the answer was not lost: who asks again has it
        while (await client.get(lib.narinfo_url)).status_code != 200:
            await trio.sleep(0.1)


async def test_an_image_that_does_not_have_the_nar(world: World) -> None:
    good, node = await world.node("p"), await world.node("c")
    lib, _ = good.provide({"lib": (content(1000), ()), "tool": (content(2000, 2), ())})
    (image,) = good.store.images()

    async def reply(stream: Stream, keys: tuple[bytes, ...]) -> None:
        records = good.records.of_part(keys[0]) if len(keys[0]) == 20 else good.records.of_nar(keys[0])
        found = Found(narinfo_of(records[0].signed).format(), image.id, 1 - records[0].number)
        await stream.send_all(encode_answer([found]))

    world.registry.clear()
    await liar(world, "evil", reply)
    await node.network.connect("evil")
    client = await world.gateway(node)
    assert (await client.get(lib.narinfo_url)).status_code == 200
    assert (await client.get(lib.nar_url, timeout=40)).status_code == 404
    # Once somebody honest is connected, it is found at them.
    await node.network.connect("p")
    assert (await client.get(lib.nar_url)).content == lib.nar


async def test_an_image_whose_nar_is_larger_than_what_was_signed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Its chunks are true to the image and the hash would be wrong in the end, after any number of gigabytes."""
    evil, node = await world.node("evil"), await world.node("c")
    (lib,) = evil.provide({"lib": (content(1000), ())})
    world.registry.clear()
    run = ImportRun(evil.store, FASTCDC, silent, lambda: False)
    (world.tmp_path / "large").write_bytes(content(8 << 20))
    large = run.nar(world.tmp_path / "large", lib.path.base_name)
    objects = (replace(large, nar_hash=lib.signed.info.nar_hash),)
    encoded = encode_image(Kind.STORE_PATH, {}, objects)
    image = Image(encoded.id, Kind.STORE_PATH, {}, objects, tuple(encoded.blocks))
    evil.store.put_blocks(encoded.blocks)
    evil.store.add_image(image, name="large", origin=Origin.PROVIDED, complete=True, path=None)

    async def reply(stream: Stream, keys: tuple[bytes, ...]) -> None:
        await stream.send_all(encode_answer([Found(narinfo_of(lib.signed).format(), image.id, 0)] * len(keys)))

    async def serve(stream: Stream) -> None:
        while (body := await receive_frame(stream, MAX_REQUEST)) is not None:
            await reply(stream, decode_request(body))

    evil.network.handle(PROTOCOL, serve)
    await node.network.connect("evil")
    client = await world.gateway(node)
    assert (await client.get(lib.narinfo_url)).status_code == 200
    assert (await client.get(lib.nar_url)).status_code == 404
    assert node.exchange.traffic("evil").received < 100_000
    assert any("another size" in record.message for record in caplog.records)


async def test_a_peer_that_asks_nonsense(world: World) -> None:
    node = await world.node("p")
    node.provide({"lib": (content(1000), ())})
    other = world.fabric.node("evil")
    for data in (b"\xff\xff\xff\xff", b"\0\0\0\1\xa0", b"\0\0\0\0", b"\0\0\4\0" + bytes(1024)):
        stream = await other.open_stream("p", PROTOCOL)
        await stream.send_all(data)
        with trio.fail_after(5):
            with pytest.raises(StreamClosed):
                await stream.receive_some(100)


async def test_a_crowd_of_signatures_hides_none_that_counts(world: World) -> None:
    """Narinfos with a good signature among many of which nobody knows the keys, one after the other."""
    node = await world.node("p")
    (lib,) = node.provide({"lib": (content(1000), ())})
    for number in range(4):
        crowd = tuple(Signature(f"!{number}-{each}", bytes(64)) for each in range(MAX_SIGNATURES - 1))
        said = SignedInfo(lib.signed.info, (*crowd, *lib.signed.signatures))
        node.records.keep(said, proved=lib.signed.signatures)
    # What others are told, and what stands in a catalog that was filled otherwise.
    for client in (await world.gateway(node), await world.gateway(await world.node("c"))):
        narinfo = parse((await client.get(lib.narinfo_url)).content, expect=lib.path)
        assert judge(narinfo.info, narinfo.signatures, KEYS).trusted
    claimed = claims_of(SignedInfo(lib.signed.info, tuple(Signature(f"!{n}", bytes(64)) for n in range(100))))
    claims.merge(node.store.catalog, [claimed])
    client = await world.gateway(node)
    narinfo = parse((await client.get(lib.narinfo_url)).content, expect=lib.path)
    assert judge(narinfo.info, narinfo.signatures, KEYS).trusted

"""Lists of what nodes publish: asked, answered, and what hostile publishers make of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from p2pnode.errors import NetworkTimeout, NotPublishing, PeerUnreachable, RemoteError, StreamClosed
from p2pnode.net.frames import receive_frame
from p2pnode.net.transport import Stream
from p2pnode.swarm import publishing
from p2pnode.swarm.publishing import CatalogServer, published
from protocols import dagcbor
from protocols.catalog import MAX_REQUEST, PROTOCOL, Entry, Page, decode_request, encode_answer, encode_request
from protocols.cid import CID, Codec
from protocols.framing import frame

from .test_exchange import Peer, World

Reply = Callable[[Stream, CID | None], Awaitable[None]]


def image(number: int) -> CID:
    return CID(Codec.DAG_CBOR, number.to_bytes(32, "big"))


def provide(peer: Peer, directory: Path, count: int) -> dict[CID, str]:
    found = {}
    for number in range(count):
        path = directory / f"{peer.name}-{number}"
        path.write_bytes(f"{number}".encode() * 50)
        found[peer.provide(path).id] = path.name
    return found


def liar(world: World, reply: Reply) -> None:
    async def serve(stream: Stream) -> None:
        while (body := await receive_frame(stream, MAX_REQUEST)) is not None:
            await reply(stream, decode_request(body))

    world.fabric.node("evil").handle(PROTOCOL, serve)


async def test_a_list_of_several_pages(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "MAX_ENTRIES", 4)
    publisher, other = await world.peer("p"), await world.peer("c")
    CatalogServer(publisher.network, publisher.store, publish=True)
    assert await published(other.network, "p") == []
    for count in (4, 9):
        expected = provide(publisher, tmp_path, count)
        found = await published(other.network, "p")
        assert {each.image: each.name for each in found} == expected
        assert all(each.size for each in found)


async def test_a_node_publishes_only_if_it_may(world: World, tmp_path: Path) -> None:
    publisher, other = await world.peer("p"), await world.peer("c")
    CatalogServer(publisher.network, publisher.store, publish=False)
    provide(publisher, tmp_path, 1)
    with pytest.raises(NotPublishing, match="--publish"):
        await published(other.network, "p")
    with pytest.raises(StreamClosed):  # speaks no such protocol
        await published(publisher.network, "c")
    with pytest.raises(PeerUnreachable):
        await published(publisher.network, "nobody")


async def test_names_that_no_terminal_or_file_system_should_see(world: World, tmp_path: Path) -> None:
    names = ["\x1b[31mred\x07", "../../etc/passwd", "a\u202egpj", "", "\n\n", "x" * 255, "good name.img"]
    other = await world.peer("c")

    async def reply(stream: Stream, after: CID | None) -> None:
        await stream.send_all(encode_answer(Page(tuple(Entry(image(n), name, 1) for n, name in enumerate(names)))))

    liar(world, reply)
    found = [each.name for each in await published(other.network, "evil")]
    assert found == ["[31mred", "_.._etc_passwd", "agpj", "", "", "x" * 255, "good name.img"]


async def test_a_file_name_that_is_no_utf8_is_published_all_the_same(world: World, tmp_path: Path) -> None:
    publisher, other = await world.peer("p"), await world.peer("c")
    CatalogServer(publisher.network, publisher.store, publish=True)
    path = tmp_path / ("ü" * 125)
    path.write_bytes(b"x")
    publisher.provide(path)
    monster = "\udcff" + "ü" * 200
    assert publishing._bounded(monster) == "?" + "ü" * 127
    (found,) = await published(other.network, "p")
    assert found.name == path.name


@pytest.mark.parametrize("kind", ["endless", "again", "duplicates", "garbage", "huge", "huge frame", "closes"])
async def test_hostile_lists(world: World, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = await world.peer("c")
    asked = 0

    async def reply(stream: Stream, after: CID | None) -> None:
        nonlocal asked
        asked += 1
        begin = 0 if after is None else int.from_bytes(after.digest, "big") + 1
        page = Page(tuple(Entry(image(begin + n), "x", 1) for n in range(256)), more=True)
        match kind:
            case "endless":  # a million images and more
                await stream.send_all(encode_answer(page))
            case "again":
                await stream.send_all(encode_answer(Page((Entry(image(1), "x", 1),), more=True)))
            case "duplicates":
                await stream.send_all(frame({"images": [[image(1), "x", 1]] * 2, "more": False}))
            case "garbage":
                await stream.send_all(b"\0\0\0\5hello")
            case "huge":
                rows = [[image(n), "x", 1] for n in range(1000)]
                await stream.send_all(frame({"images": rows, "more": False}))
            case "huge frame":
                await stream.send_all(b"\xff\xff\xff\xff")
            case "closes":
                await stream.reset()

    liar(world, reply)
    with trio.fail_after(20):
        with pytest.raises(RemoteError, match="16384 images" if kind == "endless" else "evil|reset"):
            await published(other.network, "evil")
    assert asked <= (publishing.MAX_IMAGES // 256 + 1 if kind == "endless" else 2)


async def test_a_silent_publisher(world: World, autojump_clock: trio.testing.MockClock) -> None:
    other = await world.peer("c")

    async def reply(stream: Stream, after: CID | None) -> None:
        await trio.sleep_forever()

    liar(world, reply)
    began = trio.current_time()
    with pytest.raises(NetworkTimeout):
        await published(other.network, "evil")
    assert trio.current_time() - began < 2 * publishing.PAGE_SECONDS


async def test_peers_that_ask_nonsense_or_too_much(world: World, tmp_path: Path) -> None:
    publisher, other = await world.peer("p"), await world.peer("c")
    CatalogServer(publisher.network, publisher.store, publish=True)
    provide(publisher, tmp_path, 3)
    wrong = frame({"after": bytes(36)})
    for data in (b"\xff\xff\xff\xff", b"\0\0\0\1\xa0", b"\0\0\0\0", wrong, b"\0\0\0\x40" + bytes(64)):
        stream = await other.network.open_stream("p", PROTOCOL)
        await stream.send_all(data)
        with trio.fail_after(5), pytest.raises(StreamClosed):
            await stream.receive_some(100)
    streams = [await other.network.open_stream("p", PROTOCOL) for _ in range(publishing.MAX_STREAMS_PER_PEER)]
    for stream in streams:
        await stream.send_all(encode_request(None))
        assert await receive_frame(stream, 1 << 20) is not None
    with trio.fail_after(5), pytest.raises(StreamClosed):
        refused = await other.network.open_stream("p", PROTOCOL)
        await refused.send_all(encode_request(None))
        await refused.receive_some(1)
    # Pages come at a bounded rate, however fast they are asked for.
    began = trio.current_time()
    for _ in range(10):
        await streams[0].send_all(encode_request(None))
    for _ in range(10):
        body = await receive_frame(streams[0], 1 << 20)
        assert body is not None and len(dagcbor.decode(body)["images"]) == 3
    assert trio.current_time() - began >= 9 * publishing.PAGE_INTERVAL


async def test_peers_that_sit_on_streams_keep_nobody_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "MAX_STREAMS", 4)
    publisher, other = await world.peer("p"), await world.peer("c")
    CatalogServer(publisher.network, publisher.store, publish=True)
    expected = provide(publisher, tmp_path, 2)
    held = []
    for number in range(4):
        stream = await world.fabric.node(f"sitter-{number}").open_stream("p", PROTOCOL)
        await stream.send_all(encode_request(None))
        assert await receive_frame(stream, 1 << 20) is not None
        held.append(stream)
    with trio.fail_after(5):
        assert {each.image: each.name for each in await published(other.network, "p")} == expected
        assert await held[0].receive_some(1) == b""  # the one that was silent for the longest time
        await held[1].send_all(encode_request(None))
        assert await receive_frame(held[1], 1 << 20) is not None
    # One that is at work is not sent away.
    reading, go = trio.Event(), trio.Event()

    async def slow(self: CatalogServer, after: CID | None) -> Page | None:
        reading.set()
        await go.wait()
        return Page(())

    monkeypatch.setattr(publishing, "MAX_STREAMS", 3)
    monkeypatch.setattr(CatalogServer, "_answer", slow)
    for stream in held[1:]:
        await stream.send_all(encode_request(None))
    await reading.wait()
    await trio.testing.wait_all_tasks_blocked(0.1)
    with trio.fail_after(5), pytest.raises(StreamClosed):
        await published(other.network, "p")
    go.set()
    for stream in held[1:]:
        assert await receive_frame(stream, 1 << 20) is not None

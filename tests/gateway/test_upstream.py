"""Upstream binary caches behind the gateway: good ones, and all the ways in which they can be bad."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard

from p2pnode.nix import binary_cache
from p2pnode.nix.hashes import format_sha256
from p2pnode.nix.narinfo import MAX_SIGNATURES, NarInfo, parse
from p2pnode.nix.signatures import Signature, SignedInfo
from p2pnode.store import claims
from tests.gateway.nodes import DEMANDED, NOT_DEMANDED, Path_, World
from tests.nix.caches import ROOT, path, text, vectors
from tests.nix.test_binary_cache import always, files, response, serving
from tests.swarm.peers import content, drop

Handler = Callable[[str, trio.SocketStream], Awaitable[None]]


def cache(directory: Path, paths: list[Path_], compression: str = "xz") -> None:
    """A binary cache as Nix writes one."""
    (directory / "nar").mkdir(parents=True)
    (directory / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    for each in paths:
        data = lzma.compress(each.nar, preset=0) if compression == "xz" else each.nar
        name = f"nar/{each.path.digest}.nar"
        (directory / name).write_bytes(data)
        narinfo = NarInfo(each.signed.info, each.signed.signatures, name, compression)
        (directory / f"{each.path.digest}.narinfo").write_text(narinfo.format())


async def test_the_narinfo_comes_from_upstream_and_the_nar_from_the_swarm(world: World, tmp_path: Path) -> None:
    p, c = await world.node("p"), await world.node("c")
    lib, tool = paths = p.provide({"lib": (content(3 << 20), ()), "tool": (content(999, 2), ("lib",))})
    cache(tmp_path / "cache", paths)
    for file in (tmp_path / "cache/nar").iterdir():
        file.unlink()
    # P has the contents, but knows nothing that proves them.
    with p.store.catalog.transaction() as db:
        db.execute("DELETE FROM claims WHERE kind = 'sig'")
    async with serving(files(tmp_path / "cache")) as url:
        client = await world.gateway(c, upstreams=(url,))
        for each in (tool, lib):
            narinfo = parse((await client.get(each.narinfo_url)).content, expect=each.path)
            assert narinfo.signed == each.signed
            assert (await client.get(each.nar_url)).content == each.nar
    assert c.exchange.traffic("p").received > 3 << 20
    # The signature stays with C, who tells it to the next.
    client = await world.gateway(await world.node("d"))
    narinfo = parse((await client.get(lib.narinfo_url)).content, expect=lib.path)
    assert narinfo.signatures == lib.signed.signatures


@pytest.mark.parametrize("compression", ["xz", "none"])
async def test_what_the_swarm_has_not_comes_over_http_and_is_served_on(
    world: World, tmp_path: Path, compression: str
) -> None:
    origin, c, d = await world.node("o"), await world.node("c"), await world.node("d")
    lib, tool = paths = origin.provide({"lib": (content(3 << 20), ()), "tool": (content(999, 2), ("lib",))})
    await world.fabric.stop("o")
    world.registry.clear()
    cache(tmp_path / "cache", paths, compression)
    requests: list[bytes] = []
    async with serving(files(tmp_path / "cache"), requests) as url:
        client = await world.gateway(c, upstreams=(url,))
        bodies: list[bytes] = []

        async def get(each: Path_) -> None:
            assert (await client.get(each.narinfo_url)).status_code == 200
            bodies.append((await client.get(each.nar_url)).content)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(get, lib)
        await get(tool)
        assert bodies == [lib.nar] * 3 + [tool.nar]
        assert sum(b" /nar/" in request for request in requests) == 2
        part = await client.get(lib.nar_url, headers={"Range": "bytes=1000000-"})
        assert part.status_code == 206 and part.content == lib.nar[1_000_000:]
    await c.announces(2)
    assert [record.complete for record in c.store.images()] == [True, True]
    other = await world.gateway(d)  # upstream is gone
    narinfo = parse((await other.get(tool.narinfo_url)).content, expect=tool.path)
    assert narinfo.signed == tool.signed
    assert (await other.get(lib.nar_url)).content == lib.nar
    assert d.exchange.traffic("c").received > 3 << 20


@pytest.mark.parametrize("each", vectors("accept"))
async def test_accepted_vectors(world: World, tmp_path: Path, each: dict[str, Any]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / f"cache/{path(each).digest}.narinfo").write_bytes(text(each))
    (tmp_path / "cache/nar").symlink_to(ROOT / "nar")
    async with serving(files(tmp_path / "cache")) as url:
        client = await world.gateway(await world.node("c"), DEMANDED, upstreams=(url,))
        answer = await client.get(f"/{path(each).digest}.narinfo")
        assert answer.status_code == 200
        narinfo = parse(answer.content, expect=path(each))
        body = await client.get("/" + narinfo.url)
        assert body.status_code == 200 and len(body.content) == narinfo.info.nar_size


@pytest.mark.parametrize("each", vectors("reject"))
async def test_rejected_vectors(world: World, tmp_path: Path, each: dict[str, Any]) -> None:
    """A bad narinfo is 404; a bad NAR is 404 or breaks off. (Only Nix knows the name of the path that it asks for.)"""
    (tmp_path / "cache").mkdir()
    (tmp_path / f"cache/{path(each).digest}.narinfo").write_bytes(text(each))
    (tmp_path / "cache/nar").symlink_to(ROOT / "nar")
    node = await world.node("c")
    async with serving(files(tmp_path / "cache")) as url:
        client = await world.gateway(node, DEMANDED, upstreams=(url,))
        answer = await client.get(f"/{path(each).digest}.narinfo")
        if each["stage"] in ("parse", "identity", "signature") and each["name"] != "other-name":
            assert answer.status_code == 404
        elif answer.status_code == 200 and each["name"] != "other-name":
            await fails(client, "/" + parse(answer.content).url)
    assert not node.store.images()


async def fails(client: Any, url: str) -> None:
    import httpx

    with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
        answer = await client.get(url)
        assert answer.status_code == 404


def bad_nar(kind: str, each: Path_, narinfo: bytes) -> Handler:
    async def handler(target: str, stream: trio.SocketStream) -> None:
        if target.endswith(".narinfo"):
            await stream.send_all(response(narinfo))
            return
        match kind:
            case "500":
                await stream.send_all(response(b"", "500 Internal Server Error"))
            case "whole":
                await stream.send_all(response(each.nar))
            case "missing":
                await stream.send_all(response(b"", "404 Not Found"))
            case "truncated":
                await stream.send_all(response(each.nar[:-1], length=len(each.nar)))
                await stream.aclose()
            case "oversized":
                await stream.send_all(response(each.nar + b"x"))
            case "changed":
                await stream.send_all(response(each.nar[:-100] + b"x" + each.nar[-99:]))
            case "reset":
                await stream.aclose()
            case "hang":
                await stream.send_all(response(each.nar[:300_000], length=len(each.nar)))
                await trio.sleep_forever()
            case "endless":
                await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while True:
                    await stream.send_all(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            case "in circles":
                await stream.send_all(response(b"", "302 Found", f"Location: {target}"))
            case "encoded":
                await stream.send_all(response(gzip.compress(each.nar), "200 OK", "Content-Encoding: gzip"))
            case "garbage":
                await stream.send_all(b"\0\xff\r\n\r\n" * 1000)
            case "xz" | "gzip" | "bzip2" | "zstd":
                await stream.send_all(response(BOMBS[kind](bytes(100 << 20))))

    return handler


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "xz": partial(lzma.compress, preset=0),
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "zstd": zstandard.compress,
}
BAD_NARS = ["500", "missing", "truncated", "oversized", "changed", "reset", "hang", "endless", "in circles", "encoded"]


@pytest.mark.parametrize("kind", [*BAD_NARS, "garbage", *BOMBS])
async def test_bad_nars(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(binary_cache, "STALL_TIMEOUT", 0.5)
    origin, node = await world.node("o"), await world.node("c")
    (lib,) = origin.provide({"lib": (content(600_000), ())})
    await world.fabric.stop("o")
    world.registry.clear()
    compression = kind if kind in BOMBS else "none"
    narinfo = NarInfo(lib.signed.info, lib.signed.signatures, "nar/x", compression).format().encode()
    async with serving(bad_nar(kind, lib, narinfo)) as url:
        client = await world.gateway(node, upstreams=(url,))
        assert (await client.get(lib.narinfo_url)).status_code == 200
        caplog.clear()
        with trio.fail_after(10):
            await fails(client, lib.nar_url)
    assert not node.store.images()
    assert not list((node.home / "spool").iterdir())
    told(caplog, "upstream http://")


def told(caplog: pytest.LogCaptureFixture, start: str) -> None:
    """That it was logged, in lines of bounded length."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(line.startswith(start) for line in lines), lines
    assert all("\n" not in line and len(line) < 1000 for line in lines), lines


@pytest.mark.parametrize("size", [1, 100, (1 << 62) + 1, (1 << 63) - 1])
async def test_a_size_that_nobody_signed(world: World, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing is demanded, a narinfo can claim any size: nothing is allocated, downloaded or kept for it."""
    origin, node = await world.node("o"), await world.node("c")
    (lib,) = origin.provide({"lib": (content(600_000), ())})
    await world.fabric.stop("o")
    world.registry.clear()
    lie = NarInfo(replace(lib.signed.info, nar_size=size), (), "nar/x", "none").format().encode()
    async with serving(bad_nar("whole", lib, lie)) as url:
        client = await world.gateway(node, NOT_DEMANDED, upstreams=(url,))
        assert (await client.get(lib.narinfo_url)).status_code == 200
        caplog.clear()
        with trio.fail_after(10):
            head = await client.head(lib.nar_url)
            assert head.status_code == 404 or head.headers["content-length"] == str(size)
            await fails(client, lib.nar_url)
    assert not node.store.images()
    told(caplog, "upstream http://")


SILLY = ["truncated", "endless", "dripping", "in circles", "encoded", "garbage", "escapes"]


@pytest.mark.parametrize("kind", ["500", "reset", "hang", "other path", "lie about the size", *SILLY])
async def test_bad_upstreams_are_a_404_in_time(world: World, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    origin, node = await world.node("o"), await world.node("c")
    lib, tool = origin.provide({"lib": (content(1000), ()), "tool": (content(1000, 2), ())})
    await world.fabric.stop("o")
    world.registry.clear()

    async def handler(target: str, stream: trio.SocketStream) -> None:
        other = NarInfo(tool.signed.info, tool.signed.signatures, "nar/x", "none").format()
        match kind:
            case "500":
                await stream.send_all(response(b"", "500 Internal Server Error"))
            case "reset":
                await stream.aclose()
            case "hang":
                await trio.sleep_forever()
            case "other path":
                await stream.send_all(response(other.encode()))
            case "lie about the size":
                lie = other.replace(str(tool.path), str(lib.path)).replace(
                    format_sha256(tool.signed.info.nar_hash), format_sha256(lib.signed.info.nar_hash)
                )
                await stream.send_all(response(lie.replace("NarSize: ", "NarSize: 9").encode()))
            case "truncated":
                await stream.send_all(response(other.encode()[:-40], length=len(other)))
                await stream.aclose()
            case "endless":
                await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    await stream.send_all(bytes(0x10000))
            case "dripping":
                await stream.send_all(response(b"", length=1000))
                while True:
                    await stream.send_all(b"x")
                    await trio.sleep(0.05)
            case "in circles":
                await stream.send_all(response(b"", "302 Found", f"Location: {target}"))
            case "encoded":
                await stream.send_all(response(gzip.compress(other.encode()), "200 OK", "Content-Encoding: gzip"))
            case "garbage":
                await stream.send_all(b"\0\xff\r\n\r\n" * 1000)
            case "escapes":
                await stream.send_all(response(b"StorePath: \x1b[2J\r\a\x00\n" * 100))

    async with serving(handler) as url:
        client = await world.gateway(node, upstreams=(url,), lookup_seconds=0.3)
        for _ in range(3):
            began = trio.current_time()
            assert (await client.get(lib.narinfo_url)).status_code == 404
            assert trio.current_time() - began < 2
    told(caplog, "http://" if kind == "lie about the size" else "upstream http://")


async def test_a_hanging_upstream_costs_few_requests_their_time(world: World) -> None:
    async def hang(target: str, stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with serving(hang) as url:
        client = await world.gateway(await world.node("c"), upstreams=(url,), lookup_seconds=0.3)
        began = trio.current_time()
        for number in range(20):
            assert (await client.get(f"/{number:032}.narinfo")).status_code == 404
        assert trio.current_time() - began < 2.5


async def test_an_upstream_is_no_oracle_for_what_is_not_trusted(world: World) -> None:
    """A cache that answers with a narinfo of its own making, for any path."""
    origin, node = await world.node("o"), await world.node("c")
    (lib,) = origin.provide({"lib": (content(1000), ())}, key=None)
    await world.fabric.stop("o")
    world.registry.clear()
    narinfo = NarInfo(lib.signed.info, (), "nar/x", "none").format().encode()
    async with serving(always(response(narinfo))) as url:
        client = await world.gateway(node, upstreams=(url,))
        assert (await client.get(lib.narinfo_url)).status_code == 404


async def test_what_an_upstream_says_without_proof_is_kept_as_that(world: World, tmp_path: Path) -> None:
    """Also where nobody asked for the narinfo before: the path is known here, and its contents are gone."""
    node = await world.node("c")
    (lib,) = node.provide({"lib": (content(1000), ())}, key=None)
    [record] = node.store.images()
    image = node.store.image(record.id)
    assert image is not None
    drop(node.store, list(image.chunks))
    junk = tuple(Signature(f"nobody-{number}", bytes(64)) for number in range(MAX_SIGNATURES))
    cache(tmp_path / "cache", [Path_(SignedInfo(lib.signed.info, junk), lib.nar)])
    async with serving(files(tmp_path / "cache")) as url:
        client = await world.gateway(node, NOT_DEMANDED, upstreams=(url,), swarm_seconds=0.1)
        assert (await client.get(lib.nar_url)).content == lib.nar
        await node.announces(2)  # the image that it had, and the one that came
    [kept] = claims.of_path(node.store.catalog, lib.path.base_name)
    assert len(kept.signatures) == claims.MAX_UNPROVED

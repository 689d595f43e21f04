"""Clients of the gateway that are not Nix: they lead astray, drip, read nothing, and come in hundreds."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import psutil
import pytest
import trio

from p2pnode.gateway import http
from tests.gateway.nodes import World
from tests.swarm.peers import content

HUNDREDS = 400  # half again as many as there may be connections


def request(target: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: gateway", *headers, b"", b""])


async def ask(port: int, data: bytes) -> bytes:
    """The first bytes of the answer to what stands in `data`; b"" if there is none."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(data)
        return bytes(await stream.receive_some(65536))


def port_of(world: World) -> int:
    return int(world.gateways[-1].addresses[0].rpartition(":")[2])


NOT_THERE = (b"HTTP/1.1 404", b"HTTP/1.1 400", b"HTTP/1.1 414", b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "target",
    [
        b"/nar/../../../../etc/passwd",
        b"/../etc/passwd",
        b"/nar/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        b"/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        b"/nar/..%5c..%5cetc%5cpasswd",
        b"/nar/\\..\\..\\etc\\passwd",
        b"//etc/passwd",
        b"/etc/passwd%00.narinfo",
        b"/etc/passwd\x00.narinfo",
        b"/nix-cache-info%00",
        b"/nix-cache-info/../etc/passwd",
        b"/./nix-cache-info",
        b"http://127.0.0.1/../../etc/passwd",
        b"http://127.0.0.1:1/" + b"0" * 32 + b".narinfo",
        b"https://user:pw@evil.example/nar/" + b"0" * 52 + b".nar",
        b"file:///etc/passwd",
        b"gopher://evil.example/" + b"0" * 32 + b".narinfo",
        b"*",
        b"etc/passwd",
        b"/" + b"0" * 32 + b".narinfo\xc3\xa9",
        b"/" + b"\xef\xbc\xa5" * 32 + b".narinfo",
        b"/" + b"0" * 32 + b".narinfo/",
        b"/" + b"A" * 32 + b".narinfo",
        b"/nar/" + b"0" * 52 + b".nar/../../etc/passwd",
        b"/nar/" + b"0" * 51 + b"%30.nar",
        b"/" + b"a" * 3000,
        b"/" + b"a/" * 30_000,
        b"/" + b"0" * 32 + b".narinfo?" + b"x" * 10_000,
        b"/" + b"0" * 32 + b".narinfo HTTP/1.0\r\nX: ",
        b"/x\r\nX-Injected: y\r\n\r\nGET /nix-cache-info",
    ],
)
async def test_what_leads_astray_leads_nowhere(world: World, target: bytes) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (b"x" * 100, ())})
    client = await world.gateway(node)
    with trio.fail_after(5):
        answer = await ask(port_of(world), request(target))
    assert answer.startswith(NOT_THERE), answer[:200]
    assert b"root:" not in answer and b"StoreDir" not in answer.partition(b"\r\n\r\n")[0]
    assert (await client.get(lib.narinfo_url)).status_code == 200


@asynccontextmanager
async def connected(port: int, count: int, data: bytes) -> AsyncIterator[None]:
    """So many connections that have sent `data`, and neither read nor send anything any more."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))  # both ends are in this process
    try:
        async with AsyncExitStack() as stack:
            for _ in range(count):
                stream = trio.socket.socket()
                stack.callback(stream.close)
                stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
                await stream.connect(("127.0.0.1", port))
                await stream.send(data)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.slow
async def test_hundreds_of_slow_readers_take_neither_the_memory_nor_the_place_of_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (content(16 << 20), ())})
    client = await world.gateway(node)
    assert (await client.get(lib.nar_url)).content == lib.nar
    await client.aclose()
    before = psutil.Process().memory_info().rss
    async with connected(port_of(world), HUNDREDS, request(lib.nar_url.encode())):
        with trio.fail_after(3 * http.WRITE_GRACE):
            answer = await ask(port_of(world), request(lib.narinfo_url.encode()))
        grown = psutil.Process().memory_info().rss - before
    assert answer.startswith(b"HTTP/1.1 200") and f"NarSize: {len(lib.nar)}".encode() in answer
    assert world.gateways[-1].server.connections <= http.MAX_CONNECTIONS
    print(f"{HUNDREDS} slow readers: {grown / 2**20:.0f} MiB more")
    assert grown < 192 << 20
    assert len([each for each in caplog.records if "too slow" in each.message]) == 1


@pytest.mark.parametrize("sent", [b"", b"GET /nix-cache-info HTTP/1.1\r\nHo", request(b"/x")[:-1] + b"X-A: b\r\n" * 9])
async def test_hundreds_of_dripping_requests_keep_nobody_out(world: World, sent: bytes) -> None:
    node = await world.node("p")
    (lib,) = node.provide({"lib": (b"x" * 100, ())})
    client = await world.gateway(node)
    async with connected(port_of(world), HUNDREDS, sent):
        with trio.fail_after(5 * http.HEAD_GRACE):
            answer = await ask(port_of(world), request(lib.narinfo_url.encode()))
        assert answer.startswith(b"HTTP/1.1 200")
        assert (await client.get(lib.nar_url)).content == lib.nar


async def test_a_reader_who_is_slow_but_alone_is_left_in_peace(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE_GRACE", 0.1)
    node = await world.node("p")
    (lib,) = node.provide({"lib": (content(16 << 20), ())})
    client = await world.gateway(node)
    async with client.stream("GET", lib.nar_url) as response:
        body = b""
        async for piece in response.aiter_raw():
            if not body:
                await trio.sleep(1)  # it is the time itself that is tested
            body += piece
    assert body == lib.nar

"""The HTTP server by itself: limits, slow and rude clients, bodies that break off."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import trio

from p2pnode.errors import NotListening
from p2pnode.gateway import http
from p2pnode.gateway.http import Broken, Request, Response, Server

SIZE = 40 << 20


async def big(pieces: int = 40) -> AsyncIterator[bytes]:
    for _ in range(pieces):
        yield bytes(1 << 20)


async def breaking() -> AsyncIterator[bytes]:
    yield b"x" * 1000
    raise Broken("the rest is lost")


async def handler(request: Request) -> Response:
    match request.target:
        case "/small":
            return Response(200, (("X-A", "b"),), b"hello")
        case "/big":
            return Response(200, (), big(), SIZE)
        case "/breaking":
            return Response(200, (), breaking(), 2000)
        case "/fails":
            raise RuntimeError("a fault of ours")
    return Response(404, (), b"no")


async def start(nursery: trio.Nursery, **settings: int) -> tuple[Server, int]:
    server = Server(handler, **settings)
    (address,) = await nursery.start(server.run, "127.0.0.1", 0)
    return server, int(address.rpartition(":")[2])


async def test_requests_on_one_connection(nursery: trio.Nursery) -> None:
    server, port = await start(nursery)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for _ in range(5):
            assert (await client.get("/small")).text == "hello"
            head = await client.head("/small")
            assert head.headers["content-length"] == "5" and head.content == b""
            assert (await client.head("/big")).headers["content-length"] == str(SIZE)
            assert (await client.get("/fails")).status_code == 404  # never a 5xx
        assert server.connections == 1
        assert len((await client.get("/big")).content) == SIZE
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/breaking")
        assert (await client.get("/small")).text == "hello"


async def talk(port: int, data: bytes) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(data)
        received = b""
        with trio.fail_after(10):
            while more := await stream.receive_some():
                received += more
        return received


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET /" + b"x" * 20_000, b"431"),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a: b\r\n" * 3000, b"431"),
        (b"GET /small HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody", b"413"),
        (b"GET /small HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", b"413"),
        (b"GET /small HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", b"400"),  # never a 5xx
        # The body of what is refused anyway is not waited for.
        (b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9000000\r\nExpect: 100-continue\r\n\r\n", b"404"),
        (b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody", b"404"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),  # TLS
    ],
)
async def test_bad_requests(nursery: trio.Nursery, data: bytes, status: bytes) -> None:
    _, port = await start(nursery)
    assert (await talk(port, data)).startswith(b"HTTP/1.1 " + status)


async def test_a_request_that_drips_is_given_up(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.2)
    server, port = await start(nursery)
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET / HT")
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
    assert server.connections == 0


async def test_a_reader_that_takes_nothing_is_disconnected(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "WRITE_SECONDS", 0.3)
    server, port = await start(nursery)
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET /big HTTP/1.1\r\nHost: h\r\n\r\n")
        with trio.fail_after(5):
            assert await stream.receive_some(1) == b"H"
            assert server.connections == 1
            while server.connections:  # nothing else tells: reading on would let the server go on
                await trio.sleep(0.01)


async def test_idle_connections_make_room_and_busy_ones_do_not(nursery: trio.Nursery) -> None:
    server, port = await start(nursery, max_connections=4)
    idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(10)]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert (await client.get("/small")).text == "hello"
        assert server.connections <= 4
    for stream in idle:
        await stream.aclose()


async def test_a_port_that_is_taken(nursery: trio.Nursery) -> None:
    _, port = await start(nursery)
    with pytest.raises(NotListening, match=str(port)):
        await Server(handler).run("127.0.0.1", port)

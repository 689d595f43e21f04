"""Caches that we read: those that Nix writes, and those that lie, stall, drip, bomb and lead astray."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import lzma
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import zstandard

from p2pnode.errors import CacheError, NarInfoError, NetworkTimeout, NodeError, UsageError, VerificationFailed
from p2pnode.nix import binary_cache
from p2pnode.nix.binary_cache import BinaryCache, FileCache, HttpCache, open_cache
from p2pnode.nix.decompress import PIECE, decompressing
from p2pnode.nix.narinfo import MAX_NARINFO, NarInfo, parse
from tests.nix.caches import ROOT, closure, nar, path, text, vector, vectors
from tests.nix.stores import ChrootStore

PLAIN = parse(text(vector("plain")))
PLAIN_NAR = nar(PLAIN.url)
Handler = Callable[[str, trio.SocketStream], Awaitable[None]]


def response(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    fields = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(fields).encode() + body


@asynccontextmanager
async def serving(handler: Handler, heads: list[bytes] | None = None) -> AsyncIterator[str]:
    """A server whose every answer is `handler`'s; gives its URL. `heads` takes the requests."""

    async def connection(stream: trio.SocketStream) -> None:
        received = b""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                while more := await stream.receive_some():
                    received += more
                    if b"\r\n\r\n" in received:
                        head, _, received = received.partition(b"\r\n\r\n")
                        if heads is not None:
                            heads.append(head)
                        await handler(head.split(b" ")[1].decode(), stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            lambda task_status: trio.serve_tcp(connection, 0, host="127.0.0.1", task_status=task_status)
        )
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


def files(directory: Path) -> Handler:
    async def handler(target: str, stream: trio.SocketStream) -> None:
        file = directory / target.lstrip("/").partition("?")[0]
        if file.is_file():
            await stream.send_all(response(file.read_bytes()))
        else:
            await stream.send_all(response(b"no such file", "404 Not Found"))

    return handler


def always(*answers: bytes) -> Handler:
    async def handler(target: str, stream: trio.SocketStream) -> None:
        for answer in answers:
            await stream.send_all(answer)

    return handler


async def whole(cache: BinaryCache, narinfo: NarInfo) -> bytes:
    return b"".join([piece async for piece in cache.nar(narinfo)])


@pytest.mark.nix
@pytest.mark.parametrize("compression", ["none", "xz", "zstd", "bzip2", "gzip"])
async def test_caches_that_nix_writes(tmp_path, compression):
    store = ChrootStore(tmp_path / "n")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/random").write_bytes(os.urandom(1 << 20))
    (tmp_path / "tree/zeros").write_bytes(bytes(3 << 20))
    added = store.add(tmp_path / "tree")
    store.copy_to(f"file://{tmp_path}/cache?compression={compression}", added)
    dumped = store.run_bytes("nix-store", "--dump", str(store.real(added)))
    async with serving(files(tmp_path / "cache")) as url:
        for place in (f"file://{tmp_path}/cache", str(tmp_path / "cache"), url, url + "/"):
            async with open_cache(place) as cache:
                await cache.info()
                narinfo = await cache.narinfo(added)
                assert narinfo is not None and narinfo.compression == compression
                assert narinfo == await cache.narinfo(added.digest)
                pieces = [piece async for piece in cache.nar(narinfo)]
                assert b"".join(pieces) == dumped and max(map(len, pieces)) <= PIECE
                assert await cache.narinfo("0" * 32) is None


@pytest.mark.parametrize("each", vectors("accept"))
async def test_accepted_vectors(each, tmp_path):
    (tmp_path / f"{path(each).digest}.narinfo").write_bytes(text(each))
    (tmp_path / "nar").symlink_to(ROOT / "nar")
    async with serving(files(tmp_path)) as url:
        for place in (url, str(tmp_path)):
            async with open_cache(place) as cache:
                narinfo = await cache.narinfo(path(each))
                assert narinfo is not None
                if each["name"] != "url-query" or place == url:  # a directory has no queries
                    assert await whole(cache, narinfo) == nar(narinfo.url.partition("?")[0])


@pytest.mark.parametrize("each", vectors("reject"))
async def test_rejected_vectors(each, tmp_path):
    """Refused at the stage that the vector names, or before: only signatures are not looked at here."""
    (tmp_path / f"{path(each).digest}.narinfo").write_bytes(text(each))
    (tmp_path / "nar").symlink_to(ROOT / "nar")
    async with serving(files(tmp_path)) as url:
        for place in (url, str(tmp_path)):
            async with open_cache(place) as cache:
                if each["stage"] in ("parse", "identity"):
                    with pytest.raises(NarInfoError):
                        await cache.narinfo(path(each))
                elif each["stage"] in ("read", "contents"):
                    narinfo = await cache.narinfo(path(each))
                    assert narinfo is not None
                    with pytest.raises((VerificationFailed, CacheError)):
                        await whole(cache, narinfo)


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "410 Gone", "401 Unauthorized"])
async def test_what_means_that_it_is_not_there(status):
    async with serving(always(response(b"x", status))) as url, open_cache(url) as cache:
        assert await cache.narinfo(PLAIN.info.path) is None
        with pytest.raises(CacheError, match="not a binary cache"):
            await cache.info()
        with pytest.raises(CacheError, match=status[:3]):
            await whole(cache, PLAIN)


@pytest.mark.parametrize(
    "answer",
    [
        response(b"", "500 Internal Server Error"),
        response(b"", "503 Service Unavailable"),
        response(b"", "204 No Content"),
        response(text(vector("plain")), "206 Partial Content"),
        response(text(vector("plain")), "200 OK", "Content-Encoding: gzip"),
        response(b"", "302 Found", "Location: /again"),
        response(b"", "302 Found", "Location: file:///etc/passwd"),
        response(b"", "302 Found", "Location: http://[bad"),
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        response(text(vector("plain"))[:100], length=400),
        response(b"x" * (MAX_NARINFO + 1)),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
    ],
    ids=lambda answer: repr(answer[9:50]),
)
async def test_servers_that_misbehave(answer):
    async def handler(target: str, stream: trio.SocketStream) -> None:
        await stream.send_all(answer)
        await stream.aclose()

    with trio.fail_after(10):
        async with serving(handler) as url, open_cache(url) as cache:
            with pytest.raises(CacheError) as caught:
                await cache.narinfo(PLAIN.info.path)
            assert url.split("/")[2] in str(caught.value) or "302" in str(answer)
            with pytest.raises(NodeError):
                await whole(cache, PLAIN)


async def test_nobody_listens():
    async with open_cache("http://127.0.0.1:1") as cache:
        with pytest.raises(CacheError, match="cannot be fetched"):
            await cache.narinfo(PLAIN.info.path)


async def test_what_nobody_listens_to_says_no_password():
    """Caches with a password have it in their URL, and errors go to logs."""
    async with open_cache("http://user:secret@127.0.0.1:1/sub") as cache:
        assert cache.url == "http://127.0.0.1:1/sub"
        for ask in (cache.info(), cache.narinfo(PLAIN.info.path), whole(cache, PLAIN)):
            with pytest.raises(CacheError, match=r"127\.0\.0\.1:1/sub/") as caught:
                await ask
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("settings", ["", "/", "?priority=10", "/?trusted=true&priority=10"])
async def test_a_server_with_a_password_and_settings_of_nix(settings):
    heads = []
    async with (
        serving(files(ROOT), heads) as url,
        open_cache(url.replace("http://", "http://user:secret@") + "/nar" + settings) as cache,
    ):
        assert await whole(cache, dataclasses.replace(PLAIN, url=PLAIN.url.removeprefix("nar/"))) == PLAIN_NAR
        with pytest.raises(CacheError, match="status 404") as caught:
            await whole(cache, PLAIN)
        assert "secret" not in str(caught.value)
    assert heads[0].startswith(b"GET /nar/") and b"Authorization: Basic " in heads[0]


@pytest.mark.parametrize(
    "url",
    ["http://" + "a" * 300 + "/", "http://a..b/", "http://\\/", "https://", "http:", "http://[::1", "http://a:99999/"],
)
async def test_a_host_that_cannot_be(url):
    """In a narinfo, or where a server redirects to."""
    redirect = response(b"", "302 Found", f"Location: {url}")
    async with serving(always(redirect)) as server, open_cache(server) as cache:
        with pytest.raises(CacheError) as caught:
            await whole(cache, dataclasses.replace(PLAIN, url=url))
        assert len(str(caught.value)) < 700
        with pytest.raises(CacheError):
            await cache.narinfo(PLAIN.info.path)


async def test_redirects_are_followed(tmp_path):
    async def handler(target: str, stream: trio.SocketStream) -> None:
        if target.startswith("/moved/"):
            await files(ROOT)(target.removeprefix("/moved"), stream)
        else:
            await stream.send_all(response(b"", "302 Found", f"Location: /moved{target}"))

    async with serving(handler) as url, open_cache(url) as cache:
        assert await whole(cache, PLAIN) == PLAIN_NAR
        elsewhere = dataclasses.replace(PLAIN, url=f"{url}/moved/{PLAIN.url}")  # an absolute URL
        assert await whole(cache, elsewhere) == PLAIN_NAR


async def test_cookies_are_not_kept():
    asked = []

    async def handler(target: str, stream: trio.SocketStream) -> None:
        await stream.send_all(response(text(vector("plain")), "200 OK", f"Set-Cookie: c{len(asked)}=1"))

    async with serving(handler, asked) as url, open_cache(url) as cache:
        for _ in range(3):
            await cache.narinfo(PLAIN.info.path)
    assert len(asked) == 3 and b"ookie" not in b"".join(asked)


async def test_a_server_that_never_answers(monkeypatch):
    async def handler(target: str, stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(binary_cache, "LOOKUP_TIMEOUT", 0.1)
    monkeypatch.setattr(binary_cache, "STALL_TIMEOUT", 0.1)
    with trio.fail_after(10):
        async with serving(handler) as url, open_cache(url) as cache:
            with pytest.raises(NetworkTimeout):
                await cache.narinfo(PLAIN.info.path)
            with pytest.raises(NetworkTimeout):
                await whole(cache, PLAIN)


@pytest.mark.parametrize("compression", ["none", "xz"])
async def test_a_nar_that_drips_or_stalls(monkeypatch, compression):
    """Each byte comes in time, and still the whole would take for ever."""
    data = PLAIN_NAR if compression == "none" else lzma.compress(os.urandom(3000))

    async def handler(target: str, stream: trio.SocketStream) -> None:
        await stream.send_all(response(b"", length=len(data)))
        for byte in data:
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.02)

    monkeypatch.setattr(binary_cache, "STALL_TIMEOUT", 0.3)
    monkeypatch.setattr(binary_cache, "MIN_RATE", 1e9)
    narinfo = dataclasses.replace(PLAIN, compression=compression, file_hash=None, file_size=None)
    with trio.fail_after(10):
        async with serving(handler) as url, open_cache(url) as cache:
            with pytest.raises(NetworkTimeout, match="given up"):
                await whole(cache, narinfo)


async def test_a_nar_that_drips_behind_a_large_size(monkeypatch):
    """The size of the file is not signed, and buys no time."""

    async def handler(target: str, stream: trio.SocketStream) -> None:
        await stream.send_all(response(b"", length=1 << 60))
        while True:
            await stream.send_all(b"x")
            await trio.sleep(0.02)

    monkeypatch.setattr(binary_cache, "STALL_TIMEOUT", 0.3)
    narinfo = dataclasses.replace(PLAIN, compression="none", file_hash=None, file_size=1 << 60)
    with trio.fail_after(10):
        async with serving(handler) as url, open_cache(url) as cache:
            with pytest.raises(NetworkTimeout, match="given up"):
                await whole(cache, narinfo)


async def test_a_slow_nar_that_comes_fast_enough_is_waited_for(monkeypatch):
    async def handler(target: str, stream: trio.SocketStream) -> None:
        await stream.send_all(response(b"", length=len(PLAIN_NAR)))
        for byte in PLAIN_NAR:
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.005)

    monkeypatch.setattr(binary_cache, "STALL_TIMEOUT", 0.5)
    monkeypatch.setattr(binary_cache, "MIN_RATE", 10)
    narinfo = dataclasses.replace(PLAIN, compression="none", file_hash=None, file_size=None)
    assert len(PLAIN_NAR) * 0.005 > 0.5
    async with serving(handler) as url, open_cache(url) as cache:
        assert await whole(cache, narinfo) == PLAIN_NAR


ENDLESS = {
    "padding": ("xz", lzma.compress(PLAIN_NAR), bytes(1 << 16)),
    "empty xz streams": ("xz", b"", lzma.compress(b"") * 2000),
    "empty gzip members": ("gzip", b"", gzip.compress(b"") * 3000),
    "empty bzip2 streams": ("bzip2", b"", bz2.compress(b"") * 4000),
    "skippable zstd frames": ("zstd", b"", b"\x50\x2a\x4d\x18\0\0\1\0" + bytes(1 << 16)),
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("file_size", [None, 1 << 60])
async def test_a_file_that_never_ends_and_gives_nothing(kind, file_size):
    compression, first, rest = ENDLESS[kind]

    async def handler(target: str, stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if first:
            await stream.send_all(b"%x\r\n%b\r\n" % (len(first), first))
        while True:
            await stream.send_all(b"%x\r\n%b\r\n" % (len(rest), rest))

    narinfo = dataclasses.replace(PLAIN, compression=compression, file_hash=None, file_size=file_size)
    with trio.fail_after(10):
        async with serving(handler) as url, open_cache(url) as cache:
            with pytest.raises(VerificationFailed, match="longer"):
                await whole(cache, narinfo)


COMPRESS = {
    "none": bytes,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("fault", ["truncated", "longer", "changed", "garbage after", "wrong size", "no faults"])
async def test_bodies(tmp_path, compression, fault):
    data = bytearray(COMPRESS[compression](PLAIN_NAR))
    info = PLAIN.info
    match fault:
        case "truncated":
            del data[-9:]
        case "longer":
            data = bytearray(COMPRESS[compression](PLAIN_NAR + bytes(8)))
        case "changed":
            data = bytearray(COMPRESS[compression](PLAIN_NAR.replace(b"lib", b"bil")))
        case "garbage after":
            data += b"garbage"
        case "wrong size":
            info = dataclasses.replace(info, nar_size=info.nar_size + 8)
    narinfo = dataclasses.replace(PLAIN, info=info, url="n", compression=compression, file_hash=None, file_size=None)
    (tmp_path / "n").write_bytes(data)
    seen = b""
    async with serving(files(tmp_path)) as url:
        for place in (url, str(tmp_path)):
            async with open_cache(place) as cache:
                if fault == "no faults":
                    assert await whole(cache, narinfo) == PLAIN_NAR
                    continue
                try:
                    seen = b""
                    async for piece in cache.nar(narinfo):
                        seen += piece
                except (VerificationFailed, CacheError):
                    assert seen != PLAIN_NAR  # the last piece is held back until all is checked
                else:
                    # What stands after the end of a compressed stream is not part of the NAR, and unsigned anyway.
                    assert seen == PLAIN_NAR and compression in ("zstd", "gzip", "bzip2", "xz")
                    assert fault in ("garbage after", "truncated")


@pytest.mark.parametrize("compression", ["xz", "zstd", "bzip2", "gzip"])
def test_a_bomb_takes_no_more_memory_than_its_pieces(compression):
    """64 MiB of zeros in a few hundred bytes, given at once and byte by byte."""
    bomb = COMPRESS[compression](bytes(64 << 20))
    assert len(bomb) < 1 << 17
    read = decompressing(compression, iter([bomb, b""]).__next__)
    total = 0
    for _ in range(20):
        piece = read()
        assert 0 < len(piece) <= PIECE
        total += len(piece)
    small = COMPRESS[compression](bytes(100_000))
    steps = iter([bytes([byte]) for byte in small] + [b""] * 10)
    read = decompressing(compression, steps.__next__)
    assert b"".join(iter(read, b"")) == bytes(100_000)


@pytest.mark.parametrize("compression", ["xz", "zstd", "bzip2", "gzip"])
def test_several_streams_one_after_the_other(compression):
    parts = [COMPRESS[compression](bytes([number]) * 1000) for number in range(5)]
    pieces = iter([*parts, b"", b""])
    assert b"".join(iter(decompressing(compression, pieces.__next__), b"")) == b"".join(
        bytes([number]) * 1000 for number in range(5)
    )


def test_memory_that_a_stream_may_ask_for():
    huge = lzma.compress(b"x", format=lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}])
    with pytest.raises(CacheError, match="damaged"):
        decompressing("xz", iter([huge, b""]).__next__)()
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(bytes(1000)) + compressor.flush()
    with pytest.raises(CacheError, match="damaged"):
        decompressing("zstd", iter([frame, b""]).__next__)()


@pytest.mark.parametrize("compression", ["br", "lzip", "lzma2", "rot13"])
async def test_compressions_that_we_do_not_read(compression):
    async with FileCache(ROOT) as cache:
        with pytest.raises(CacheError, match=compression):
            await whole(cache, dataclasses.replace(PLAIN, compression=compression))


@pytest.mark.parametrize(
    "url",
    [
        "../secret",
        "nar/../../secret",
        "/etc/passwd",
        "file:///etc/passwd",
        "nar/%2e%2e/%2e%2e/secret",
        "//host/x",
        "a:b",
    ],
)
async def test_urls_that_lead_astray(tmp_path, url):
    directory = tmp_path / "cache"
    directory.mkdir()
    (tmp_path / "secret").write_bytes(PLAIN_NAR)
    asked = []

    async def handler(target: str, stream: trio.SocketStream) -> None:
        asked.append(target)
        await stream.send_all(response(PLAIN_NAR))

    async with serving(handler) as server:
        for place in (server, str(directory)):
            async with open_cache(place) as cache:
                with pytest.raises(CacheError):
                    await whole(cache, dataclasses.replace(PLAIN, url=url))
    assert asked == []


async def test_a_fifo_in_a_directory_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / f"{PLAIN.info.path.digest}.narinfo")
    os.mkdir(tmp_path / "nix-cache-info")
    with trio.fail_after(5):
        async with FileCache(tmp_path) as cache:
            with pytest.raises(CacheError, match="not a file"):
                await cache.narinfo(PLAIN.info.path)
            with pytest.raises(CacheError):
                await cache.info()


@pytest.mark.parametrize("place", ["ftp://host/", "s3://bucket", "file://relative", "http://", "http://host:port"])
def test_places_that_are_no_caches(place):
    with pytest.raises(UsageError):
        open_cache(place)


async def test_hash_parts_that_are_none():
    async with FileCache(ROOT) as cache:
        for part in ("", "x", "../../../../etc/passwd\0aaaaaaaaaa", "0" * 31 + "/"):
            with pytest.raises(UsageError):
                await cache.narinfo(part)


@pytest.mark.parametrize(
    "said, complaint",
    [("StoreDir: /gnu/store\n", "/gnu/store"), ("Priority: high\n", "no number"), ("Priority: -1\n", "no number")],
)
async def test_cache_info(tmp_path, said, complaint):
    (tmp_path / "nix-cache-info").write_text(said)
    async with FileCache(tmp_path) as cache:
        with pytest.raises(CacheError, match=complaint):
            await cache.info()
        (tmp_path / "nix-cache-info").write_text("")
        assert await cache.info() == binary_cache.CacheInfo(False, 50)


async def test_leaving_a_nar_in_the_middle_leaves_nothing_running(tmp_path):
    data = bytes(8 << 20)
    (tmp_path / "n").write_bytes(zstandard.ZstdCompressor().compress(data))
    info = dataclasses.replace(PLAIN.info, nar_size=len(data), nar_hash=hashlib.sha256(data).digest())
    narinfo = dataclasses.replace(PLAIN, info=info, url="n", compression="zstd", file_hash=None, file_size=None)
    async with serving(files(tmp_path)) as url, open_cache(url) as cache:
        for _ in range(30):  # more than there may be connections
            pieces = cache.nar(narinfo)
            await anext(pieces)
            await pieces.aclose()
        assert await whole(cache, narinfo) == data
    assert threading.active_count() < 50


def test_every_vector_is_used():
    assert len(closure()) == 8 and HttpCache

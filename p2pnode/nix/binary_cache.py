"""Reading binary caches: `file://` directories and `http(s)://` servers, as a Nix client reads them.

Source: libstore/binary-cache-store.cc, http-binary-cache-store.cc and filetransfer.cc of Nix 2.36. Nothing a cache
sends is believed: bodies are bounded, waits are limited, and a NAR ends only when it has the size and hash that its
narinfo gives (whose signatures are `trust`'s business).
"""

from __future__ import annotations

import hashlib
import os
import stat
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Self

import httpx
import trio

from p2pnode.errors import CacheError, NetworkTimeout, UsageError, VerificationFailed
from p2pnode.nix.decompress import PIECE, decompressing
from p2pnode.nix.narinfo import MAX_NARINFO, NarInfo, parse
from p2pnode.nix.storepath import DIGEST_DIGITS, STORE_DIR, StorePath

CACHE_INFO = "nix-cache-info"
MAX_CACHE_INFO = 1 << 16

CONNECT_TIMEOUT = 5.0
"""Seconds, as in Nix since 2.29."""

STALL_TIMEOUT = 30.0
"""Seconds without a byte. Nix waits 300, but it has nowhere else to go while it waits."""

LOOKUP_TIMEOUT = 10.0
"""Seconds for a whole narinfo or nix-cache-info, whose body is a few hundred bytes."""

MIN_RATE = 16 << 10
"""Bytes per second below which a NAR is given up after STALL_TIMEOUT: one that drips would take its reader days."""

MAX_REDIRECTS = 10  # as in Nix

MAX_CONNECTIONS = 25  # `http-connections` of Nix

_ABSENT = frozenset({401, 403, 404, 410})  # what Nix takes for "this cache does not have it"; S3 says 403


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What a cache says about itself. Smaller `priority` is asked first."""

    want_mass_query: bool = False
    priority: int = 50


Receive = Callable[[], Awaitable[bytes]]
"""Gives the next bytes of a body, some at least; b"" at the end."""


class BinaryCache(ABC):
    """A binary cache to read from. Use as an async context manager, made by `open_cache`."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @abstractmethod
    async def aclose(self) -> None:
        """Close what is kept open between requests."""

    async def info(self) -> CacheInfo:
        """Raises CacheError if this is no binary cache or that of another store, NetworkTimeout."""
        data = await self._get(CACHE_INFO, MAX_CACHE_INFO)
        if data is None:
            raise CacheError(f"{self.url} is not a binary cache: it has no {CACHE_INFO}")
        return _parse_info(self.url, data)

    async def narinfo(self, path: StorePath | str) -> NarInfo | None:
        """What the cache says about a store path, or about the path with these 32 digits; None if it has none.

        Raises NarInfoError for one that Nix would refuse or that is about another path, CacheError, NetworkTimeout.
        """
        digest = path.digest if isinstance(path, StorePath) else path
        if len(digest) != DIGEST_DIGITS or not digest.isalnum():
            raise UsageError(f"{digest[:80]!r} is not the hash part of a store path")
        data = await self._get(f"{digest}.narinfo", MAX_NARINFO)
        return None if data is None else parse(data, expect=path)

    async def nar(self, narinfo: NarInfo) -> AsyncGenerator[bytes, None]:
        """The NAR, decompressed, in pieces of at most 256 KiB. The last one comes only if size and hash are right.

        Raises VerificationFailed (also for a file of another size or hash than the narinfo says), CacheError (not
        there, unreadable, unknown compression), NetworkTimeout (no byte for a while, or too few of them).
        """
        info = narinfo.info
        check = hashlib.sha256()
        left = info.nar_size
        last = b""
        async with self._open(narinfo.url) as receive:
            file = _File(narinfo, receive)
            read = decompressing(narinfo.compression, file.read_in_thread)
            as_it_is = narinfo.compression == "none"
            while piece := await (file.read() if as_it_is else trio.to_thread.run_sync(read)):
                left -= len(piece)
                if left < 0:
                    raise VerificationFailed(
                        f"{self.url} sent more for {info.path} than the {info.nar_size} bytes it has"
                    )
                if last:
                    yield last
                check.update(piece)
                last = piece
            await file.finish()
        if left or check.digest() != info.nar_hash:
            raise VerificationFailed(f"what {self.url} sent for {info.path} is not what its narinfo says")
        yield last

    @abstractmethod
    async def _get(self, name: str, limit: int) -> bytes | None:
        """A small file whole; None if it is not there."""

    @abstractmethod
    def _open(self, url: str) -> AbstractAsyncContextManager[Receive]:
        """The body of a NAR file, `url` as the narinfo gives it."""


class _File:
    """The compressed file on its way: what came so far against what the narinfo says."""

    def __init__(self, narinfo: NarInfo, receive: Receive) -> None:
        self._narinfo = narinfo
        self._receive = receive
        self._hash = hashlib.new(narinfo.file_hash[0], usedforsecurity=False) if narinfo.file_hash else None
        self._size = 0
        # No compression makes a file longer than this; headers, padding and empty frames could go on for ever. What the
        # narinfo says of the file's size, nobody signed.
        most = 2 * narinfo.info.nar_size + (1 << 20)
        self._most = most if narinfo.file_size is None else min(most, narinfo.file_size)
        # Time spent waiting for the other side, not for whoever takes the pieces. Each byte earns its share of it.
        self._patience = STALL_TIMEOUT

    def read_in_thread(self) -> bytes:
        return trio.from_thread.run(self.read)

    async def read(self) -> bytes:
        start = trio.current_time()
        with trio.move_on_after(max(0.0, self._patience)) as scope:
            data = await self._receive()
        if scope.cancelled_caught:
            raise NetworkTimeout(f"the NAR of {self._narinfo.info.path} does not arrive; given up")
        waited = trio.current_time() - start
        self._patience = min(STALL_TIMEOUT, self._patience - waited + len(data) / MIN_RATE)
        self._size += len(data)
        if self._size > self._most:
            raise VerificationFailed(f"the file of {self._narinfo.info.path} is longer than its narinfo says")
        if self._hash is not None:
            self._hash.update(data)
        return data

    async def finish(self) -> None:
        """The decompressor has stopped asking: look at what the narinfo says of the whole file."""
        while await self.read():
            pass  # zstd and its like may stop before the end that the body has
        narinfo = self._narinfo
        wrong_size = narinfo.file_size is not None and narinfo.file_size != self._size
        wrong_hash = (
            self._hash is not None and narinfo.file_hash is not None and self._hash.digest() != narinfo.file_hash[1]
        )
        if wrong_size or wrong_hash:
            raise VerificationFailed(f"the file of {narinfo.info.path} is not the one that its narinfo describes")


class FileCache(BinaryCache):
    """A directory, on this machine or mounted."""

    def __init__(self, directory: Path) -> None:
        super().__init__(f"file://{directory}")
        self.directory = directory

    async def aclose(self) -> None:
        """Nothing is kept open."""

    async def hash_parts(self) -> list[str]:
        """Of all paths that the cache says it has, sorted."""

        def listed() -> list[str]:
            try:
                names = os.listdir(self.directory)
            except OSError as error:
                raise CacheError(f"{self.directory} cannot be read: {error.strerror}") from error
            parts = [name.removesuffix(".narinfo") for name in names if name.endswith(".narinfo")]
            return sorted(part for part in parts if len(part) == DIGEST_DIGITS)

        return await trio.to_thread.run_sync(listed)

    async def _get(self, name: str, limit: int) -> bytes | None:
        def read() -> bytes | None:
            fd = self.descriptor(name)
            if fd is None:
                return None
            try:
                with open(fd, "rb") as file:
                    return file.read(limit + 1)
            except OSError as error:
                raise CacheError(f"{name} of {self.url} cannot be read: {error.strerror}") from error

        data = await trio.to_thread.run_sync(read)
        if data is not None and len(data) > limit:
            raise CacheError(f"{name} of {self.url} is larger than any can be")
        return data

    @asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[Receive]:
        fd = await trio.to_thread.run_sync(self.descriptor, url)
        if fd is None:
            raise CacheError(f"{self.url} has no file {url[:200]!r}")
        with open(fd, "rb", buffering=0) as file:

            async def receive() -> bytes:
                try:
                    return await trio.to_thread.run_sync(file.read, PIECE)
                except OSError as error:
                    raise CacheError(f"{url[:200]!r} of {self.url} cannot be read: {error.strerror}") from error

            yield receive

    def descriptor(self, name: str) -> int | None:
        """A regular file below the directory, opened to be read; None if there is none of that name. Blocks.

        Symlinks are followed: whoever can make them can write the file's contents as well, and what a cache says of
        them is checked. Raises CacheError.
        """
        parts = name.split("/")
        if "://" in name or not all(parts) or ".." in parts:
            raise CacheError(f"{self.url} names a file outside of it: {name[:200]!r}")
        try:
            # O_NONBLOCK: a fifo must not make open() wait for a writer.
            fd = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CacheError(f"{name[:200]!r} of {self.url} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CacheError(f"{name[:200]!r} of {self.url} is not a file")
        return fd


class HttpCache(BinaryCache):
    """A server. Connections are kept and shared; redirects are followed."""

    def __init__(self, url: str) -> None:
        # What follows a "?" are settings of Nix, such as ?priority=10.
        base = httpx.URL(url.partition("?")[0].partition("#")[0].rstrip("/") + "/")
        super().__init__(_shown(base).rstrip("/"))
        self._base = base
        self._client = httpx.AsyncClient(
            # No compression of the transfer: a body of 1 KB could become a terabyte, and NARs are compressed already.
            headers={"User-Agent": "p2pnode", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(STALL_TIMEOUT, connect=CONNECT_TIMEOUT),
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=60),
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none: a server could fill our memory
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _get(self, name: str, limit: int) -> bytes | None:
        url = self._base.join(name)
        with trio.move_on_after(LOOKUP_TIMEOUT):
            async with self._request(url) as response:
                if response.status_code in _ABSENT:
                    return None
                self._check(response)
                body = bytearray()
                async for data in response.aiter_raw():
                    body += data
                    if len(body) > limit:
                        raise CacheError(f"{_shown(url)} is larger than the {limit} bytes it can have")
                return bytes(body)
        raise NetworkTimeout(f"{_shown(url)} did not answer within {LOOKUP_TIMEOUT:g} s")

    @asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[Receive]:
        async with self._request(self._nar_url(url)) as response:
            self._check(response)
            pieces = response.aiter_raw()

            async def receive() -> bytes:
                with _named_errors(_shown(response.url)):
                    return await anext(pieces, b"")

            yield receive

    def _nar_url(self, url: str) -> httpx.URL:
        """`url` of a narinfo: below the cache's own, or anywhere on the web; Nix allows both."""
        try:
            joined = self._base.join(url)
        except (httpx.InvalidURL, ValueError):
            raise CacheError(f"a narinfo of {self.url} has a URL that is none: {url[:200]!r}") from None
        absolute = url.startswith(("http://", "https://"))
        path = urllib.parse.unquote(url.partition("?")[0])
        if not absolute and (":" in path.partition("/")[0] or path.startswith("/") or ".." in path.split("/")):
            raise CacheError(f"a narinfo of {self.url} has a URL that leads out of it: {url[:200]!r}")
        return joined

    @asynccontextmanager
    async def _request(self, url: httpx.URL) -> AsyncIterator[httpx.Response]:
        with _named_errors(_shown(url)):
            async with self._client.stream("GET", url) as response:
                yield response

    def _check(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            raise CacheError(f"{_shown(response.url)} answers with status {response.status_code}")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise CacheError(
                f"{_shown(response.url)} answers in the encoding {encoding[:50]!r}, which was not asked for"
            )


def open_cache(url: str) -> BinaryCache:
    """The cache at `url`: `file:///DIR`, a directory, `http://` or `https://`. Raises UsageError for anything else."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FileCache(Path(os.path.abspath(url)))
    if scheme in ("http", "https") and rest.strip("/"):
        try:
            return HttpCache(url)
        except httpx.InvalidURL as error:
            raise UsageError(f"{url[:200]!r} is not a URL: {error}") from None
    if scheme == "file" and rest.startswith("/"):
        return FileCache(Path(urllib.parse.unquote(rest.partition("?")[0])))
    raise UsageError(f"{url[:200]!r} is not the URL of a binary cache: file:///DIR, http:// or https:// is")


def _shown(url: httpx.URL) -> str:
    """A URL for messages and logs, which nobody may read a password in, and of bounded length."""
    return str(url.copy_with(username="", password="") if url.userinfo else url)[:300]


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException:
        raise NetworkTimeout(f"{url} did not answer in time") from None
    except httpx.TooManyRedirects:
        raise CacheError(f"{url} is redirected more than {MAX_REDIRECTS} times") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:  # UnicodeError: of a host
        reason = (str(error) or type(error).__name__)[:300]  # it may quote what the server sent
        raise CacheError(f"{url} cannot be fetched: {reason}") from error


def _parse_info(url: str, data: bytes) -> CacheInfo:
    values: dict[str, str] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values[key.strip()] = value.strip()
    store = values.get("StoreDir", STORE_DIR)
    if store != STORE_DIR:
        raise CacheError(f"{url} is a cache of the store {store[:200]!r}, not of {STORE_DIR}")
    priority = values.get("Priority", "50")
    if not (priority.isascii() and priority.isdecimal() and len(priority) < 10):
        raise CacheError(f"{url} has the priority {priority[:50]!r}, which is no number")
    return CacheInfo(values.get("WantMassQuery") == "1", int(priority))

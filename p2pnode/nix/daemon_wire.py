"""The primitives of the Nix worker protocol: numbers and strings, out and in, without a connection.

Everything is a little-endian u64 or a string (length, bytes, zeros up to a multiple of 8), as in a NAR. The other side
is trusted with the store but not with our memory: every length has a bound, checked before anything is read for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from enum import IntEnum

from p2pnode.errors import DaemonError
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.hashes import parse_sha256
from p2pnode.nix.nar_format import MAX_SIZE, nar_string
from p2pnode.nix.signatures import Signature, SignedInfo
from p2pnode.nix.storepath import StorePath

CLIENT_MAGIC = 0x6E697863  # "nixc"
SERVER_MAGIC = 0x6478696F  # "dxio"
MAJOR = 1

MAX_STRING = 1 << 20
"""Bytes of one string: a store path has 250, a log line of a builder some thousand."""

MAX_STRINGS = 1 << 20
"""Strings of one list: a store with a million valid paths is larger than any known."""

_READ_SIZE = 1 << 16


class Op(IntEnum):
    """Requests. Source: libstore/worker-protocol.hh."""

    ADD_TEMP_ROOT = 11
    ADD_INDIRECT_ROOT = 12
    QUERY_PATH_INFO = 26
    QUERY_VALID_PATHS = 31
    ADD_TO_STORE_NAR = 39


class Message(IntEnum):
    """What the daemon may say before the result of a request."""

    NEXT = 0x6F6C6D67  # a line of log
    READ = 0x64617461  # it wants so many bytes of the stream (before 1.23)
    LAST = 0x616C7473  # the result follows
    ERROR = 0x63787470
    START_ACTIVITY = 0x53545254
    STOP_ACTIVITY = 0x53544F50
    RESULT = 0x52534C54


def u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def string(text: str | bytes) -> bytes:
    return nar_string(text.encode() if isinstance(text, str) else text)


def strings(texts: Iterable[str]) -> bytes:
    encoded = [string(text) for text in texts]
    return b"".join([u64(len(encoded)), *encoded])


def path_info(signed: SignedInfo) -> bytes:
    """A path and what is registered about it, as ADD_TO_STORE_NAR sends it."""
    info = signed.info
    return b"".join(
        (
            string(str(info.path)),
            string(str(info.deriver) if info.deriver is not None else ""),
            string(info.nar_hash.hex()),
            strings(map(str, sorted(set(info.references)))),
            u64(0),  # registration time: the daemon takes its own
            u64(info.nar_size),
            u64(0),  # "ultimate" means built here, and would be believed without a signature
            strings(map(str, signed.signatures)),
            string(info.ca or ""),
        )
    )


class WireReader:
    """Reads primitives from a byte source. `receive`: gives the next bytes, at most as many as asked; b"" at the end.

    Every method raises DaemonError when the stream ends or a bound is exceeded; then nothing more can be read.
    """

    def __init__(self, receive: Callable[[int], Awaitable[bytes | bytearray]]) -> None:
        self._receive = receive
        self._buffer = bytearray()

    async def u64(self) -> int:
        return int.from_bytes(await self._exactly(8), "little")

    async def number(self, limit: int, what: str) -> int:
        """A u64 of at most `limit`."""
        number = await self.u64()
        if number > limit:
            raise DaemonError(f"the Nix daemon sent {number} as the {what}, more than {limit}")
        return number

    async def blob(self, limit: int = MAX_STRING) -> bytes:
        length = await self.number(limit, "length of a string")
        data = await self._exactly(length + (-length & 7))
        if any(data[length:]):
            raise DaemonError("the Nix daemon sent padding that is not zero")
        return data[:length]

    async def string(self, limit: int = MAX_STRING) -> str:
        """Text for people may be cut in the middle of a character, so what is not UTF-8 is replaced."""
        return (await self.blob(limit)).decode("utf-8", "replace")

    async def strings(self, limit: int = MAX_STRINGS) -> list[str]:
        return [await self.string() for _ in range(await self.number(limit, "length of a list"))]

    async def path_info(self, path: StorePath) -> SignedInfo:
        """What the daemon knows of `path` (protocol 1.16 and later). Raises NixError for what is not well formed."""
        deriver = await self.string()
        nar_hash = await self.string()
        references = await self.strings()
        await self.u64()  # registration time
        nar_size = await self.number(MAX_SIZE, "size of a NAR")
        await self.u64()  # ultimate
        signatures = await self.strings()
        ca = await self.string()
        info = PathInfo(
            path=path,
            nar_hash=parse_sha256(f"sha256:{nar_hash.removeprefix('sha256:')}"),
            nar_size=nar_size,
            references=tuple(sorted(map(StorePath.parse, references))),
            deriver=StorePath.parse(deriver) if deriver else None,
            ca=ca or None,
        )
        return SignedInfo(info, tuple(sorted(map(Signature.parse, signatures))))

    async def _exactly(self, count: int) -> bytes:
        buffer = self._buffer
        while len(buffer) < count:
            data = await self._receive(_READ_SIZE)
            if not data:
                raise DaemonError("the Nix daemon closed the connection in the middle of an answer")
            buffer += data
        data = bytes(buffer[:count])
        del buffer[:count]
        return data

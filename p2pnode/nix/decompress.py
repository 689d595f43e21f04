"""The compressions of binary caches, read in pieces of bounded size whatever the data says.

A reader pulls: it asks for compressed bytes when it needs them and gives decompressed ones when it is asked, so a small
file that unpacks to terabytes costs no more memory than any other. Blocking calls: for worker threads.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Protocol, cast

import zstandard

from p2pnode.errors import CacheError

PIECE = 1 << 18
"""Bytes that a reader gives at most at a time."""

LZMA_MEMORY = 256 << 20
"""Bytes that xz may take for its dictionary: `xz -9`, the most that anybody uses, needs 65 MiB; allowed are 4 GiB."""

ZSTD_WINDOW = 1 << 27
"""Bytes of a zstd window: 128 MiB is the largest that `zstd -d` takes without being told to."""

Read = Callable[[], bytes]
"""Gives the next bytes, some at least; b"" at the end."""

SUPPORTED = ("none", "xz", "zstd", "bzip2", "gzip")


def decompressing(compression: str, read: Read) -> Read:
    """What `read` gives, decompressed. `compression` as narinfo spells it.

    Raises CacheError for a compression we cannot read; the result does for damaged data, and for data that needs too
    much memory. Truncated data may just end: the caller knows how much there has to be.
    """
    match compression:
        case "none":
            return read
        case "zstd":
            return _zstd(read)
        case "xz":
            return _restarting(read, lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY), b"\0")
        case "bzip2":
            return _restarting(read, bz2.BZ2Decompressor, b"")
        case "gzip":
            return _restarting(read, _Gzip, b"\0")
    raise CacheError(f"compression {compression!r} is not one of those that can be read here: {', '.join(SUPPORTED)}")


class _Decompressor(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor in the manner of the two others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)  # gzip header and trailer, nothing else

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _restarting(read: Read, make: Callable[[], _Decompressor], padding: bytes) -> Read:
    """One stream after the other, as all these formats allow; `padding` may stand between them and at the end."""
    decompressor: _Decompressor | None = make()

    def next_piece() -> bytes:
        nonlocal decompressor
        while decompressor is not None:
            data = b""
            if decompressor.eof:
                data = decompressor.unused_data.lstrip(padding) if padding else decompressor.unused_data
                while not data:
                    more = read()
                    if not more:
                        decompressor = None
                        return b""
                    data = more.lstrip(padding) if padding else more
                decompressor = make()
            elif decompressor.needs_input:
                data = read()
                if not data:
                    decompressor = None  # truncated: the NAR will be too short
                    return b""
            try:
                piece = decompressor.decompress(data, PIECE)
            except (lzma.LZMAError, OSError, zlib.error) as error:  # OSError: bz2
                raise CacheError(f"its compressed data is damaged: {error}") from None
            if piece:
                return piece
        return b""

    return next_piece


def _zstd(read: Read) -> Read:
    source = cast(IO[bytes], _File(read))
    reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).stream_reader(source, read_across_frames=True)

    def next_piece() -> bytes:
        try:
            # read1: what one step gives. read() would wait for the whole piece, and a slow source be a slow stream.
            return reader.read1(PIECE)
        except zstandard.ZstdError as error:
            raise CacheError(f"its compressed data is damaged: {error}") from None

    return next_piece


class _File:
    """The little of a file that zstandard wants."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        data = self._rest or self._read()
        if size < 0:
            size = len(data)
        self._rest = data[size:]
        return data[:size]

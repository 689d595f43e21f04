"""One pass over a stream: content-defined cutting, BLAKE3 of each chunk, and a hash of the whole.

FastCDC 2020 (Xia et al., https://ieeexplore.ieee.org/document/9055082) by pyfastcdc. Reading and cutting run in the
caller's thread and hashing in another; cutting, hashes and reads all release the GIL. Memory: `WINDOWS` windows.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from blake3 import blake3
from pyfastcdc import FastCDC

from p2pnode.errors import Cancelled
from protocols.manifest import Chunking, Layout

WINDOW_SIZE = 4 << 20  # new bytes per step: large enough that handing over costs nothing, small enough for caches
WINDOWS = 3  # one being filled, one being hashed, one between

Fill = Callable[[memoryview], int]
"""Like `readinto`: put bytes into the buffer, return how many; 0 at the end of the stream, and only then."""


class Hasher(Protocol):
    """What `hashlib` and `blake3` objects have in common."""

    def update(self, data: memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Chunked:
    """A stream's layout and the digest of the whole stream."""

    layout: Layout
    digest: bytes


def sha256() -> Hasher:
    """For NARs."""
    return hashlib.sha256()


def blake3_256() -> Hasher:
    """For files."""
    return blake3()


def cut(buffer: memoryview, chunking: Chunking, *, last: bool) -> Iterator[int]:
    """Ends of the chunks of `buffer`, which starts at a chunk's beginning.

    Unless it is the `last` of its stream, only chunks that no later byte could change: a cut depends on at most
    `max_size` bytes from the chunk's beginning on.
    """
    length = len(buffer)
    if chunking.algorithm == "fixed":
        size = chunking.max_size
        yield from range(size, length + 1, size)
        if last and length % size:
            yield length
        return
    cutter = FastCDC(
        chunking.avg_size,
        min_size=chunking.min_size,
        max_size=chunking.max_size,
        normalized_chunking=cast(Literal[0, 1, 2, 3], chunking.normalisation),
        seed=chunking.seed,
    )
    for chunk in cutter.cut_buf(buffer):
        if not last and length - chunk.offset < chunking.max_size:
            return
        yield chunk.offset + chunk.length


def chunk_stream(
    fill: Fill,
    chunking: Chunking,
    whole: Hasher,
    *,
    advance: Callable[[int], None] = lambda count: None,
    cancelled: Callable[[], bool] = lambda: False,
    window_size: int = WINDOW_SIZE,
) -> Chunked:
    """Cut and hash a stream. `advance` is told of bytes read. Raises Cancelled, and what `fill` raises."""
    digests: list[bytes] = []
    sizes: list[int] = []
    # The tail that waits for more bytes (always below max_size) is carried to the front of the next window.
    carry_limit = chunking.max_size
    free = deque[bytearray]()
    windows = 0
    running: deque[tuple[Future[list[bytes]], bytearray]] = deque()
    carry = memoryview(b"")
    last = False

    def collect() -> None:
        future, window = running.popleft()
        digests.extend(future.result())
        free.append(window)

    with ThreadPoolExecutor(1, thread_name_prefix="hash") as hashing:
        while not last:
            check_cancelled(cancelled)
            # The carried bytes lie in the window before this one, so two must not be given back.
            while not free and windows == WINDOWS:
                collect()
            if free:
                window = free.popleft()
            else:
                window = bytearray(carry_limit + window_size)
                windows += 1
            view = memoryview(window)
            start = len(carry)
            view[:start] = carry
            filled = start
            while filled < start + window_size:
                count = fill(view[filled : start + window_size])
                if not count:
                    last = True
                    break
                filled += count
            advance(filled - start)
            ends = list(cut(view[:filled], chunking, last=last))
            sizes.extend(_lengths(ends))
            if last and not running:  # nothing to do meanwhile: most store paths are tiny, and a thread costs more
                digests.extend(_hash(view[:filled], start, ends, whole))
                break
            job = hashing.submit(_hash, view[:filled], start, ends, whole)
            running.append((job, window))
            carry = view[ends[-1] if ends else 0 : filled]
        while running:
            collect()
    return Chunked(Layout(chunking, tuple(digests), tuple(sizes)), whole.digest())


def check_cancelled(cancelled: Callable[[], bool]) -> None:
    """Raises Cancelled if `cancelled()`."""
    if cancelled():
        raise Cancelled("interrupted; what was finished is kept, so the same command goes on from there")


def _lengths(ends: list[int]) -> list[int]:
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _hash(data: memoryview, start: int, ends: list[int], whole: Hasher) -> list[bytes]:
    """Feed what is new, from `start` on, to `whole`; the digests of the chunks that end in this window."""
    whole.update(data[start:])
    return [blake3(data[begin:end]).digest() for begin, end in zip([0, *ends], ends, strict=False)]

"""What goes through a stream in the interop tests, for our side and the Python peers; js/peer.mjs does the same."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import trio

# kubo forwards to TCP servers only protocols below /x/.
ECHO = "/x/interop/echo/1"  # everything comes back at once; the end is answered with the end
AFTER_END = "/x/interop/after-end/1"  # everything comes back after the end
ABORT = "/x/interop/abort/1"  # like ECHO, and a reset after ABORT_AFTER bytes

ABORT_AFTER = 100_000
BLOCK = 262_139  # a prime: never in step with frames, records or windows
PIECE = 1 << 16


class Pipe(Protocol):
    """A stream of any implementation. An end is `b""`; a reset raises."""

    async def send_all(self, data: bytes) -> None: ...

    async def receive_some(self, max_bytes: int) -> bytes: ...

    async def close_write(self) -> None: ...

    async def reset(self) -> None: ...


P = TypeVar("P", bound=Pipe)


async def echo(pipe: Pipe) -> None:
    while data := await pipe.receive_some(PIECE):
        await pipe.send_all(data)
    await pipe.close_write()


async def after_end(pipe: Pipe) -> None:
    kept = []
    while data := await pipe.receive_some(PIECE):
        kept.append(data)
    for data in kept:
        await pipe.send_all(data)
    await pipe.close_write()


async def abort(pipe: Pipe) -> None:
    got = 0
    while got < ABORT_AFTER and (data := await pipe.receive_some(PIECE)):
        got += len(data)
        await pipe.send_all(data)
    await pipe.reset()


HANDLERS: dict[str, Callable[[Pipe], Awaitable[None]]] = {ECHO: echo, AFTER_END: after_end, ABORT: abort}


async def exchange(pipe: Pipe, size: int, *, half_close: bool) -> None:
    """Send `size` random bytes while they come back. With `half_close`, finish after sending, and expect exactly these
    bytes and the end."""
    block = os.urandom(min(size, BLOCK))

    async def send() -> None:
        left = size
        while left:
            piece = block[:left]
            await pipe.send_all(piece)
            left -= len(piece)
        if half_close:
            await pipe.close_write()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        got = 0
        while got < size:
            at = got % len(block)
            data = await pipe.receive_some(min(PIECE, size - got, len(block) - at))
            if not data:
                raise EOFError(f"the stream ended after {got} of {size} bytes")
            if data != block[at : at + len(data)]:
                raise ValueError(f"what came back is not what was sent, within {len(data)} bytes from {got}")
            got += len(data)
    if half_close and (extra := await pipe.receive_some(1)):
        raise ValueError(f"{extra!r} instead of the end of the stream")


async def exchange_until_reset(pipe: Pipe, errors: tuple[type[Exception], ...]) -> str:
    """Send to a peer's ABORT until it resets the stream, which shows as one of `errors`. Returns which.

    In turns, not at the same time: a write of stock py-libp2p that is cancelled ruins its connection.
    """
    block = os.urandom(PIECE)
    try:
        for _ in range(10 * ABORT_AFTER // PIECE):
            await pipe.send_all(block)
            if not await pipe.receive_some(PIECE):
                raise EOFError("the stream ended")
    except errors as exc:
        return repr(exc)
    raise AssertionError("the peer did not reset the stream")


async def exchange_on_all(pipes: Sequence[Pipe], size: int, *, half_close: bool) -> None:
    async with trio.open_nursery() as nursery:
        for pipe in pipes:

            async def one(pipe: Pipe = pipe) -> None:
                await exchange(pipe, size, half_close=half_close)

            nursery.start_soon(one)


async def open_all(count: int, open_pipe: Callable[[], Awaitable[P]]) -> list[P]:
    """`count` streams, opened at the same time and all open at the end."""
    pipes: list[P] = []

    async def one() -> None:
        pipes.append(await open_pipe())

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return pipes

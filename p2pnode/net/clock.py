"""Tells peers the time, and asks them (`/p2pnode/time/1`, protocols/clock.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import trio

from p2pnode.errors import NetworkTimeout, RemoteError
from p2pnode.net.transport import Stream, StreamHandler, receive_exactly
from protocols import clock
from protocols.clock import Sample
from protocols.errors import ProtocolError

TIMEOUT = 5.0  # s for one question, either way


class Host(Protocol):
    """What this needs of a network."""

    def handle(self, protocol: str, handler: StreamHandler) -> None: ...

    async def open_stream(self, peer: str, protocol: str) -> Stream: ...


class Clock:
    """A node's wall clock as its peers see it. `now` may be replaced: it is all that is known here of time."""

    def __init__(self, host: Host, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self._host = host
        host.handle(clock.PROTOCOL, self._serve)

    async def ask(self, peer: str) -> Sample:
        """How far a peer's clock is from ours. Raises `RemoteError`, also when it does not speak the protocol."""
        try:
            with trio.fail_after(TIMEOUT):
                stream = await self._host.open_stream(peer, clock.PROTOCOL)
                try:
                    sent, began = self.now(), trio.current_time()
                    await stream.send_all(clock.REQUEST)
                    answer = await receive_exactly(stream, clock.ANSWER)
                    return clock.sample(sent, clock.decode(answer), trio.current_time() - began)
                finally:
                    await stream.aclose()
        except trio.TooSlowError:
            raise NetworkTimeout(f"peer {peer} did not say what time it is within {TIMEOUT:.0f} s") from None
        except ProtocolError as exc:
            raise RemoteError(f"peer {peer} broke the time protocol: {exc}") from exc

    async def _serve(self, stream: Stream) -> None:
        with trio.move_on_after(TIMEOUT):
            if await receive_exactly(stream, len(clock.REQUEST)) == clock.REQUEST:
                await stream.send_all(clock.encode(self.now()))

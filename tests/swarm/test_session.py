"""What a session holds while nothing comes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import trio

from p2pnode.net.transport import Buffer
from p2pnode.swarm.session import PeerSession
from protocols.cid import CID, Codec
from protocols.exchange import messages as m


class Weak(bytearray):
    """Can be referred to weakly, unlike its base."""


class Once:
    """A stream that brings what it was given, read by read, and nothing more."""

    peer = "peer"
    relayed = False

    def __init__(self, reads: list[Buffer]) -> None:
        self._reads = reads
        self.idle = trio.Event()

    async def receive_parts(self, max_bytes: int) -> list[Buffer]:
        await trio.lowlevel.checkpoint()
        if self._reads:
            return [self._reads.pop(0)]
        self.idle.set()
        await trio.sleep_forever()
        return []

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


async def test_an_idle_session_keeps_nothing_of_what_came_last() -> None:
    data = bytes(100_000)
    hello = b"".join(bytes(part) for part in m.encode(m.Hello()))
    block = m.Block(CID.of(Codec.RAW, data).to_bytes(), m.Encoding.RAW, len(data), (data,))
    read = Weak(b"".join(bytes(part) for part in m.encode(block)))
    last, stream = weakref.ref(read), Once([hello, memoryview(read).toreadonly()])
    del read
    received: list[str] = []

    async def on_messages(session: PeerSession, messages: list[m.Message]) -> None:
        received.extend(type(message).__name__ for message in messages)

    session = PeerSession(stream, agent="test", dialled=True)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run, on_messages, lambda *_: None)
        with trio.fail_after(5):
            await stream.idle.wait()
        assert received == ["Hello", "Block"]
        assert last() is None
        nursery.cancel_scope.cancel()

"""One exchange stream as trio tasks: a reader, and a writer that sends control frames before blocks."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pnode.errors import RemoteError, StreamClosed
from p2pnode.net.transport import Buffer, Stream
from protocols.cid import CID
from protocols.errors import FrameError
from protocols.exchange import messages as m
from protocols.exchange.session import Session, State

log = logging.getLogger(__name__)

READ_SIZE = 4 << 20
MAX_CONTROL = 2 << 20  # control bytes waiting for a peer; past it we stop reading what it asks
HELLO_TIMEOUT = 15.0
WRITE_SIZE = 1 << 20
WRITE_TIMEOUT = 60.0  # for half of what the stream queues: a peer slower than 8 KiB/s is of no use to anybody
GOODBYE_TIMEOUT = 0.5
RETIRE_TIMEOUT = 30.0  # for the blocks that a relay still carries when a direct connection has taken over

OnMessages = Callable[["PeerSession", list[m.Message]], Awaitable[None]]
OnSent = Callable[["PeerSession", int], None]


class PeerSession:
    """A session with one peer. `send` and `send_block` queue and return at once; `run` moves the bytes."""

    def __init__(self, stream: Stream, *, agent: str, dialled: bool) -> None:
        self.stream = stream
        self.peer = stream.peer
        self.dialled = dialled
        self.following: dict[CID, None] = {}  # roots the peer wants HAVEs of
        self.open = trio.Event()
        self._protocol = Session(agent)
        self._control: deque[Buffer] = deque(self._protocol.greeting())
        self._control_bytes = 0
        self._blocks: deque[m.Block] = deque()
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._sending = False
        self._retired = False
        self._farewelled = trio.Event()
        self._closing: str | None = None
        self._scope = trio.CancelScope()

    @property
    def receiving_block(self) -> bool:
        return self._protocol.receiving_block

    @property
    def relayed(self) -> bool:
        return self.stream.relayed

    @property
    def unsent(self) -> int:
        """Bytes of queued blocks that the stream has not taken."""
        return sum(block.size for block in self._blocks)

    @property
    def left(self) -> bool:
        """Whether we ended it."""
        return self._closing is not None

    @property
    def finished(self) -> bool:
        """Whether the peer has said that nothing more follows."""
        return self._protocol.state is State.DONE

    def send(self, message: m.Message) -> None:
        """Queue a control frame."""
        for part in m.encode(message):
            self._control.append(part)
            self._control_bytes += len(part)
        self._wake.set()

    async def room(self) -> None:
        """Until the peer has taken most of the control frames that wait for it."""
        while self._control_bytes > MAX_CONTROL:
            if self._drained.is_set():  # else somebody waits for it already
                self._drained = trio.Event()
            await self._drained.wait()

    def send_block(self, block: m.Block) -> None:
        """Queue a block; the caller bounds how many by what `run` reports as sent."""
        self._blocks.append(block)
        self._wake.set()

    def close(self, reason: str) -> None:
        """Say goodbye and end the session soon."""
        if self._closing is None:
            self._closing = reason
            self._wake.set()
            # A peer that does not read would keep the writer, and so the session, for a minute.
            self._scope.deadline = trio.current_time() + GOODBYE_TIMEOUT

    def retire(self) -> None:
        """Another session with the peer takes over: send what is queued, and end when the peer has done so too."""
        self._retired = True
        self._wake.set()
        self._scope.deadline = trio.current_time() + RETIRE_TIMEOUT

    async def run(self, on_messages: OnMessages, on_sent: OnSent) -> None:
        """Serve the session until either side ends it. Raises nothing for what a peer does."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._write, on_sent)
                    nursery.start_soon(self._guard, self._read, on_messages)
                    with trio.move_on_after(HELLO_TIMEOUT) as waiting:
                        await self.open.wait()
                    if waiting.cancelled_caught:
                        log.info("peer %s sent no HELLO", self.peer)
                        self._scope.cancel()
        finally:
            with trio.move_on_after(GOODBYE_TIMEOUT, shield=True):
                if self._sending:
                    await self.stream.reset()  # cut off within a frame: nothing can follow it
                elif self._closing is not None and self._protocol.state is not State.DONE:
                    await self._farewell(self._closing)
                await self.stream.aclose()
            self.open.set()
            self._control_bytes = 0  # nothing more goes out: nobody outside of the session must wait for it
            self._drained.set()

    async def _farewell(self, reason: str) -> None:
        try:
            await self.stream.send_parts(m.encode(m.Goodbye(reason)))
        except RemoteError:
            log.debug("peer %s left before our goodbye", self.peer)

    async def _guard(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run one direction; its end, for whatever reason, is the end of the session."""
        try:
            await task(*args)
        except FrameError as exc:
            log.warning("peer %s broke the exchange protocol: %s", self.peer, exc)
            self._closing = str(exc)
        except RemoteError as exc:
            log.debug("session with %s ended: %s", self.peer, exc)
        finally:
            self._scope.cancel()

    async def _read(self, on_messages: OnMessages) -> None:
        while True:
            parts = await self.stream.receive_parts(READ_SIZE)
            if not parts:
                return
            received = [message for part in parts for message in self._protocol.receive(part)]
            if self._protocol.state is not State.NEW:
                self.open.set()
            await on_messages(self, received)
            del parts, received  # a session that is idle must not keep what came last
            if self._protocol.state is State.DONE:
                if self._retired:
                    await self._farewelled.wait()
                return
            await self.room()

    async def _write(self, on_sent: OnSent) -> None:
        while self._closing is None:
            if self._control:
                parts: Sequence[Buffer] = list(self._control)
                self._control.clear()
                await self._send(parts)
                self._control_bytes -= sum(map(len, parts))
                self._drained.set()
            elif self._blocks:
                blocks = self._next_blocks()
                await self._send([part for block in blocks for part in m.encode(block)])
                on_sent(self, sum(block.size for block in blocks))
            elif self._retired:
                await self._send(m.encode(m.Goodbye("moved to a direct connection")))
                self._farewelled.set()
                await trio.sleep_forever()  # until the other direction ends
            else:
                self._wake = trio.Event()
                await self._wake.wait()

    def _next_blocks(self) -> list[m.Block]:
        """Blocks of about `WRITE_SIZE` bytes: each send is a turn of several tasks."""
        blocks = [self._blocks.popleft()]
        size = blocks[0].size
        while self._blocks and size + self._blocks[0].size <= WRITE_SIZE:
            blocks.append(self._blocks.popleft())
            size += blocks[-1].size
        return blocks

    async def _send(self, parts: Sequence[Buffer]) -> None:
        self._sending = True
        with trio.move_on_after(WRITE_TIMEOUT) as scope:
            await self.stream.send_parts(parts)
        if scope.cancelled_caught:
            raise StreamClosed(f"peer {self.peer} took nothing of {WRITE_SIZE >> 10} KiB for {WRITE_TIMEOUT:.0f} s")
        self._sending = False

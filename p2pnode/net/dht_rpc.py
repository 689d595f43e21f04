"""Requests and answers of `/p2pnode/announce/1` over a `Transport`: both sides bounded in time and memory."""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable

import trio

from p2pnode.errors import LocalError, NetworkTimeout, RemoteError, StreamClosed
from p2pnode.net.transport import Stream, Transport
from protocols.announce import PROTOCOL
from protocols.announce.messages import (
    MAX_RETRY_AFTER,
    Ack,
    Announce,
    Find,
    Found,
    FrameBuffer,
    Hello,
    Message,
    PeerInfo,
    Refusal,
    Withdraw,
    clean_addrs,
    decode,
    encode,
)
from protocols.announce.records import Intake
from protocols.errors import FrameError, ProtocolError

log = logging.getLogger(__name__)

READ_SIZE = 65536
IDLE_CALLER = 60.0  # seconds a stream of ours waits for its next use; opening one costs two round trips
IDLE_SERVER = 120.0  # longer than any caller of ours keeps one
FRAME_TIME = 30.0  # for one whole frame either way: 256 KiB at 70 kbit/s
MAX_IDLE_STREAMS = 128
MAX_STREAMS_PER_PEER = 8  # served at once; we open two or three to one peer
MAX_STREAMS = 1024  # served at once in all: at most a frame each, 256 MiB if every one of them is hostile


class Refused(RemoteError):
    """A peer asks us to come back later."""

    def __init__(self, peer: str, retry_after: float) -> None:
        super().__init__(f"peer {peer} asks to wait {retry_after:.1f} s")
        self.retry_after = retry_after  # seconds


class _Line:
    """A stream we opened, and what was said on it."""

    __slots__ = ("buffer", "greeted", "stream", "used")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.buffer = FrameBuffer()
        self.greeted: tuple[str, ...] | None = None  # the addresses our HELLO named
        self.used = trio.current_time()


class Caller:
    """Asks peers. Keeps idle streams for the next request; any number of requests may run at once."""

    def __init__(
        self, transport: Transport, on_alive: Callable[[PeerInfo], None], on_silent: Callable[[str], None]
    ) -> None:
        """`on_alive` is called with every HELLO that comes back, `on_silent` with peers that did not answer."""
        self._transport = transport
        self._on_alive = on_alive
        self._on_silent = on_silent
        self._idle: OrderedDict[int, _Line] = OrderedDict()  # least recently used first

    async def hello(self, info: PeerInfo, timeout: float) -> None:
        """Exchange addresses, or see whether the peer is there."""
        await self._request(info, Hello(self._addrs()), timeout)

    async def find(self, info: PeerInfo, message: Find, timeout: float) -> Found:
        reply = await self._request(info, message, timeout)
        assert isinstance(reply, Found)
        return reply

    async def tell(self, info: PeerInfo, message: Announce | Withdraw, timeout: float) -> Ack:
        reply = await self._request(info, message, timeout)
        assert isinstance(reply, Ack)
        return reply

    async def close_idle(self, before: float = math.inf) -> None:
        """Close the streams not used since `before`."""
        for line in [line for line in self._idle.values() if line.used < before]:
            self._idle.pop(id(line), None)
            await line.stream.aclose()

    async def _request(self, info: PeerInfo, message: Message, timeout: float) -> Message:
        """The peer's answer. Raises `RemoteError`: unreachable, closed, timed out, refused, or a broken protocol."""
        try:
            with trio.fail_after(timeout):
                line = self._take(info.peer)
                if line is not None:
                    try:
                        return await self._talk(line, message)
                    except StreamClosed:
                        # It may have died while idle; only a new one tells whether the peer did, too.
                        log.debug("idle stream to %s was closed", info.peer)
                if info.addrs:
                    await self._transport.connect(info.peer, info.addrs)
                return await self._talk(_Line(await self._transport.open_stream(info.peer, PROTOCOL)), message)
        except trio.TooSlowError:
            self._on_silent(info.peer)
            raise NetworkTimeout(f"peer {info.peer} did not answer within {timeout:g} s") from None
        except ProtocolError as exc:
            self._on_silent(info.peer)
            raise RemoteError(f"peer {info.peer} broke the announce protocol: {exc}") from exc
        except LocalError as exc:
            # The transport calls a bad peer id its caller's mistake; here another peer made it up.
            self._on_silent(info.peer)
            raise RemoteError(f"peer {info.peer} cannot be dialled: {exc}") from exc
        except Refused:
            raise
        except RemoteError:
            self._on_silent(info.peer)
            raise

    async def _talk(self, line: _Line, message: Message) -> Message:
        whole = False
        try:
            addrs = self._addrs()
            greet = isinstance(message, Hello) or line.greeted != addrs
            frames = b"" if isinstance(message, Hello) else encode(message)
            await line.stream.send_all((encode(Hello(addrs)) if greet else b"") + frames)
            reply: Message | None = None
            if greet:
                reply = await self._read(line)
                _check_reply(Hello(addrs), reply)
                if isinstance(reply, Hello):
                    line.greeted = addrs
                    self._on_alive(PeerInfo(line.stream.peer, reply.addrs))
            if frames and line.greeted is not None:
                reply = await self._read(line)
            if isinstance(reply, Ack) and reply.refusal is Refusal.RATE:
                raise Refused(line.stream.peer, reply.retry_after / 1000)
            _check_reply(message, reply)
            whole = not line.buffer.partial  # an answer to nothing: do not take it for the next one
            assert reply is not None
            return reply
        except Refused:
            whole = line.greeted is not None  # else the answer to what followed the HELLO is still to come
            raise
        finally:
            if whole:
                await self._give_back(line)
            else:
                with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                    await line.stream.reset()

    async def _read(self, line: _Line) -> Message:
        while True:
            payload = line.buffer.next_frame()
            if payload is not None:
                return decode(payload)
            data = await line.stream.receive_some(READ_SIZE)
            if not data:
                raise StreamClosed(f"peer {line.stream.peer} ended the stream before its answer")
            line.buffer.feed(data)

    def _addrs(self) -> tuple[str, ...]:
        return clean_addrs(self._transport.addrs())

    def _take(self, peer: str) -> _Line | None:
        for key, line in reversed(self._idle.items()):
            if line.stream.peer == peer:
                del self._idle[key]
                return line
        return None

    async def _give_back(self, line: _Line) -> None:
        line.used = trio.current_time()
        self._idle[id(line)] = line
        if len(self._idle) > MAX_IDLE_STREAMS:
            _, oldest = self._idle.popitem(last=False)
            await oldest.stream.aclose()


def _check_reply(message: Message, reply: Message | None) -> None:
    match message, reply:
        case (Hello(), Hello()) | (_, Ack(refusal=Refusal.RATE)):
            return
        case Announce(), Ack() if reply.accepted <= len(message.keys):
            return
        case Withdraw(), Ack():
            return
        case Find(), Found() if len(reply.providers) == len(message.keys):
            return
    raise FrameError(f"a {type(reply).__name__} answers a {type(message).__name__}")


class Server:
    """Answers peers. `answer(sender, message)` decides what; it is called only after the sender's HELLO."""

    def __init__(self, transport: Transport, intake: Intake, answer: Callable[[PeerInfo, Message], Message]) -> None:
        self._transport = transport
        self._intake = intake
        self._answer = answer
        self._streams: Counter[str] = Counter()

    async def serve(self, stream: Stream) -> None:
        """Answer the requests of one stream until the peer ends it, falls silent or breaks the protocol."""
        peer = stream.peer
        if (
            self._streams[peer] >= MAX_STREAMS_PER_PEER
            or self._streams.total() >= MAX_STREAMS
            or self._intake.banned(peer, trio.current_time())
        ):
            await stream.reset()
            return
        self._streams[peer] += 1
        try:
            await self._serve(stream)
        except ProtocolError as exc:
            log.info("peer %s broke the announce protocol: %s", peer, exc)
            await stream.reset()
        except StreamClosed:
            log.debug("peer %s is gone", peer)
        else:
            await stream.aclose()
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _serve(self, stream: Stream) -> None:
        buffer = FrameBuffer()
        sender: PeerInfo | None = None
        while True:
            payload = await _receive(stream, buffer)
            if payload is None:
                return
            now = trio.current_time()
            if self._intake.banned(stream.peer, now):
                raise FrameError("more requests although told to wait")
            delay = self._intake.admit(stream.peer, len(payload), now)
            if delay > 0:
                reply: Message = Ack(0, Refusal.RATE, min(MAX_RETRY_AFTER, math.ceil(delay * 1000)))
            else:
                message = decode(payload)
                if isinstance(message, Hello):
                    sender = PeerInfo(stream.peer, message.addrs)
                if sender is None:
                    raise FrameError("a request before HELLO")
                reply = self._answer(sender, message)
            frame = encode(reply)
            self._intake.charge(stream.peer, len(frame), now)
            with trio.move_on_after(FRAME_TIME) as scope:
                await stream.send_all(frame)
            if scope.cancelled_caught:
                raise FrameError("the peer does not read our answer")


async def _receive(stream: Stream, buffer: FrameBuffer) -> bytes | None:
    """The next request's payload; None when the peer ended the stream or had nothing to say for long."""
    deadline: float | None = None
    idle_until = trio.current_time() + IDLE_SERVER
    while True:
        payload = buffer.next_frame()
        if payload is not None:
            return payload
        if deadline is None and buffer.partial:
            deadline = trio.current_time() + FRAME_TIME
        data: bytes | None = None
        with trio.move_on_at(idle_until if deadline is None else deadline):
            data = await stream.receive_some(READ_SIZE)
        if data:
            buffer.feed(data)
        elif buffer.partial:
            raise FrameError("a frame that was not finished in time" if data is None else "the stream ends in a frame")
        else:
            return None

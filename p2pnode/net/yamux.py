"""Yamux for py-libp2p: `protocols.yamux` driven by trio, in place of the library's muxer.

The library's own stalls, dead-locks and breaks when a read or write is cancelled, polls, and only logs peers that
overrun their window. Per connection there is one reader, one writer and one timer task; nothing polls.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)

from p2pnode.net.downlink import Downlink
from protocols import yamux

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

CLOSE_GRACE = 1.0  # s for GO_AWAY and queued data to leave, and for the peer to hang up first
MIN_BATCH = 128 * 1024
MAX_BATCH = 1 << 20
BATCH_FAST = 0.003  # s: a full batch that was written faster may grow ...
BATCH_SLOW = 0.010  # ... and one that took longer shrinks, so that control frames wait about this long at most
PARSE_SIZE = 64 * 1024  # bytes between looks at the clock
TURN = 0.005  # s of parsing before other tasks get a turn
NODE_MEMORY = 512 * 1024 * 1024  # unread bytes and grown windows of all connections together

MEASURE_INTERVAL = 0.1  # s between looks at a connection's round trip times while it receives

_node_budget = yamux.Budget(NODE_MEMORY)
_downlink = Downlink()


def install(budget: yamux.Budget | None = None) -> None:
    """Make py-libp2p use this muxer under /yamux/1.0.0. `budget` bounds the receive memory of all connections."""
    import libp2p.stream_muxer.muxer_multistream as multistream

    global _node_budget
    if not hasattr(multistream, "Yamux"):  # hard-wired there in 0.8.1: assigning a name nobody reads would do nothing
        raise RuntimeError("libp2p.stream_muxer.muxer_multistream no longer uses the name Yamux")
    if budget is not None:
        _node_budget = budget
    multistream.Yamux = Yamux


def next_batch(batch: int, written: int, seconds: float) -> int:
    """The size of the next write batch, given how long the last took."""
    if seconds > BATCH_SLOW:
        return max(MIN_BATCH, batch // 2)
    if seconds < BATCH_FAST and written >= batch:
        return min(MAX_BATCH, batch * 2)
    return batch


class YamuxStream(IMuxedStream):  # type: ignore[misc]
    """One stream. Reads and writes may be cancelled at any point: a cancelled read loses nothing, a cancelled write
    has queued its data whole or not at all."""

    def __init__(self, conn: Yamux, stream: yamux.Stream) -> None:
        self.muxed_conn = conn
        self.stream_id = stream.id
        self._stream = stream
        stream.owner = self
        self._session = conn.session
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()
        self._deadline = float("inf")

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes as soon as there is something; without `n` what is there. Raises `MuxedStreamEOF` at the end,
        `MuxedStreamReset` when the stream or the connection was lost."""
        if n == 0:
            return b""
        return b"".join(await self.receive_parts(self._stream.window if n is None or n < 0 else n))

    async def receive_some(self, max_bytes: int) -> bytes:
        """`read`, under the name our own streams use."""
        return await self.read(max_bytes)

    async def receive_parts(self, max_bytes: int) -> list[memoryview]:
        """Like `read`, without a copy: slices of what was decrypted."""
        await self._wait_readable()
        stream = self._stream
        want = min(max_bytes, stream.buffered)
        parts = []
        while want > 0:
            part = self._session.read(stream, want)
            want -= len(part)
            parts.append(part)
        self.muxed_conn.wake_writer_for_updates()
        return parts

    async def _wait_readable(self) -> None:
        # Cheap when data is there: the reader task yields, and what is buffered is bounded by the window.
        await trio.lowlevel.checkpoint_if_cancelled()
        stream = self._stream
        while not stream.buffered:
            if stream.ended:
                raise MuxedStreamEOF("the peer ended the stream")
            if stream.reset is not None:
                raise MuxedStreamReset(stream.reset)
            await self._park(self._readable)

    async def write(self, data: Buffer) -> None:
        """Queue `data`, once the stream's send queue has room; what is not immutable is copied."""
        await self.send_parts((data if isinstance(data, bytes) else bytes(data),))

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        """Queue several buffers by reference, one after the other: they must not change afterwards."""
        await trio.lowlevel.checkpoint_if_cancelled()
        stream = self._stream
        while True:
            if stream.reset is not None:
                raise MuxedStreamReset(stream.reset)
            if stream.finishing:
                raise MuxedStreamClosed("the stream is closed for writing")
            if not stream.full:
                break
            self._session.want_room(stream)
            await self._park(self._writable)
        self._session.send(stream, parts)
        self.muxed_conn.wake_writer()

    async def _park(self, lot: trio.lowlevel.ParkingLot) -> None:
        if self._deadline == float("inf"):
            await lot.park()
            return
        with trio.move_on_at(self._deadline) as scope:
            await lot.park()
        if scope.cancelled_caught:
            raise MuxedStreamError("the stream's deadline passed")

    def wake(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()

    def wake_readers(self) -> None:
        self._readable.unpark_all()

    def wake_writers(self) -> None:
        self._writable.unpark_all()

    async def close_write(self) -> None:
        """Half-close: the peer sees the end after all that was written."""
        self._session.finish(self._stream)
        self.wake_writers()
        self.muxed_conn.wake_writer()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def close(self) -> None:
        """Half-close, and let go: the stream is reset if the peer does not end its side within a minute."""
        self._session.release(self._stream, trio.current_time())
        self.wake_writers()
        self.muxed_conn.wake_writer()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        """Abort both directions at once."""
        self._session.reset(self._stream)
        self.wake()
        self.muxed_conn.wake_writer()
        await trio.lowlevel.checkpoint_if_cancelled()

    @property
    def is_closed(self) -> bool:
        stream = self._stream
        return stream.reset is not None or (stream.finishing and stream.ended)

    def set_deadline(self, ttl: int) -> None:
        """Waiting reads and writes fail with `MuxedStreamError` from `ttl` seconds on."""
        if ttl < 0:
            raise ValueError("a deadline cannot be in the past")
        self._deadline = trio.current_time() + ttl

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


class Yamux(IMuxedConn):  # type: ignore[misc]
    """One connection. `start` runs for its whole life; at its end every stream was woken and the socket closed."""

    def __init__(
        self,
        conn: Any,
        peer_id: Any,
        is_initiator: bool | None = None,
        on_close: Callable[[], Awaitable[Any]] | None = None,
        *,
        limits: yamux.Limits | None = None,
    ) -> None:
        self.secured_conn = conn
        self.peer_id = peer_id
        self.on_close = on_close
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.session = yamux.Session(
            initiator=conn.is_initiator if is_initiator is None else is_initiator,
            now=trio.current_time(),
            budget=_node_budget,
            limits=limits,
        )
        self._initiator = bool(conn.is_initiator if is_initiator is None else is_initiator)
        self._accept: deque[YamuxStream] = deque()
        self._accepting = trio.lowlevel.ParkingLot()
        self._opening = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()
        self._batched = hasattr(conn, "read_batch")
        self._arrived = 0  # bytes since the last measurement
        self._measured = float("-inf")

    @property
    def rtt(self) -> float | None:
        """Smoothed round trip time in seconds, None before the first answer."""
        return self.session.rtt

    @property
    def path_rtt(self) -> float | None:
        """The smallest round trip time of late in seconds, of the path alone where the kernel tells it."""
        times = self.secured_conn.round_trip_times() if self._batched else None
        return self.session.rtt if times is None else times[1]

    @property
    def is_initiator(self) -> bool:
        return self._initiator

    @property
    def is_exhausted(self) -> bool:
        """Whether no stream can ever be opened here again, though old ones may go on."""
        return self.session.exhausted

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.is_exhausted

    @property
    def is_closed(self) -> bool:
        return self.event_closed.is_set()

    def get_transport_addresses(self) -> list[Any]:
        return self.secured_conn.get_transport_addresses()  # type: ignore[no-any-return]

    def get_connection_type(self) -> Any:
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()  # type: ignore[no-any-return]

    # -- streams

    async def open_stream(self) -> YamuxStream:
        """A new stream; waits while 256 of ours are unanswered. Raises `MuxedConnUnavailable` at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.session.can_open:
            if self.session.exhausted:
                raise MuxedConnUnavailable(self._reason())
            await self._opening.park()
        stream = YamuxStream(self, self.session.open_stream(trio.current_time()))
        self.wake_writer()
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The next stream the peer opened. Raises `MuxedConnUnavailable` when the connection has ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            while self._accept and self.session.closed is None:
                stream = self._accept.popleft()
                if stream._stream.reset is None:
                    self.session.accept(stream._stream)
                    self.wake_writer()
                    return stream
            if self.session.closed is not None:
                raise MuxedConnUnavailable(self._reason())
            await self._accepting.park()

    def _reason(self) -> str:
        return self.session.closed.reason if self.session.closed else "the peer accepts no more streams"

    # -- life

    async def start(self) -> None:
        """Run the connection until it ends."""
        if self.event_started.is_set():
            return
        try:
            if self.session.closed is None:
                with self._scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._run_reader)
                        nursery.start_soon(self._run_writer)
                        nursery.start_soon(self._run_timer)
                        self.event_started.set()
        finally:
            self.event_started.set()
            self._lost("the connection was closed")
            _downlink.forget(self)
            with trio.move_on_after(CLOSE_GRACE, shield=True):
                try:
                    await self.secured_conn.close()
                except (BaseLibp2pError, OSError, trio.BrokenResourceError) as exc:
                    log.debug("closing the connection to %s: %r", self.peer_id, exc)
            self.event_closed.set()
        if self.on_close is not None:
            try:
                await self.on_close()
            except Exception:  # the library's book-keeping, at the top of the swarm's task for this connection
                log.exception("after the connection to %s ended", self.peer_id)

    async def close(self) -> None:
        """Say goodbye, let what was written leave (at most a second), and close. Streams end at once for us."""
        self.session.close()
        self._dispatch(self.session.take_events())
        if not self.event_started.is_set():  # never ran: there is nobody to write the goodbye
            self.event_started.set()
            await self.secured_conn.close()
            self.event_closed.set()
        try:
            await self.event_closed.wait()
        finally:
            self._scope.cancel()

    def _lost(self, reason: str) -> None:
        self.session.connection_lost(reason)
        self._dispatch(self.session.take_events())
        self._scope.cancel()

    async def _run_reader(self) -> None:
        session = self.session
        try:
            while True:
                batch = await self._read_batch()
                if not batch:
                    self._lost("the peer closed the connection")
                    return
                now = turn = trio.current_time()
                for part in batch:
                    at = 0
                    while at < len(part) and session.closed is None:
                        # The rest of a body is no more work than its first byte; other bytes may be many frames.
                        size = max(PARSE_SIZE, session.body_left)
                        self._dispatch(session.receive(part[at : at + size], now))
                        at += size
                        now = trio.current_time()
                        if now - turn > TURN:
                            self.wake_writer()
                            await trio.lowlevel.checkpoint()
                            now = turn = trio.current_time()
                self._arrived += sum(map(len, batch))
                del batch, part  # the next may come in an hour: a connection that is idle must not keep a MiB for it
                if now - self._measured >= MEASURE_INTERVAL:
                    self._bound_windows(now)
                if session.has_output:
                    self.wake_writer()
        except (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._lost(str(exc) or "the connection broke")

    async def _read_batch(self) -> Sequence[Buffer]:
        if self._batched:
            batch: Sequence[Buffer] = await self.secured_conn.read_batch()
            return batch
        data = await self.secured_conn.read(None)
        return [data] if data else []

    def _bound_windows(self, now: float) -> None:
        times = self.secured_conn.round_trip_times() if self._batched else None
        if times is not None:
            smoothed, minimal = times
            self.session.window_limit = _downlink.measured(self, self._arrived, smoothed, minimal, now)
        self._measured = now
        self._arrived = 0

    async def _run_writer(self) -> None:
        session = self.session
        batch = MIN_BATCH
        try:
            while True:
                began = trio.current_time()
                frames = session.data_to_send(batch, began)
                self._dispatch(session.take_events())
                if frames:
                    if self._batched:
                        await self.secured_conn.write_parts(frames)
                    else:
                        await self.secured_conn.write(b"".join(part for frame in frames for part in frame))
                    batch = next_batch(batch, sum(len(p) for f in frames for p in f), trio.current_time() - began)
                elif session.closed is not None:
                    if self._batched:
                        await self.secured_conn.send_eof()
                    return
                else:
                    await self._idle.park()
        except (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._lost(str(exc) or "the connection broke")

    async def _run_timer(self) -> None:
        while (when := self.session.next_timer()) is not None:
            await trio.sleep_until(when)
            self._dispatch(self.session.handle_timer(trio.current_time()))
            self.wake_writer()

    def wake_writer(self) -> None:
        if self._idle:
            self._idle.unpark_all()

    def wake_writer_for_updates(self) -> None:
        """After a read: only a window update can have become due."""
        if self._idle and self.session.has_output:
            self._idle.unpark_all()

    def _dispatch(self, events: list[yamux.Event]) -> None:
        for event in events:
            if isinstance(event, yamux.StreamReadable):
                event.stream.owner.wake_readers()
            elif isinstance(event, yamux.StreamWritable):
                event.stream.owner.wake_writers()
            elif isinstance(event, yamux.StreamOpened):
                self._accept.append(YamuxStream(self, event.stream))
                self._accepting.unpark()
            elif isinstance(event, yamux.StreamReset):
                event.stream.owner.wake()
            elif isinstance(event, yamux.OpenAllowed | yamux.GoAwayReceived):
                self._opening.unpark_all()
            elif isinstance(event, yamux.SessionClosed):
                self._closed(event)

    def _closed(self, event: yamux.SessionClosed) -> None:
        if event.code not in (None, yamux.GoAwayCode.NORMAL):
            log.info("connection to %s: %s", self.peer_id, event.reason)
        self._accept.clear()
        self._accepting.unpark_all()
        self._opening.unpark_all()
        self.wake_writer()
        if event.by_peer:
            self._scope.cancel()
        else:
            self._scope.deadline = trio.current_time() + CLOSE_GRACE

"""The state of one Yamux session. Everything that changes it is in this file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from protocols.yamux.events import (
    Event,
    GoAwayReceived,
    OpenAllowed,
    SessionClosed,
    StreamOpened,
    StreamReadable,
    StreamReset,
    StreamWritable,
)
from protocols.yamux.flow import Allowance, Budget, Limits, grown_window
from protocols.yamux.frames import (
    ACK,
    FIN,
    HEADER,
    HEADER_SIZE,
    INITIAL_WINDOW,
    MAX_PAYLOAD,
    MAX_SEND_WINDOW,
    RST,
    SYN,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
    GoAwayCode,
    control,
)
from protocols.yamux.stream import PART_COST, SEND_LOW, Stream

Buffer = bytes | bytearray | memoryview

# A slice keeps all of the buffer it is from alive. Payloads that are a small part of theirs are copied, so that unread
# bytes pin at most four times their size; tiny ones are joined, so that they do not cost an object each.
PIN_FACTOR = 4
TINY = 1024
COALESCED = 16 * 1024

STALE_FRAMES = 32  # that may be under way for a stream we reset: ACK, window updates, FIN
LATE = 5.0  # a timer this late means that we were stopped, not the peer
STREAM_ID_LIMIT = 0xFFFFFFFE


class _Violation(Exception):
    """The peer broke the protocol; ends the session with GO_AWAY `code`."""

    def __init__(self, reason: str, code: GoAwayCode = GoAwayCode.PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class Session:
    """One end of a Yamux session.

    Nothing here raises for what the peer does: a violation queues GO_AWAY, resets all streams and shows up as
    `SessionClosed`. Local misuse raises ValueError. After `SessionClosed`, `data_to_send` still returns the GO_AWAY
    (after a local `close`: behind what streams had queued), then nothing.
    """

    def __init__(
        self, *, initiator: bool, now: float, budget: Budget | None = None, limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self._budget = budget.child(self.limits.memory) if budget is not None else Budget(self.limits.memory)
        self._parity = 1 if initiator else 0
        self._streams: dict[int, Stream] = {}
        self._next_id = 1 if initiator else 2
        self._highest = 0  # of the peer's ids
        self._skipped: set[int] = set()  # peer's ids below `_highest` that were never opened
        self._inbound = 0
        self._backlog = 0
        self._unacked = 0
        self._open_blocked = False
        self._discard = 0  # payload bytes of forgotten streams that the peer may still have under way
        self._stale = 0  # and other frames of theirs
        self._events: list[Event] = []
        # sending
        self._control: deque[bytes] = deque()
        self._updates: dict[int, Stream] = {}
        self._ready: deque[Stream] = deque()
        # receiving
        self._header = bytearray()
        self._body: Stream | None = None
        self._body_left = 0
        # life
        self.window_limit: int | None = None  # bytes that a stream may have under way to us; set by the owner
        self.closed: SessionClosed | None = None
        self.going_away = False  # the peer accepts no new streams
        self._allowance = Allowance(self.limits.idle_frames, self.limits.idle_frames_per_second, now)
        self._lingering: dict[int, Stream] = {}  # in the order of their time
        # pings
        self.rtt: float | None = None
        self._heard = now
        self._received = 0
        self._ping_value = 0
        self._ping_queued: float | None = None  # time, while a pong is awaited
        self._ping_sent: float | None = None
        self._stalled: tuple[float, int] = (now, 0)  # since when, and with how many bytes received, a pong is awaited
        self._next_ping = now  # the first at once: windows grow only with a known round trip time

    # -- streams ---------------------------------------------------------------------------------------------------

    @property
    def can_open(self) -> bool:
        """Whether `open_stream` may be called; `OpenAllowed` follows when it is false for want of an ACK."""
        if self.closed or self.going_away or self._next_id > STREAM_ID_LIMIT:
            return False
        self._open_blocked = self._unacked >= self.limits.accept_backlog
        return not self._open_blocked

    @property
    def exhausted(self) -> bool:
        """Whether no stream can ever be opened here again."""
        return self.closed is not None or self.going_away or self._next_id > STREAM_ID_LIMIT

    @property
    def streams(self) -> int:
        return len(self._streams)

    @property
    def has_output(self) -> bool:
        """Whether `data_to_send` has something to say, or the session has ended."""
        pinging = self._ping_queued is not None and self._ping_sent is None
        return bool(self._control or self._updates or self._ready or pinging or self.closed)

    @property
    def body_left(self) -> int:
        """Bytes still to come of the frame that is arriving."""
        return self._body_left

    @property
    def memory(self) -> int:
        """Bytes taken from the budget: unread data and granted window growth."""
        return self._budget.used

    def open_stream(self, now: float) -> Stream:
        """A new stream; the SYN goes out with the next `data_to_send`. Data may be sent before the peer's ACK."""
        if not self.can_open:
            raise ValueError("no stream can be opened now")
        stream = Stream(self._next_id, True, now)
        self._next_id += 2
        self._streams[stream.id] = stream
        self._unacked += 1
        self._control.append(control(TYPE_WINDOW_UPDATE, SYN, stream.id))
        return stream

    def accept(self, stream: Stream) -> None:
        """Take a stream announced by `StreamOpened` off the accept back-log."""
        if stream.accepted:
            return
        stream.accepted = True
        if stream.id in self._streams:
            self._backlog -= 1
            if self.closed is None:
                self._control.append(control(TYPE_WINDOW_UPDATE, ACK, stream.id))

    def send(self, stream: Stream, parts: Iterable[Buffer]) -> None:
        """Queue `parts` by reference: their contents must not change until they are sent. Never refuses for size; wait
        while `stream.full` before calling."""
        if stream.finishing or stream.reset is not None or self.closed:
            raise ValueError(f"{stream!r} is not open for sending")
        for part in parts:
            view = memoryview(part)
            if view.format != "B" or view.ndim != 1:
                view = view.cast("B")
            size = len(view)
            if size:
                stream.parts.append(view)
                stream.queued += size
                stream.backlog += size + PART_COST
        if stream.full:
            stream.want_room = True
        self._make_ready(stream)

    def want_room(self, stream: Stream) -> None:
        """Ask for `StreamWritable` once the queue of a `full` stream has drained."""
        stream.want_room = True

    def finish(self, stream: Stream) -> None:
        """Half-close: FIN follows what is queued. Reading goes on."""
        if stream.finishing or stream.reset is not None or self.closed:
            return
        stream.finishing = True
        self._make_ready(stream)

    def release(self, stream: Stream, now: float) -> None:
        """Half-close, and forget the stream: reset it if the peer does not end it too within `limits.linger`."""
        self.finish(stream)
        if stream.linger_until is None and stream.id in self._streams and self.closed is None:
            stream.linger_until = now + self.limits.linger
            self._lingering[stream.id] = stream

    def reset(self, stream: Stream, reason: str = "reset by us") -> None:
        """Abort both directions at once; unread and unsent data is dropped."""
        if stream.reset is not None:  # what its session or the peer left is no longer wanted either
            self._drop_unread(stream)
            return
        if self.closed:
            return
        if stream.id in self._streams:
            self._control.append(control(TYPE_WINDOW_UPDATE, RST, stream.id))
            self._stale += STALE_FRAMES
        self._abort(stream, reason)

    def read(self, stream: Stream, max_bytes: int) -> memoryview:
        """Up to `max_bytes` of the oldest unread data, as a slice of what was received; empty when there is none."""
        if not stream.chunks or max_bytes <= 0:
            return memoryview(b"")
        chunk = memoryview(stream.chunks[0])
        if len(chunk) > max_bytes:
            stream.chunks[0] = chunk[max_bytes:]
            chunk = chunk[:max_bytes]
        else:
            stream.chunks.popleft()
        size = len(chunk)
        stream.buffered -= size
        if self.closed is None:
            self._budget.give(size)
            if stream.fin_received:
                if not stream.buffered:
                    self._maybe_forget(stream)
            elif 2 * self._outstanding(stream) <= stream.window:
                self._updates[stream.id] = stream
        return chunk

    def _outstanding(self, stream: Stream) -> int:
        """Bytes that the peer may still send, that are unread, or that a frame whose body is arriving announced."""
        arriving = self._body_left if self._body is stream else 0
        return stream.recv_window + stream.buffered + arriving

    # -- time ------------------------------------------------------------------------------------------------------

    def next_timer(self) -> float | None:
        """When `handle_timer` wants to be called. It never moves earlier than what was returned before."""
        if self.closed is not None:
            return None
        when = self._next_ping
        if self._ping_queued is not None:
            when = min(when, max(self._ping_queued, self._heard) + self.limits.ping_timeout)
        if self._lingering:
            when = min(when, next(iter(self._lingering.values())).linger_until or when)
        return when

    def handle_timer(self, now: float) -> list[Event]:
        """Send pings, notice a dead peer, reset streams that lingered too long."""
        if self.closed is not None:
            return self.take_events()
        while self._lingering:
            stream = next(iter(self._lingering.values()))
            if (stream.linger_until or 0.0) > now:
                break
            self.reset(stream, "the peer did not end the stream")
        if self._ping_queued is not None:
            deadline = max(self._ping_queued, self._heard) + self.limits.ping_timeout
            if now >= deadline + LATE:  # we did not run: what the peer sent meanwhile is still unread
                self._heard = now
            elif now >= deadline:
                self.connection_lost(f"the peer was silent for {self.limits.ping_timeout:.0f} s")
                return self.take_events()
        if now >= self._next_ping:
            if now >= self._next_ping + LATE:
                self._stalled = (now, self._received)
                self._ping_queued = None if self._ping_queued is None else now
            self._next_ping = now + self.limits.ping_interval
            if self._ping_queued is None:
                self._ping_value = (self._ping_value + 1) & 0xFFFFFFFF
                self._ping_queued = now
                self._ping_sent = None
                self._stalled = (now, self._received)
            elif now >= self._ping_queued + self.limits.pong_timeout:
                self.connection_lost(f"the peer answered no ping for {self.limits.pong_timeout:.0f} s")
                return self.take_events()
            elif now >= self._stalled[0] + self.limits.stall_timeout:
                # An answer may wait behind data on a slow line; a byte now and then only keeps a place here.
                if self._received - self._stalled[1] < self.limits.stall_bytes:
                    self.connection_lost("the peer answers no ping and sends next to nothing")
                    return self.take_events()
                self._stalled = (now, self._received)
        return self.take_events()

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self, code: int = GoAwayCode.NORMAL, reason: str = "closed by us") -> None:
        """End the session: GO_AWAY follows what is queued."""
        if self.closed is None:
            self._end(SessionClosed(code, reason, by_peer=False), flush=code == GoAwayCode.NORMAL)

    def connection_lost(self, reason: str) -> None:
        """The byte stream below ended or broke."""
        if self.closed is None:
            self._end(SessionClosed(None, reason, by_peer=True), flush=False)
        self._control.clear()
        self._ready.clear()

    def take_events(self) -> list[Event]:
        events = self._events
        if events:
            self._events = []
        return events

    def _end(self, closed: SessionClosed, *, flush: bool) -> None:
        self.closed = closed
        if not flush:
            self._control.clear()
            self._ready.clear()
        if closed.code is not None and not closed.by_peer:
            self._control.append(control(TYPE_GO_AWAY, 0, 0, closed.code))
        for stream in self._streams.values():
            # Unread data stays with its stream for whoever still reads it; only new data is impossible.
            stream.reset = closed.reason
            stream.extra = 0
            self._events.append(StreamReset(stream, closed.reason))
        self._updates.clear()
        self._lingering.clear()
        if self._budget.used:
            self._budget.give(self._budget.used)
        if not flush:
            self._streams.clear()
        self._events.append(closed)

    def _fail(self, violation: _Violation) -> None:
        if self.closed is None:
            self._end(SessionClosed(violation.code, violation.reason, by_peer=False), flush=False)

    # -- sending ---------------------------------------------------------------------------------------------------

    def data_to_send(self, max_bytes: int, now: float) -> list[Sequence[Buffer]]:
        """Frames to write now, each a tuple of buffers (header, then payload slices by reference): all control frames
        first, then one data frame per stream in turn until about `max_bytes` are reached; of at most 64 KiB where
        several streams wait. `take_events` afterwards."""
        out: list[Sequence[Buffer]] = []
        size = 0
        if self._updates:
            self._queue_updates(now)
        if self._ping_queued is not None and self._ping_sent is None and self.closed is None:
            self._ping_sent = now
            out.append((control(TYPE_PING, SYN, 0, self._ping_value),))
        goodbye = self._control.pop() if self.closed is not None and self._control and self._ready else None
        while self._control and size < max_bytes:
            out.append((self._control.popleft(),))
            size += HEADER_SIZE
        while self._ready and size < max_bytes:
            stream = self._ready.popleft()
            stream.in_ready = False
            if stream.id not in self._streams:
                continue  # aborted since
            if stream.queued and stream.send_window:
                # Nobody else waits: cutting what is sent at once into small frames would only cost both sides time.
                limit = MAX_PAYLOAD if self._ready else max(MAX_PAYLOAD, max_bytes - size)
                frame, n = self._data_frame(stream, limit)
                out.append(frame)
                size += n + HEADER_SIZE
                if stream.want_room and stream.backlog <= SEND_LOW and self.closed is None:
                    stream.want_room = False
                    self._events.append(StreamWritable(stream))
            if stream.finishing and not stream.queued and not stream.fin_sent:
                # Its own frame: go-yamux handles flags before payload and could show a reader the end too early.
                stream.fin_sent = True
                out.append((control(TYPE_WINDOW_UPDATE, FIN, stream.id),))
                size += HEADER_SIZE
                self._maybe_forget(stream)
            else:
                self._make_ready(stream)
        if goodbye is not None:
            if self._ready:
                self._control.append(goodbye)
            else:
                out.append((goodbye,))
        return out

    def _data_frame(self, stream: Stream, limit: int) -> tuple[tuple[Buffer, ...], int]:
        parts = stream.parts
        n = left = min(stream.queued, stream.send_window, limit)
        frame: list[Buffer] = [HEADER.pack(0, TYPE_DATA, 0, stream.id, n)]
        while left:
            part = parts[0]
            if len(part) <= left:
                frame.append(part)
                left -= len(part)
                parts.popleft()
                stream.backlog -= PART_COST
            else:
                frame.append(part[:left])
                parts[0] = part[left:]
                left = 0
        stream.queued -= n
        stream.backlog -= n
        stream.send_window -= n
        return tuple(frame), n

    def _make_ready(self, stream: Stream) -> None:
        if not stream.in_ready and (
            (stream.queued and stream.send_window) or (stream.finishing and not stream.queued and not stream.fin_sent)
        ):
            stream.in_ready = True
            self._ready.append(stream)

    def _queue_updates(self, now: float) -> None:
        for stream in self._updates.values():
            if stream.reset is not None or stream.fin_received:
                continue
            window = grown_window(stream.window, now - stream.epoch, self.rtt, self.limits.max_window)
            if self.window_limit is not None:
                window = min(window, self.window_limit)
            if window > stream.window and self._budget.take(window - stream.window):
                stream.extra += window - stream.window
                stream.window = window
            elif window < stream.window:
                given_back = min(stream.extra, stream.window - window)
                stream.extra -= given_back
                self._budget.give(given_back)
                stream.window = window
            delta = stream.window - self._outstanding(stream)
            if delta <= 0:  # what was granted before the window shrank has to be used up first
                continue
            stream.recv_window += delta
            stream.epoch = now
            self._control.append(control(TYPE_WINDOW_UPDATE, 0, stream.id, delta))
        self._updates.clear()

    # -- receiving -------------------------------------------------------------------------------------------------

    def receive(self, data: Buffer, now: float) -> list[Event]:
        """Take bytes from the peer, split anywhere. `data` must not change afterwards: payload is kept as slices."""
        if self.closed is not None:
            return self.take_events()
        self._heard = now
        view = memoryview(data)
        size = len(view)
        pinned = memoryview(view.obj).nbytes  # by any slice of it
        self._received += size
        pos = 0
        try:
            while pos < size and self.closed is None:
                if self._body_left:
                    n = min(self._body_left, size - pos)
                    self._body_left -= n
                    self._payload(view[pos : pos + n], pinned)
                    pos += n
                elif not self._header and size - pos >= HEADER_SIZE:
                    self._frame(now, *HEADER.unpack_from(view, pos))
                    pos += HEADER_SIZE
                else:
                    n = min(HEADER_SIZE - len(self._header), size - pos)
                    self._header += view[pos : pos + n]
                    pos += n
                    if len(self._header) == HEADER_SIZE:
                        fields = HEADER.unpack(self._header)
                        self._header.clear()
                        self._frame(now, *fields)
        except _Violation as violation:
            self._fail(violation)
        return self.take_events()

    def _frame(self, now: float, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version:
            raise _Violation(f"frame version {version} is not 0")
        if kind > TYPE_GO_AWAY:
            raise _Violation(f"frame type {kind} does not exist")
        if kind >= TYPE_PING:
            if stream_id:
                raise _Violation("a session frame names a stream")
            if kind == TYPE_PING:
                self._ping(flags, length, now)
            else:
                self._go_away(length)
            return
        if not stream_id:
            raise _Violation("a stream frame names no stream")
        stream = self._opened(stream_id, flags, now) if flags & SYN else self._streams.get(stream_id)
        if stream is None:
            self._forgotten(kind, flags, stream_id, length, now)
            return
        if flags & ACK and not stream.acked:
            self._acked(stream)
        elif not length and not flags & (SYN | RST) and (stream.fin_received or not flags & FIN):
            self._idle(now, "empty frames")
        if kind == TYPE_DATA:
            if length:
                self._data(stream, length)
        elif length:
            if stream.send_window + length > MAX_SEND_WINDOW:
                raise _Violation(f"the window of stream {stream_id} overflows")
            if length < TINY and stream.send_window >= INITIAL_WINDOW:  # some peers grant every byte that was read
                self._idle(now, "needless window updates")
            stream.send_window += length
            self._make_ready(stream)
        if flags & RST:
            if not stream.accepted:
                self._idle(now, "streams reset before they were accepted")
            # A body announced by this frame still follows; its stream is gone, so it is skipped.
            self._body = None
            self._abort(stream, "reset by the peer")
        elif flags & FIN and not stream.fin_received:
            if kind == TYPE_DATA and length:
                # The end becomes visible with the last byte of the body, not before.
                stream.fin_received = True
            else:
                self._finished(stream)

    def _opened(self, stream_id: int, flags: int, now: float) -> Stream | None:
        """The stream of a SYN; None when it is refused."""
        if stream_id & 1 == self._parity:
            raise _Violation(f"the peer opened stream {stream_id}, a number of ours")
        if stream_id > self._highest:
            first = self._highest + 2 if self._highest > 0 else (2 if self._parity else 1)
            if (stream_id - first) // 2 + len(self._skipped) > self.limits.skipped_ids:
                raise _Violation(f"the peer skipped too many stream numbers before {stream_id}")
            self._skipped.update(range(first, stream_id, 2))
            self._highest = stream_id
        elif stream_id in self._skipped:
            self._skipped.remove(stream_id)
        else:
            raise _Violation(f"the peer opened stream {stream_id} twice")
        if self._backlog >= self.limits.accept_backlog or self._inbound >= self.limits.max_inbound_streams:
            self._idle(now, "refused streams")
            self._discard += INITIAL_WINDOW
            self._control.append(control(TYPE_WINDOW_UPDATE, RST, stream_id))
            return None
        self._check_answers()
        stream = Stream(stream_id, False, now)
        self._streams[stream_id] = stream
        self._inbound += 1
        self._backlog += 1
        self._events.append(StreamOpened(stream))
        return stream

    def _forgotten(self, kind: int, flags: int, stream_id: int, length: int, now: float) -> None:
        """A frame for a stream that was closed here, while the peer could not know that yet."""
        ours = stream_id & 1 == self._parity
        if (stream_id >= self._next_id) if ours else (stream_id > self._highest or stream_id in self._skipped):
            raise _Violation(f"a frame names stream {stream_id}, which was never opened")
        if kind == TYPE_DATA and length:
            if length > self._discard:
                raise _Violation(f"data for closed stream {stream_id} exceeds its window")
            self._discard -= length
            self._body = None
            self._body_left = length
        elif not flags & SYN:
            if self._stale:
                self._stale -= 1
            else:
                self._idle(now, "frames for closed streams")

    def _data(self, stream: Stream, length: int) -> None:
        if stream.fin_received:
            raise _Violation(f"data on stream {stream.id} after its end")
        if length > stream.recv_window:
            raise _Violation(f"data on stream {stream.id} exceeds its window")
        stream.recv_window -= length
        self._body = stream
        self._body_left = length

    def _payload(self, part: memoryview, pinned: int) -> None:
        stream = self._body
        n = len(part)
        if stream is None or stream.reset is not None:
            return
        if not self._budget.take(n):
            self.reset(stream, "no memory left for unread data")
            return
        chunks = stream.chunks
        if n < TINY and chunks and isinstance(chunks[-1], bytearray) and len(chunks[-1]) < COALESCED:
            chunks[-1] += part
        elif n < TINY:
            chunks.append(bytearray(part))
        elif n * PIN_FACTOR < pinned:
            chunks.append(memoryview(bytes(part)))
        else:
            chunks.append(part)
        silent = not stream.buffered
        stream.buffered += n
        if not self._body_left:
            self._body = None
            stream.ended = stream.fin_received
        if silent or stream.ended:
            self._events.append(StreamReadable(stream))

    def _finished(self, stream: Stream) -> None:
        stream.fin_received = stream.ended = True
        self._events.append(StreamReadable(stream))
        self._maybe_forget(stream)

    def _ping(self, flags: int, value: int, now: float) -> None:
        if flags & SYN:
            self._idle(now, "pings")
            self._control.append(control(TYPE_PING, ACK, 0, value))
        elif not flags & ACK:
            raise _Violation("a ping is neither request nor answer")
        elif self._ping_queued is not None and self._ping_sent is not None and value == self._ping_value:
            sample = now - self._ping_sent
            self.rtt = sample if self.rtt is None else (self.rtt + sample) / 2
            self._ping_queued = self._ping_sent = None
        else:
            self._idle(now, "unasked ping answers")

    def _go_away(self, code: int) -> None:
        if code == GoAwayCode.NORMAL:
            if not self.going_away:
                self.going_away = True
                self._events.append(GoAwayReceived())
                self._close_if_idle()
            return
        self._end(SessionClosed(code, f"the peer went away with code {code}", by_peer=True), flush=False)

    def _acked(self, stream: Stream) -> None:
        stream.acked = True
        self._unacked -= 1
        if self._open_blocked and self.closed is None:
            self._open_blocked = False
            self._events.append(OpenAllowed())

    def _idle(self, now: float, what: str) -> None:
        if not self._allowance.spend(now):
            raise _Violation(f"the peer floods us with {what}")
        self._check_answers()

    def _check_answers(self) -> None:
        if len(self._control) > self.limits.max_control_queue:
            raise _Violation("the peer does not read our answers")

    # -- forgetting ------------------------------------------------------------------------------------------------

    def _maybe_forget(self, stream: Stream) -> None:
        """Both directions ended and all was read: nothing more can happen."""
        if stream.fin_sent and stream.fin_received and not stream.buffered and self._body is not stream:
            self._forget(stream)

    def _abort(self, stream: Stream, reason: str) -> None:
        stream.reset = reason
        self._events.append(StreamReset(stream, reason))
        stream.parts.clear()
        stream.queued = stream.backlog = 0
        self._drop_unread(stream)
        if not stream.fin_received:
            self._discard += stream.recv_window
        self._forget(stream)

    def _drop_unread(self, stream: Stream) -> None:
        if self.closed is None:
            self._budget.give(stream.buffered)
        stream.chunks.clear()
        stream.buffered = 0
        stream.ended = False  # else what was dropped would look like nothing

    def _forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.id, None) is None:
            return
        self._updates.pop(stream.id, None)
        self._lingering.pop(stream.id, None)
        if stream.extra:
            self._budget.give(stream.extra)
            stream.extra = 0
        if stream.outbound:
            if not stream.acked:
                self._acked(stream)
        else:
            self._inbound -= 1
            if not stream.accepted:
                self._backlog -= 1
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self.going_away and not self._streams and self.closed is None:
            self._end(SessionClosed(GoAwayCode.NORMAL, "the peer went away", by_peer=True), flush=False)

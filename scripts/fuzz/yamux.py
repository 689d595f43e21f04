"""The Yamux session as a state machine: a hostile peer that says anything, and two honest ones on a slow line.

Asserted against a peer that says anything: nothing raises; unread bytes, granted windows, streams, queued answers and
book-keeping stay within `LIMITS`; what `Referee` calls a violation ends the session with GO_AWAY 1, sent once and
last; nothing happens after the end. Between honest peers: no violation, and every byte arrives once, in order.
Whatever a session sends is checked against the spec by a `Referee` on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence

from fuzz.choices import Choices
from protocols import yamux
from protocols.yamux.frames import (
    ACK,
    FIN,
    HEADER,
    HEADER_SIZE,
    INITIAL_WINDOW,
    MAX_PAYLOAD,
    RST,
    SYN,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
)
from protocols.yamux.session import Session, Stream

LIMITS = yamux.Limits(
    accept_backlog=4,
    max_inbound_streams=6,
    max_window=1 << 20,
    memory=1 << 20,
    max_control_queue=64,
    idle_frames=48,
    idle_frames_per_second=10.0,
    skipped_ids=8,
)
# Between honest peers only what refuses politely is small: floods are out of their reach.
HONEST = yamux.Limits(
    accept_backlog=4,
    max_inbound_streams=6,
    max_window=1 << 20,
    memory=1 << 20,
    ping_timeout=1e9,
    stall_timeout=1e9,
    pong_timeout=1e9,
)
SIZES = (0, 1, 7, 1000, 1024, 5000, 16_384, MAX_PAYLOAD, 65_536, 131_072, INITIAL_WINDOW, INITIAL_WINDOW + 1)
VALUES = (*SIZES, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)
STEPS = (0.0, 0.001, 0.5, 3.0, 11.0, 61.0)
MAX_STEPS = 300
ZEROS = bytes(INITIAL_WINDOW + 1)
PERIOD = 251  # a prime: out of step with every size above
PATTERN = bytes(range(PERIOD)) * (2 * INITIAL_WINDOW // PERIOD + 2)


class Referee:
    """Follows one direction of a wire by the spec alone. `wrong` is the first thing that breaks it."""

    def __init__(self, initiator: bool, *, ours: bool) -> None:
        self._parity = 1 if initiator else 0  # of the sender's ids
        self._ours = ours  # what only an implementation like ours guarantees is asked for, too
        self._header = bytearray()
        self._body = 0
        self._opened: set[int] = set()
        self._ended: set[int] = set()  # FIN was sent
        self._reset: set[int] = set()
        self._granted: list[tuple[int, int]] = []
        self.credit: dict[int, int] = {}  # bytes that may still be sent on a stream
        self.gone = 0  # GO_AWAY frames
        self.wrong: str | None = None
        self.wrong_on: int | None = None  # the stream whose window or state was not respected

    def saw_open(self, stream_id: int) -> None:
        """The other side opened a stream."""
        self.credit.setdefault(stream_id, INITIAL_WINDOW)

    def feed(self, data: bytes) -> None:
        pos = 0
        while pos < len(data) and self.wrong is None:
            if self._body:
                n = min(self._body, len(data) - pos)
                self._body -= n
            else:
                n = HEADER_SIZE - len(self._header)
                self._header += data[pos : pos + n]
                if len(self._header) == HEADER_SIZE:
                    version, kind, flags, stream_id, length = HEADER.unpack(self._header)
                    self._header.clear()
                    self._body = length if kind == TYPE_DATA else 0
                    self.wrong = self._frame(version, kind, flags, stream_id, length)
            pos += n

    def _frame(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> str | None:
        if version:
            return "version"
        if kind > TYPE_GO_AWAY:
            return "type"
        if self._ours and self.gone:
            return "a frame after GO_AWAY"
        if kind >= TYPE_PING:
            if stream_id:
                return "a session frame with a stream id"
            if kind == TYPE_GO_AWAY:
                self.gone += 1
            elif not flags & (SYN | ACK):
                return "a ping that is neither question nor answer"
            return None
        if not stream_id:
            return "a stream frame without an id"
        if flags & SYN:
            if stream_id & 1 != self._parity:
                return "an id of the other side"
            if stream_id in self._opened:
                return "an id used twice"
            self._opened.add(stream_id)
            self.credit[stream_id] = INITIAL_WINDOW
        if self._ours and (stream_id in self._reset or (flags & FIN and stream_id in self._ended)):
            return "a frame after RST, or FIN twice"
        if kind == TYPE_DATA and length and stream_id not in self._reset:
            self.wrong_on = stream_id
            if stream_id not in self.credit:
                return "data for a stream nobody opened"
            if stream_id in self._ended:
                return "data after the end"
            if length > self.credit[stream_id]:
                return "data beyond the window"
            self.wrong_on = None
            self.credit[stream_id] -= length
        if kind == TYPE_WINDOW_UPDATE:
            self._granted.append((stream_id, length))
        if flags & RST:
            self._reset.add(stream_id)
        if flags & FIN:
            self._ended.add(stream_id)
        return None

    def grants(self, other: Referee) -> None:
        """What was granted since the last call counts for `other`, the referee of the opposite direction."""
        for stream_id, length in self._granted:
            if stream_id in other.credit:
                other.credit[stream_id] += length
        self._granted.clear()


class Side:
    """A session and what it was seen to do."""

    def __init__(self, initiator: bool, limits: yamux.Limits, budget: yamux.Budget) -> None:
        self.budget = budget
        self.session = Session(initiator=initiator, now=0.0, budget=budget, limits=limits)
        self.referee = Referee(initiator, ours=True)
        self.streams: list[Stream] = []
        self.sent: dict[int, int] = {}
        self.got: dict[int, int] = {}
        self.endings = 0
        self.lost = False  # the connection below, so that no GO_AWAY can leave
        self.last = b""  # sent bytes
        self.local_frames = 0  # control frames that our own calls may have queued

    def handle(self, events: Sequence[yamux.Event]) -> None:
        for event in events:
            assert not self.endings, f"{event} after the end"
            if isinstance(event, yamux.SessionClosed):
                self.endings += 1
            elif isinstance(event, yamux.StreamOpened):
                self._add(event.stream)

    def _add(self, stream: Stream) -> None:
        self.streams.append(stream)
        self.sent[stream.id] = self.got[stream.id] = 0

    def open(self, now: float) -> None:
        if self.session.can_open:
            self._add(self.session.open_stream(now))
            self.local_frames += 1

    def send(self, stream: Stream, size: int) -> None:
        if stream.reset is None and not stream.finishing and self.session.closed is None and not stream.full:
            at = (self.sent[stream.id] + stream.id) % PERIOD
            block = PATTERN[at : at + size]
            self.session.send(stream, [block[: size // 3], block[size // 3 :]])
            self.sent[stream.id] += size

    def read(self, stream: Stream, size: int) -> None:
        part = self.session.read(stream, size)
        self.local_frames += 1
        assert len(part) <= size
        self.got[stream.id] += len(part)

    def read_pattern(self, stream: Stream, size: int) -> None:
        at = (self.got[stream.id] + stream.id) % PERIOD
        part = self.session.read(stream, size)
        assert part == PATTERN[at : at + len(part)], f"bytes of {stream} are lost or out of order"
        self.got[stream.id] += len(part)

    def output(self, limit: int, now: float) -> bytes:
        wire = b"".join(bytes(part) for frame in self.session.data_to_send(limit, now) for part in frame)
        self.handle(self.session.take_events())
        self.last = (self.last + wire)[-HEADER_SIZE:]
        self.referee.feed(wire)
        assert self.referee.wrong is None, self.referee.wrong
        assert self.referee.gone <= 1
        return wire

    def timer(self, now: float) -> None:
        when = self.session.next_timer()
        if when is not None and when <= now:
            self.handle(self.session.handle_timer(now))
            after = self.session.next_timer()
            assert after is None or after > now, "a timer that is due at once, again and again"

    def check(self) -> None:
        session, limits = self.session, self.session.limits
        live = list(session._streams.values())
        if session.closed is not None:
            assert session.memory == 0 == self.budget.used
            assert not session._lingering and not session._updates
            return
        assert session.memory == self.budget.used == sum(stream.buffered + stream.extra for stream in live)
        assert 0 <= session.memory <= limits.memory
        inbound = [stream for stream in live if not stream.outbound]
        waiting = [stream for stream in inbound if not stream.accepted]
        unanswered = [stream for stream in live if stream.outbound and not stream.acked]
        assert len(inbound) == session._inbound <= limits.max_inbound_streams
        assert len(waiting) == session._backlog <= limits.accept_backlog
        assert len(unanswered) == session._unacked <= limits.accept_backlog
        assert len(session._control) <= limits.max_control_queue + limits.max_inbound_streams + 2 + self.local_frames
        assert len(session._lingering) <= len(live)
        assert len(session._skipped) <= limits.skipped_ids
        assert len(session._header) < HEADER_SIZE
        assert session._discard >= 0 and session._stale >= 0
        for stream in live:
            assert stream.buffered == sum(map(len, stream.chunks))
            assert len(stream.chunks) <= 4 + stream.buffered // 256, "small pieces cost objects"
            assert stream.recv_window >= 0 and stream.send_window >= 0
            assert stream.window <= max(limits.max_window, INITIAL_WINDOW)
            assert session._outstanding(stream) <= stream.window
            assert stream.queued == sum(map(len, stream.parts))


def check(data: bytes) -> None:
    """Raises AssertionError when an invariant of the module's text is broken."""
    choices = Choices(data)
    mode = choices.below(4)
    if mode == 3:
        between_honest_peers(choices)
    else:
        against_a_hostile_peer(choices, initiator=mode == 1)


def against_a_hostile_peer(choices: Choices, *, initiator: bool) -> None:
    side = Side(initiator, LIMITS, yamux.Budget(LIMITS.memory * 3 // 4))
    session = side.session
    peer = Referee(not initiator, ours=False)
    now = 0.0
    steps = 0
    while choices.left and steps < MAX_STEPS:
        steps += 1
        operation = choices.below(20)
        stream = choices.of(side.streams) if side.streams and operation >= 12 else None
        if operation < 9:
            for piece in pieces(choices, hostile_frame(choices, side, initiator)):
                deliver(side, peer, piece, now)
        elif operation == 9:
            deliver(side, peer, choices.bytes(choices.below(32)), now)
        elif operation == 10:
            now += choices.of(STEPS)
            side.timer(now)
        elif operation == 11:
            side.open(now)
            if side.streams:
                peer.saw_open(side.streams[-1].id)
        elif stream is None:
            side.output(choices.of((1, 100, 100_000, 1 << 30)), now)
            side.local_frames = len(session._control)
            side.referee.grants(peer)
        elif operation == 12:
            session.accept(stream)
            side.local_frames += 1
        elif operation == 13:
            side.send(stream, choices.of(SIZES))
        elif operation in (14, 15):
            side.read(stream, choices.of(SIZES))
        elif operation == 16:
            session.finish(stream)
        elif operation == 17:
            session.release(stream, now)
        elif operation == 18:
            session.reset(stream)
            side.local_frames += 1
        else:
            ending = choices.below(16)
            if ending == 0:
                session.close()
            elif ending == 1:
                session.connection_lost("the line broke")
                side.lost = True
        side.handle(session.take_events())
        side.check()
    end(side, now)


def deliver(side: Side, peer: Referee, piece: bytes, now: float) -> None:
    session = side.session
    over = session.closed is not None
    side.handle(session.receive(piece, now))
    if over:
        assert not session.take_events()
        return
    peer.feed(piece)
    for stream in side.streams:
        if not stream.outbound:
            side.referee.saw_open(stream.id)
    peer.grants(side.referee)
    closed = session.closed
    if peer.wrong is not None and (peer.wrong_on is None or peer.wrong_on in session._streams):
        assert closed is not None, f"{peer.wrong} is tolerated"
    if closed is not None and not closed.by_peer:
        assert closed.code == yamux.GoAwayCode.PROTOCOL_ERROR
    side.check()


def hostile_frame(choices: Choices, side: Side, initiator: bool) -> bytes:
    """A frame that is well-formed more often than not, most of its fields near what matters now."""
    session = side.session
    kind = choices.of((0, 0, 0, 1, 1, 1, 2, 3, 4))
    flags = choices.of((0, 0, 0, 0, SYN, SYN, ACK, FIN, FIN, RST, SYN | FIN, SYN | RST, FIN | RST, 15, 0xFFF0))
    theirs = 2 if initiator else 1
    fresh = session._highest + 2 if session._highest else theirs
    stream_id = choices.of((0, 0, fresh, fresh, fresh + 2, fresh + 12, 1, 2, 3, 4, 5, 6, 0xFFFFFFFF))
    if side.streams and choices.below(3):
        stream_id = choices.of(side.streams).id
    if kind >= TYPE_PING and choices.below(4):
        stream_id = 0
    length = choices.of(VALUES)
    stream = session._streams.get(stream_id)
    if stream is not None and choices.below(3) == 0:
        length = max(0, stream.recv_window + choices.of((0, 0, -1, 1)))
    version = 1 if choices.below(64) == 63 else 0
    header = HEADER.pack(version, kind, flags, stream_id, length)
    if kind != TYPE_DATA:
        return header
    missing = choices.of(
        (0, 0, 0, 0, 1, 100, 1 << 32)
    )  # bytes of the body that never come, so that frames follow in it
    return header + ZEROS[: max(0, min(length, len(ZEROS)) - missing)]


def pieces(choices: Choices, frame: bytes) -> list[bytes]:
    """The frame as it arrives: whole, in records, or with its beginning in little bits."""
    step = choices.of((0, 0, 0, 1, 5, 13, 700))
    begin = [frame[i : i + step] for i in range(0, min(len(frame), 16 * step), step)] if step else []
    done = sum(map(len, begin))
    return [*begin, *(frame[i : i + 65_519] for i in range(done, len(frame), 65_519))]


def end(side: Side, now: float) -> None:
    """Whatever happened, the end leaves nothing behind."""
    session = side.session
    closed = session.closed
    if closed is not None and closed.code is not None and not closed.by_peer and not side.lost:
        code = closed.code
        while side.output(1 << 30, now):
            continue
        assert side.referee.gone == 1
        assert side.last == HEADER.pack(0, TYPE_GO_AWAY, 0, 0, code), "GO_AWAY is not the last frame"
    session.connection_lost("the end")
    side.handle(session.take_events())
    assert side.endings == 1
    assert not side.output(1 << 30, now)
    for stream in side.streams:
        while stream.chunks:
            side.read(stream, 100_000)
    assert side.budget.used == 0
    assert session.next_timer() is None


def between_honest_peers(choices: Choices) -> None:
    sides = [Side(initiator, HONEST, yamux.Budget(HONEST.memory)) for initiator in (True, False)]
    wires = [bytearray(), bytearray()]
    now = 0.0
    steps = 0

    def carry(index: int, limit: int, amount: int) -> bool:
        side, other = sides[index], sides[1 - index]
        wires[index] += side.output(limit, now)
        piece = bytes(wires[index][:amount])
        del wires[index][:amount]
        for stream in side.streams:
            other.referee.saw_open(stream.id)
        side.referee.grants(other.referee)
        other.handle(other.session.receive(piece, now))
        return bool(piece)

    while choices.left and steps < MAX_STEPS:
        steps += 1
        operation = choices.below(10)
        index = choices.below(2)
        side = sides[index]
        stream = choices.of(side.streams) if side.streams and operation >= 4 else None
        if operation == 0:
            side.open(now)
        elif operation < 3:
            carry(index, choices.of((12, 5000, 200_000, 1 << 20)), choices.of((1, 12, 13, 1000, 70_000, 1 << 20)))
        elif operation == 3:
            now += choices.of(STEPS)
            for each in sides:
                each.timer(now)
        elif stream is None:
            continue
        elif operation in (4, 5):
            side.send(stream, choices.of(SIZES))
        elif operation == 6:
            side.read_pattern(stream, choices.of(SIZES))
        elif operation == 7:
            side.session.accept(stream)
        elif operation == 8:
            (side.session.finish(stream) if choices.below(2) else side.session.release(stream, now))
        elif choices.below(3) == 0:
            side.session.reset(stream)
        side.handle(side.session.take_events())
        for each in sides:
            assert each.session.closed is None, each.session.closed
            each.check()
    quiet = 0
    while quiet < 2:
        quiet += 1
        for index in (0, 1):
            if carry(index, 1 << 20, 1 << 20):
                quiet = 0
            for stream in sides[index].streams:
                while stream.buffered:
                    sides[index].read_pattern(stream, 1 << 20)
    for side, other in (sides, sides[::-1]):
        assert side.session.closed is None, side.session.closed
        theirs = {stream.id: stream for stream in other.streams}
        for stream in side.streams:
            remote = theirs.get(stream.id)
            if stream.reset is None and (remote is None or remote.reset is None):
                assert remote is not None, f"{stream} never arrived"
                assert other.got[stream.id] == side.sent[stream.id]
                assert remote.ended == stream.finishing

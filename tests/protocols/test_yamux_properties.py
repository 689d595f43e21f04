"""Properties of the Yamux state machine: delivery under any schedule, and bounds under any bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import yamux
from protocols.yamux import frames
from protocols.yamux.session import Session, Stream

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "send", "read", "finish", "reset", "deliver", "tick"]),
        st.integers(0, 1),  # which side
        st.integers(0, 7),  # which stream
        st.integers(1, 300_000),  # how much
    ),
    max_size=60,
)


class Side:
    def __init__(self, initiator: bool) -> None:
        self.session = Session(initiator=initiator, now=0.0)
        self.streams: list[Stream] = []
        self.sent: dict[int, bytearray] = {}
        self.got: dict[int, bytearray] = {}
        self.wire = bytearray()

    def handle(self, events: list[yamux.Event]) -> None:
        for event in events:
            if isinstance(event, yamux.StreamOpened):
                self.session.accept(event.stream)
                self.add(event.stream)

    def add(self, stream: Stream) -> None:
        self.streams.append(stream)
        self.sent[stream.id] = bytearray()
        self.got[stream.id] = bytearray()

    def collect(self, limit: int, now: float) -> None:
        for frame in self.session.data_to_send(limit, now):
            for part in frame:
                self.wire += part
        self.handle(self.session.take_events())


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_everything_arrives_in_order_under_any_schedule(operations: list[tuple[str, int, int, int]]) -> None:
    sides = [Side(True), Side(False)]
    now = 0.0
    counter = 0

    def deliver(index: int, amount: int) -> int:
        side, other = sides[index], sides[1 - index]
        side.collect(amount, now)
        piece, side.wire = bytes(side.wire[:amount]), side.wire[amount:]
        other.handle(other.session.receive(piece, now))
        return len(piece)

    def read(side: Side, stream: Stream, amount: int) -> None:
        side.got[stream.id] += side.session.read(stream, amount)

    for kind, index, which, amount in operations:
        side = sides[index]
        stream = side.streams[which % len(side.streams)] if side.streams else None
        if kind == "open":
            side.add(side.session.open_stream(now))
        elif kind == "deliver":
            deliver(index, amount)
        elif kind == "tick":
            now += amount / 1e6
            side.handle(side.session.handle_timer(now))
        elif stream is None:
            continue
        elif kind == "read":
            read(side, stream, amount)
        elif kind == "reset":
            side.session.reset(stream)
        elif stream.reset is None and not stream.finishing:
            if kind == "finish":
                side.session.finish(stream)
            else:
                counter += 1
                block = counter.to_bytes(4, "big") * (amount // 4 + 1)
                side.sent[stream.id] += block
                side.session.send(stream, [block[: amount // 2], block[amount // 2 :]])
    quiet = 0
    while quiet < 2:
        quiet += 1
        for index in (0, 1):
            if deliver(index, 1 << 20):
                quiet = 0
            for stream in sides[index].streams:
                while stream.buffered:
                    read(sides[index], stream, 1 << 20)
    for side, other in (sides, sides[::-1]):
        assert side.session.closed is None, side.session.closed
        ours = {stream.id: stream for stream in side.streams}
        for stream in other.streams:
            sent = other.sent[stream.id]
            if stream.id not in side.got:
                assert stream.reset is not None or not sent
                continue
            got = side.got[stream.id]
            assert sent[: len(got)] == got
            if stream.reset is None and ours[stream.id].reset is None:
                assert got == sent
                assert ours[stream.id].ended == stream.finishing
        assert side.session.memory >= 0


FRAMES = st.builds(
    lambda kind, flags, stream_id, length, body: (
        frames.HEADER.pack(0, kind, flags, stream_id, length)
        + (bytes(min(length, 300_000)) if kind == 0 and body else b"")
    ),
    st.integers(0, 3),
    st.integers(0, 15),
    st.integers(0, 12),
    st.one_of(st.integers(0, 70_000), st.integers(0, 0xFFFFFFFF)),
    st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(FRAMES, st.binary(max_size=40)), max_size=60), st.integers(1, 5000), st.booleans())
def test_hostile_bytes_never_raise_and_never_exceed_the_bounds(pieces: list[bytes], step: int, initiator: bool) -> None:
    limits = yamux.Limits(memory=1 << 20, accept_backlog=4, max_inbound_streams=6)
    session = Session(initiator=initiator, now=0.0, limits=limits)
    session.open_stream(0.0)
    wire = b"".join(pieces)
    streams: set[Stream] = set()
    for pos in range(0, len(wire), step):
        for event in session.receive(wire[pos : pos + step], 0.0):
            if isinstance(event, yamux.StreamOpened):
                streams.add(event.stream)
        assert session.memory == (
            0
            if session.closed
            else sum(stream.buffered for stream in streams if not stream.reset)
            + (sum(stream.buffered for stream in session._streams.values() if stream.outbound))
        )
        assert session.memory <= limits.memory
        assert session.streams <= 1 + limits.max_inbound_streams
    out = b"".join(bytes(part) for frame in session.data_to_send(1 << 30, 0.0) for part in frame)
    assert len(out) <= 12 * (limits.max_control_queue + 2)
    if session.closed and not session.closed.by_peer:
        assert out[:2] == b"\0\3"
        assert session.closed.code == yamux.GoAwayCode.PROTOCOL_ERROR

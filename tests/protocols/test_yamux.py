"""The Yamux session: what each rule of the protocol does, and what breaking it costs."""

from __future__ import annotations

import pytest

from protocols import yamux
from protocols.yamux import frames
from protocols.yamux.frames import ACK, FIN, RST, SYN, control
from protocols.yamux.session import Session, Stream

DATA, UPDATE, PING, GO_AWAY = range(4)
KIB, MIB = 1 << 10, 1 << 20


def flat(session: Session, now: float = 0.0, limit: int = 1 << 30) -> bytes:
    return b"".join(bytes(part) for frame in session.data_to_send(limit, now) for part in frame)


def headers(data: bytes) -> list[tuple[int, int, int, int]]:
    """(type, flags, stream, length) of each frame."""
    out = []
    while data:
        _, kind, flags, stream_id, length = frames.HEADER.unpack_from(data)
        out.append((kind, flags, stream_id, length))
        data = data[12 + (length if kind == DATA else 0) :]
    return out


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frames.HEADER.pack(0, DATA, flags, stream_id, len(payload)) + payload


def server(**limits: float) -> Session:
    return Session(initiator=False, now=0.0, limits=yamux.Limits(**limits))  # type: ignore[arg-type]


def pair(**limits: float) -> tuple[Session, Session]:
    settings = yamux.Limits(**limits)  # type: ignore[arg-type]
    return Session(initiator=True, now=0.0, limits=settings), Session(initiator=False, now=0.0, limits=settings)


def pump(a: Session, b: Session, now: float = 0.0) -> list[yamux.Event]:
    """Exchange bytes until both are quiet; b's events."""
    events: list[yamux.Event] = []
    while True:
        to_b, to_a = flat(a, now), flat(b, now)
        if not to_a and not to_b:
            return events
        events += b.receive(to_b, now)
        a.receive(to_a, now)


def opened(events: list[yamux.Event]) -> list[Stream]:
    return [event.stream for event in events if isinstance(event, yamux.StreamOpened)]


def read_all(session: Session, stream: Stream) -> bytes:
    out = b""
    while part := session.read(stream, 1 << 30):
        out += part
    return out


def assert_ended(session: Session, code: int = 1) -> None:
    assert session.closed is not None
    assert session.closed.code == code
    assert not session.closed.by_peer
    assert headers(flat(session)) == [(GO_AWAY, 0, 0, code)]
    assert flat(session) == b""
    assert session.memory == 0


def test_first_bytes_on_the_wire_are_those_of_the_spec() -> None:
    client = Session(initiator=True, now=0.0)
    stream = client.open_stream(0.0)
    client.send(stream, [b"hi", b"", b" there"])
    client.finish(stream)
    assert flat(client) == (
        bytes.fromhex("00 01 0001 00000001 00000000")  # SYN
        + bytes.fromhex("00 00 0000 00000001 00000008")
        + b"hi there"
        + bytes.fromhex("00 01 0004 00000001 00000000")  # FIN
    )


def test_payload_is_queued_and_handed_out_without_copies() -> None:
    client, peer = pair()
    stream = client.open_stream(0.0)
    block = bytes(100_000)
    client.send(stream, [block])
    sent = client.data_to_send(1 << 20, 0.0)
    payload = [part for frame in sent for part in frame if isinstance(part, memoryview)]
    assert all(part.obj is block for part in payload) and b"".join(payload) == block
    (remote,) = opened(peer.receive(b"".join(sent[0]), 0.0))
    record = b"".join(sent[1])
    peer.receive(record, 0.0)
    assert peer.read(remote, 1 << 20).obj is record


def test_half_close_and_forgetting() -> None:
    a, b = pair()
    stream = a.open_stream(0.0)
    a.send(stream, [b"question"])
    a.finish(stream)
    (remote,) = opened(pump(a, b))
    b.accept(remote)
    assert read_all(b, remote) == b"question"
    assert remote.ended and not stream.ended
    b.send(remote, [b"answer"])
    b.finish(remote)
    pump(a, b)
    assert read_all(a, stream) == b"answer"
    assert stream.ended
    assert a.streams == b.streams == 0
    with pytest.raises(ValueError, match="not open"):
        a.send(stream, [b"more"])


def test_end_shows_only_after_the_whole_body() -> None:
    peer = server()
    frame = data(1, b"abcdef", SYN | FIN)
    (stream,) = opened(peer.receive(frame[:15], 0.0))
    assert read_all(peer, stream) == b"abc"
    assert not stream.ended
    assert yamux.StreamReadable(stream) in peer.receive(frame[15:], 0.0)
    assert stream.ended
    assert read_all(peer, stream) == b"def"


def test_reset_drops_data_and_frees_memory() -> None:
    a, b = pair()
    stream = a.open_stream(0.0)
    a.send(stream, [bytes(100 * KIB)])
    (remote,) = opened(pump(a, b))
    assert b.memory == 100 * KIB
    a.reset(stream)
    assert yamux.StreamReset(remote, "reset by the peer") in pump(a, b)
    assert b.memory == 0 and b.streams == 0 and a.streams == 0
    assert read_all(b, remote) == b""


def test_frames_crossing_a_reset_are_ignored_within_the_window_and_not_beyond() -> None:
    peer = server()
    (stream,) = opened(peer.receive(control(UPDATE, SYN, 1), 0.0))
    peer.reset(stream)
    flat(peer)
    for _ in range(4):
        peer.receive(data(1, bytes(64 * KIB)), 0.0)
    peer.receive(control(UPDATE, FIN, 1), 0.0)
    assert peer.closed is None and peer.memory == 0
    peer.receive(data(1, b"x"), 0.0)
    assert_ended(peer)


def test_window_is_exact() -> None:
    peer = server()
    peer.receive(data(1, bytes(256 * KIB), SYN), 0.0)
    assert peer.closed is None
    peer.receive(data(1, b"x")[:12], 0.0)  # the header alone is enough
    assert_ended(peer)


def test_sender_stops_at_the_window_and_goes_on_with_credit() -> None:
    client = Session(initiator=True, now=0.0)
    stream = client.open_stream(0.0)
    client.send(stream, [bytes(MIB)])
    assert sum(h[3] for h in headers(flat(client)) if h[0] == DATA) == 256 * KIB
    assert flat(client) == b""
    client.receive(control(UPDATE, ACK, 1, 1000), 0.0)
    assert headers(flat(client)) == [(DATA, 0, 1, 1000)]


def test_credit_is_returned_once_half_the_window_was_read() -> None:
    peer = server()
    (stream,) = opened(peer.receive(data(1, bytes(256 * KIB), SYN), 0.0))
    peer.read(stream, 128 * KIB - 1)
    assert flat(peer) == b""
    peer.read(stream, 1)
    assert headers(flat(peer)) == [(UPDATE, 0, 1, 128 * KIB)]


def test_window_grows_to_its_limit_only_for_a_reader_that_keeps_up() -> None:
    def run(gap: float) -> int:
        a, b = pair()
        a.handle_timer(0.0), b.handle_timer(0.0)
        stream = a.open_stream(0.0)
        (remote,) = opened(pump(a, b, 0.001))
        now = 0.001
        for _ in range(60):
            a.send(stream, [bytes(MIB)])
            now += gap
            b.receive(flat(a, now), now)
            read_all(b, remote)
            a.receive(flat(b, now), now)
        return remote.window

    assert run(0.001) == 16 * MIB
    assert run(1.0) == 256 * KIB


def test_window_overflow() -> None:
    peer = server()
    peer.receive(control(UPDATE, SYN, 1, 0xFFFFFFFF - 256 * KIB), 0.0)
    assert peer.closed is None
    peer.receive(control(UPDATE, 0, 1, 1), 0.0)
    assert_ended(peer)


@pytest.mark.parametrize(
    "bad",
    [
        b"\x01" + bytes(11),
        control(4, 0, 0),
        control(DATA, 0, 0),
        control(UPDATE, SYN, 0),
        control(UPDATE, SYN, 2),  # an even number is ours
        control(UPDATE, SYN, 1) * 2,
        control(UPDATE, 0, 1, 5),  # never opened
        control(UPDATE, 0, 2, 5),
        control(UPDATE, SYN, 5) + control(UPDATE, 0, 3, 5),
        control(UPDATE, SYN, 100_001),
        control(PING, SYN, 1),
        control(PING, 0, 0),
        control(GO_AWAY, 0, 1),
        control(UPDATE, SYN | FIN, 1) + data(1, b"late"),
    ],
    ids=lambda bad: bad.hex()[:48],
)
def test_violations_end_the_session_however_they_are_split(bad: bytes) -> None:
    peer = server()
    for pos in range(len(bad)):
        peer.receive(bad[pos : pos + 1], 0.0)
    assert_ended(peer)


def test_syns_may_overtake_each_other_but_not_repeat() -> None:
    peer = server()
    events = peer.receive(control(UPDATE, SYN, 5) + control(UPDATE, SYN, 1) + control(UPDATE, SYN, 3), 0.0)
    assert [stream.id for stream in opened(events)] == [5, 1, 3]
    peer.receive(control(UPDATE, RST, 3) + control(UPDATE, SYN, 3), 0.0)
    assert_ended(peer)


def test_accept_backlog_is_bounded_and_syn_floods_end_the_session() -> None:
    peer = server()
    events = peer.receive(b"".join(control(UPDATE, SYN, 2 * i + 1) for i in range(300)), 0.0)
    streams = opened(events)
    assert len(streams) == 256
    assert headers(flat(peer)) == [(UPDATE, RST, 2 * i + 1, 0) for i in range(256, 300)]
    peer.accept(streams[0])
    assert len(opened(peer.receive(control(UPDATE, SYN, 601), 0.0))) == 1
    peer.receive(b"".join(control(UPDATE, SYN, 2 * i + 1) for i in range(301, 10_000)), 0.0)
    assert_ended(peer)


@pytest.mark.parametrize(
    "frame",
    [
        data(1, b""),
        control(UPDATE, 0, 1),
        control(UPDATE, FIN, 1),
        control(UPDATE, ACK, 1),
        control(PING, SYN, 0, 7),
        control(PING, ACK, 0, 7),
    ],
    ids=["data", "update", "fin", "ack", "ping", "pong"],
)
def test_floods_that_achieve_nothing_are_bounded(frame: bytes) -> None:
    peer = server()
    peer.receive(control(UPDATE, SYN, 1), 0.0)
    for _ in range(100):
        peer.receive(frame * 10, 0.0)
    assert peer.closed is None
    for _ in range(200):
        peer.receive(frame * 10, 0.0)
    assert_ended(peer)


def test_slow_pings_are_answered_for_ever() -> None:
    peer = server()
    for second in range(5000):
        peer.receive(control(PING, SYN, 0, second), float(second))
        assert headers(flat(peer, float(second)))[-1] == (PING, ACK, 0, second)
        peer.handle_timer(float(second))
        for kind, flags, _, value in headers(flat(peer, float(second))):
            if (kind, flags) == (PING, SYN):
                peer.receive(control(PING, ACK, 0, value), float(second))
    assert peer.closed is None


def test_tiny_frames_do_not_pin_or_multiply_memory() -> None:
    peer = server()
    (stream,) = opened(peer.receive(control(UPDATE, SYN, 1), 0.0))
    for _ in range(20_000):
        peer.receive(data(1, b"x"), 0.0)
    assert stream.buffered == 20_000
    assert len(stream.chunks) <= 3
    record = data(1, bytes(5000)) + data(1, bytes(50_000))
    peer.receive(record, 0.0)
    small, large = list(stream.chunks)[-2:]
    assert memoryview(small).obj is not record
    assert memoryview(large).obj is record


def test_memory_of_a_session_and_of_the_node_is_bounded_by_resets() -> None:
    node = yamux.Budget(600 * KIB)
    a = Session(initiator=False, now=0.0, budget=node, limits=yamux.Limits(memory=300 * KIB))
    b = Session(initiator=False, now=0.0, budget=node)
    (first,) = opened(a.receive(data(1, bytes(256 * KIB), SYN), 0.0))
    events = a.receive(data(3, bytes(100 * KIB), SYN), 0.0)
    (second,) = opened(events)
    assert second.reset == "no memory left for unread data" and first.reset is None
    assert (UPDATE, RST, 3, 0) in headers(flat(a))
    b.receive(data(1, bytes(256 * KIB), SYN), 0.0)
    (third,) = opened(b.receive(data(3, bytes(100 * KIB), SYN), 0.0))
    assert third.reset is not None
    assert node.used == 512 * KIB
    assert len(read_all(a, first)) == 256 * KIB
    b.connection_lost("gone")
    assert node.used == 0


def test_bulk_is_fair_and_control_goes_first() -> None:
    client = Session(initiator=True, now=0.0)
    streams = [client.open_stream(0.0) for _ in range(4)]
    flat(client)
    for stream in streams:
        client.send(stream, [bytes(200 * KIB)])
    small = client.open_stream(0.0)
    client.send(small, [b"small"])
    client.receive(control(PING, SYN, 0, 9), 0.0)
    batch = headers(flat(client, limit=6 * 65536))
    assert batch[:2] == [(UPDATE, SYN, small.id, 0), (PING, ACK, 0, 9)]
    assert [h[2] for h in batch[2:7]] == [*(stream.id for stream in streams), small.id]
    assert sum(h[3] for h in batch) <= 7 * 65536


def test_a_full_queue_says_when_it_has_room() -> None:
    client = Session(initiator=True, now=0.0)
    stream = client.open_stream(0.0)
    client.receive(control(UPDATE, ACK, 1, 16 * MIB), 0.0)
    client.send(stream, [bytes(2 * MIB)])
    assert stream.full
    client.data_to_send(MIB, 0.0)
    assert client.take_events() == []
    client.data_to_send(MIB, 0.0)
    assert client.take_events() == [yamux.StreamWritable(stream)]


def test_own_unanswered_streams_are_limited() -> None:
    client = Session(initiator=True, now=0.0)
    for _ in range(256):
        client.open_stream(0.0)
    assert not client.can_open
    with pytest.raises(ValueError):
        client.open_stream(0.0)
    assert yamux.OpenAllowed() in client.receive(control(UPDATE, ACK, 1), 0.0)
    assert client.open_stream(0.0).id == 513


def test_rtt_is_measured_from_when_the_ping_left() -> None:
    a, b = pair()
    assert a.next_timer() == 0.0
    a.handle_timer(0.0)
    wire = flat(a, 3.0)
    b.receive(wire, 3.1)
    a.receive(flat(b, 3.1), 3.25)
    assert a.rtt == pytest.approx(0.25)
    assert a.next_timer() == 10.0


def drive(session: Session, until: float, alive: bool) -> float | None:
    """Run the timers; when it was declared dead."""
    now = 0.0
    while (when := session.next_timer()) is not None and when <= until:
        now = max(now, when)
        session.handle_timer(now)
        for kind, flags, _, value in headers(flat(session, now)):
            if alive and kind == PING and flags == SYN:
                session.receive(control(PING, ACK, 0, value), now)
        if session.closed:
            return now
    return None


def test_a_frozen_peer_is_noticed_within_20_seconds_and_a_live_one_is_not() -> None:
    assert drive(server(), 3600.0, alive=True) is None
    session = server()
    assert drive(session, 500.0, alive=True) is None
    dead = drive(session, 600.0, alive=False)
    assert dead is not None and dead <= 500.0 + 20.0
    assert session.closed is not None and session.closed.code is None


def test_a_peer_that_only_keeps_its_place_is_let_go_and_one_on_a_slow_line_has_longer() -> None:
    for rate, longest in ((1, 40), (4096, 131)):  # bytes a second, and no ping is ever answered
        session = server()
        session.receive(control(UPDATE, SYN, 1), 0.0)
        (stream,) = session._streams.values()
        for second in range(200):
            session.receive(data(1, bytes(rate)), float(second))
            session.handle_timer(float(second))
            read_all(session, stream)
            flat(session, float(second))
            if session.closed:
                break
        assert session.closed is not None and session.closed.code is None
        assert longest - 11 <= second <= longest


def test_a_closed_stream_is_not_kept_until_its_lingering_would_have_ended() -> None:
    a, b = pair()
    for _ in range(100):
        stream = a.open_stream(0.0)
        (remote,) = opened(pump(a, b))
        b.accept(remote)
        a.release(stream, 0.0)
        b.release(remote, 0.0)
        pump(a, b)
    assert a.streams == b.streams == 0
    assert not a._lingering and not b._lingering


def test_an_update_granted_while_a_body_arrives_counts_what_is_still_to_come() -> None:
    """It did not: the window grew beyond its limit, and the next update was negative, which raised struct.error."""
    session = server()
    (stream,) = opened(session.receive(control(UPDATE, SYN, 1), 0.0))
    session.accept(stream)
    flat(session)
    frame = data(1, bytes(256 * KIB))
    session.receive(frame[: 12 + 140 * KIB], 0.0)
    read_all(session, stream)
    assert headers(flat(session)) == [(UPDATE, 0, 1, 140 * KIB)]
    session.receive(frame[12 + 140 * KIB :], 0.0)
    assert stream.recv_window + stream.buffered == stream.window == 256 * KIB


def test_what_is_dropped_by_a_reset_is_no_end_of_the_stream() -> None:
    a, b = pair()
    stream = a.open_stream(0.0)
    (remote,) = opened(pump(a, b))
    a.send(stream, [b"never read"])
    a.finish(stream)
    pump(a, b)
    assert remote.ended and remote.buffered
    b.reset(remote)
    assert not remote.ended and not remote.buffered and remote.reset is not None
    session = server()
    (lost,) = opened(session.receive(data(1, b"left", SYN), 0.0))
    session.connection_lost("gone")
    session.reset(lost)
    assert not read_all(session, lost)


def test_nothing_happens_after_the_end() -> None:
    a, _ = pair(accept_backlog=1)
    stream = a.open_stream(0.0)
    assert not a.can_open
    a.send(stream, [bytes(2 * MIB)])
    a.finish(stream)
    a.close()
    assert isinstance(a.take_events()[-1], yamux.SessionClosed)
    flat(a)
    a.release(stream, 0.0)
    assert a.take_events() == [] and not a._lingering


def test_needless_grants_are_a_flood_and_a_byte_granted_for_each_byte_read_is_not() -> None:
    client, peer = pair()
    stream = client.open_stream(0.0)
    opened(pump(client, peer))
    client.send(stream, [bytes(5000)])
    flat(client)
    for _ in range(5000):
        client.receive(control(UPDATE, 0, 1, 1), 0.0)
    assert client.closed is None
    for _ in range(5000):
        client.receive(control(UPDATE, 0, 1, 1), 0.0)
    assert_ended(client)


def test_data_is_a_sign_of_life_and_our_own_standstill_is_not_the_peers() -> None:
    session = server()
    session.handle_timer(0.0)
    session.receive(control(UPDATE, SYN, 1), 9.0)
    session.handle_timer(10.0)
    assert session.closed is None
    session.handle_timer(500.0)  # we were stopped: what the peer sent is still in the socket
    assert session.closed is None
    session.handle_timer(510.0)
    assert session.closed is not None


def test_go_away_normal_lets_streams_finish() -> None:
    a, b = pair()
    stream = a.open_stream(0.0)
    (remote,) = opened(pump(a, b))
    b.accept(remote)
    pump(a, b)
    assert yamux.GoAwayReceived() in a.receive(control(GO_AWAY, 0, 0, 0), 0.0)
    assert not a.can_open and a.exhausted and a.closed is None
    a.send(stream, [b"rest"])
    a.finish(stream)
    b.finish(remote)
    pump(a, b)
    assert a.closed is not None and a.closed.by_peer and a.closed.code == 0
    assert read_all(b, remote) == b"rest"


def test_go_away_with_an_error_ends_at_once_and_unread_data_stays() -> None:
    peer = server()
    (stream,) = opened(peer.receive(data(1, b"unread", SYN), 0.0))
    events = peer.receive(control(GO_AWAY, 0, 0, 2), 0.0)
    assert isinstance(events[-1], yamux.SessionClosed) and events[-1].code == 2
    assert yamux.StreamReset(stream, events[-1].reason) in events
    assert read_all(peer, stream) == b"unread"
    assert flat(peer) == b"" and peer.memory == 0


def test_closing_sends_what_was_queued_then_go_away() -> None:
    a, b = pair()
    stream = a.open_stream(0.0)
    (remote,) = opened(pump(a, b))
    a.send(stream, [bytes(200 * KIB)])
    a.finish(stream)
    a.close()
    wire = b""
    while piece := flat(a, limit=65536):
        wire += piece
    assert headers(wire)[-1] == (GO_AWAY, 0, 0, 0)
    b.receive(wire, 0.0)
    assert len(read_all(b, remote)) == 200 * KIB and remote.ended


def test_a_released_stream_is_reset_when_the_peer_never_ends_it() -> None:
    a, b = pair()
    stream = a.open_stream(0.0)
    pump(a, b)
    a.release(stream, 0.0)
    now = 0.0
    while now < 59.0:
        now = max(now, a.next_timer() or 0.0)
        if now >= 60.0:
            break
        a.handle_timer(now)
        pump(a, b, now)
    assert a.streams == 1
    a.handle_timer(60.0)
    assert stream.reset is not None and a.streams == 0

"""Peers that lie, stall and flood: bounded time, bounded memory, and everybody else is served."""

import itertools
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
from trio.testing import MockClock

from p2pnode.errors import RemoteError, StreamClosed, UsageError
from p2pnode.net.dht import DHTConfig
from p2pnode.net.dht_rpc import FRAME_TIME, IDLE_SERVER, MAX_STREAMS_PER_PEER
from p2pnode.net.transport import Stream
from protocols.announce import PROTOCOL
from protocols.announce import messages as m
from protocols.announce.records import RecordLimits
from tests.net.test_dht import SETTLE, swarm, who
from tests.protocols.test_announce_messages import key

Handler = Callable[[Stream], Awaitable[None]]


async def read_frame(stream: Stream, buffer: m.FrameBuffer) -> m.Message | None:
    while (payload := buffer.next_frame()) is None:
        data = await stream.receive_some(65536)
        if not data:
            return None
        buffer.feed(data)
    return m.decode(payload)


async def silent(stream: Stream) -> None:
    await trio.sleep_forever()


async def dribbling(stream: Stream) -> None:
    for byte in m.encode(m.Hello(("/x",) * 16)):
        await trio.sleep(1)
        await stream.send_all(bytes([byte]))


async def gigantic(stream: Stream) -> None:
    await stream.send_all(b"\xff\xff\xff\xff")
    while True:
        await stream.send_all(bytes(65536))


async def garbage(stream: Stream) -> None:
    while True:
        await stream.send_all(b"\x00\x00\x00\x05hello")


async def closing(stream: Stream) -> None:
    await stream.aclose()


def answering(*replies: m.Message) -> Handler:
    """A peer that greets properly and then gives these answers whatever is asked."""

    async def handler(stream: Stream) -> None:
        buffer = m.FrameBuffer()
        while (request := await read_frame(stream, buffer)) is not None:
            if isinstance(request, m.Hello):
                await stream.send_all(m.encode(m.Hello(("/memory/hostile",))))
                continue
            for reply in replies:
                await stream.send_all(m.encode(reply))

    return handler


invented_names = itertools.count()


async def inventing(stream: Stream) -> None:
    """Names unreachable peers and false providers for everything, never the same ones twice."""
    buffer = m.FrameBuffer()
    while (request := await read_frame(stream, buffer)) is not None:
        reply: m.Message = m.Ack(0)
        if isinstance(request, m.Hello):
            reply = m.Hello(("/memory/hostile",))
        elif isinstance(request, m.Find):
            names = [f"nobody{next(invented_names)}" for _ in range(20)]
            invented = tuple(m.PeerInfo(name, ("/memory/nobody",)) for name in names)
            reply = m.Found((invented,) * len(request.keys), invented)
        await stream.send_all(m.encode(reply))


HOSTILE: dict[str, Handler] = {
    "silent": silent,
    "dribbling": dribbling,
    "gigantic": gigantic,
    "garbage": garbage,
    "closing": closing,
    "inventing": inventing,
    "wrong answers": answering(m.Hello(())),
    "more answers than questions": answering(m.Ack(0), m.Ack(0)),
    "too many accepted": answering(m.Ack(4096)),
    "always busy": answering(m.Ack(0, m.Refusal.RATE, 1000)),
    "busy for ever": answering(m.Ack(0, m.Refusal.RATE, m.MAX_RETRY_AFTER)),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_hostile_peers_cost_little(autojump_clock: MockClock, kind: str) -> None:
    async with swarm(8) as net:
        for number in range(6):
            hostile = net.fabric.node(f"hostile{number}")
            hostile.handle(PROTOCOL, HOSTILE[kind])
            for honest in net.nets:
                await honest.connect(hostile.peer_id)
                # Even if they had once behaved well enough to be in every table:
                net.nodes[net.nets.index(honest)]._on_alive(m.PeerInfo(hostile.peer_id, ("/memory/hostile",)))
        keys = [key(number) for number in range(100)]
        net.nodes[0].provide(keys)
        await trio.sleep(120)
        begun = trio.current_time()
        found = await net.nodes[1].find(keys)
        assert trio.current_time() - begun <= 10
        assert all("node0" in who(found, wanted) for wanted in keys)
        assert all(len(providers) <= 64 for providers in found.values())
        if kind == "inventing":
            assert all(found[wanted][0].peer == "node0" for wanted in keys)
        begun = trio.current_time()
        await net.nodes[0].close()
        assert trio.current_time() - begun <= 2


async def test_a_frozen_peer_that_others_name_is_not_waited_for_each_time(autojump_clock: MockClock) -> None:
    async with swarm(4) as net:
        frozen = net.fabric.node("frozen")
        frozen.handle(PROTOCOL, silent)
        for number, honest in enumerate(net.nets):
            await honest.connect(frozen.peer_id)
            net.nodes[number]._on_alive(m.PeerInfo(frozen.peer_id, ("/memory/frozen",)))
        begun = trio.current_time()
        for number in range(200):
            await net.nodes[1].find([key(number)])
        assert trio.current_time() - begun < 5
        # It thaws: it is asked again before long, and at once when it speaks.
        frozen.handle(PROTOCOL, answering(m.Found(((m.PeerInfo("node9"),),), ())))
        net.nodes[1]._on_alive(m.PeerInfo(frozen.peer_id, ("/memory/frozen",)))
        assert "node9" in who(await net.nodes[1].find([key(1)]), key(1))


@pytest.mark.parametrize(
    "data",
    [
        b"\x7f\xff\xff\xff",
        b"\x00\x00\x00\x03abc",
        m.encode(m.Announce((key(1),), 60)),  # before HELLO
        m.encode(m.Hello(())) + m.encode(m.Ack(0)),
        m.encode(m.Hello(())) + m.encode(m.Found((), ())),
        b"\x00\x00\x00\x00",
    ],
)
async def test_what_breaks_the_protocol_ends_the_stream(autojump_clock: MockClock, data: bytes) -> None:
    async with swarm(2) as net:
        stream = await net.nets[0].open_stream("node1", PROTOCOL)
        await stream.send_all(data)
        with pytest.raises(StreamClosed), trio.fail_after(1):
            while await stream.receive_some(65536):
                pass
        assert net.nodes[1].stats().records == 0


async def test_a_request_must_come_whole_within_its_time(autojump_clock: MockClock) -> None:
    async with swarm(2) as net:
        stream = await net.nets[0].open_stream("node1", PROTOCOL)
        begun = trio.current_time()
        with pytest.raises(StreamClosed):
            while True:
                await stream.send_all(b"\x00")
                await trio.sleep(1)
                await stream.send_all(b"\x03")
                for _ in range(100):
                    await stream.send_all(b"x")
                    await trio.sleep(1)
        assert trio.current_time() - begun <= FRAME_TIME + 2


async def test_an_idle_stream_is_closed(autojump_clock: MockClock) -> None:
    async with swarm(2) as net:
        stream = await net.nets[0].open_stream("node1", PROTOCOL)
        begun = trio.current_time()
        assert await stream.receive_some(1) == b""
        assert trio.current_time() - begun == pytest.approx(IDLE_SERVER)


async def test_who_does_not_read_answers_is_left(autojump_clock: MockClock) -> None:
    async with swarm(2) as net:
        stream = await net.nets[0].open_stream("node1", PROTOCOL)
        hello = m.encode(m.Hello(("/" + "x" * 250,) * 8))
        find = m.encode(m.Find((), bytes(32)))
        with pytest.raises(StreamClosed), trio.fail_after(600):
            await stream.send_all(hello)
            while True:
                await stream.send_all(find * 100)


async def test_one_peer_has_few_streams(autojump_clock: MockClock) -> None:
    async with swarm(1) as net:
        other = net.fabric.node("other")
        streams = [await other.open_stream("node0", PROTOCOL) for _ in range(MAX_STREAMS_PER_PEER + 1)]
        await trio.sleep(1)
        served = 0
        for stream in streams:
            try:
                await stream.send_all(m.encode(m.Hello(())))
                served += await read_frame(stream, m.FrameBuffer()) == m.Hello(tuple(net.nets[0].addrs()))
            except StreamClosed:
                pass
        assert served == MAX_STREAMS_PER_PEER


async def test_a_flood_is_bounded_told_to_wait_and_then_banned(autojump_clock: MockClock) -> None:
    async with swarm(3, DHTConfig(records=RecordLimits(per_sender=5000, total=8000))) as net:
        net.nodes[1].provide([key(-1)])
        await trio.sleep(SETTLE)
        flooder = net.fabric.node("flooder")
        stream = await flooder.open_stream("node0", PROTOCOL)
        buffer = m.FrameBuffer()
        await stream.send_all(m.encode(m.Hello(("/memory/flooder",))))
        await read_frame(stream, buffer)
        refusals = []
        with pytest.raises(RemoteError):
            for number in range(200):
                batch = tuple(f"{number}.{index}".encode().ljust(60, b"x") for index in range(4096))
                await stream.send_all(m.encode(m.Announce(batch, m.MAX_TTL)))
                reply = await read_frame(stream, buffer)
                assert isinstance(reply, m.Ack)
                refusals.append(reply.refusal)
        assert refusals[:3] == [None, m.Refusal.FULL, m.Refusal.FULL]
        assert m.Refusal.RATE in refusals
        assert len(refusals) < 60
        assert net.nodes[0].stats().records <= 8000
        with pytest.raises(StreamClosed):  # banned
            again = await flooder.open_stream("node0", PROTOCOL)
            await read_frame(again, m.FrameBuffer())
        net.nodes[2].provide([key(-2)])
        await trio.sleep(SETTLE)
        now = trio.current_time()
        assert [info.peer for info in net.nodes[0].records.providers(key(-1), now)] == ["node1"]
        assert [info.peer for info in net.nodes[0].records.providers(key(-2), now)] == ["node2"]
        await trio.sleep(70)
        again = await flooder.open_stream("node0", PROTOCOL)
        await again.send_all(m.encode(m.Hello(())))
        assert isinstance(await read_frame(again, m.FrameBuffer()), m.Hello)


async def test_nobody_announces_or_withdraws_for_others(autojump_clock: MockClock) -> None:
    async with swarm(3) as net:
        net.nodes[1].provide([key(1)])
        await trio.sleep(SETTLE)
        liar = net.fabric.node("liar")
        stream = await liar.open_stream("node0", PROTOCOL)
        buffer = m.FrameBuffer()
        wire = [m.Hello(()), m.Withdraw((key(1),)), m.Withdraw(None), m.Announce((key(2),), 60)]
        await stream.send_all(b"".join(map(m.encode, wire)))
        for _ in wire:
            assert await read_frame(stream, buffer) is not None
        found = await net.nodes[2].find([key(1), key(2)])
        assert who(found, key(1)) == {"node1"}
        assert who(found, key(2)) == {"liar"}


async def test_a_made_up_peer_id_does_not_end_a_look_up(autojump_clock: MockClock) -> None:
    async with swarm(3) as net:
        net.nodes[1].provide([key(1)])
        await trio.sleep(SETTLE)
        original = net.nets[0].connect

        async def strict(peer: str, addrs: Sequence[str] = ()) -> None:
            if not peer.startswith("node"):
                raise UsageError(f"{peer!r} is not a peer id")  # as the libp2p transport does
            await original(peer, addrs)

        net.nets[0].connect = strict  # type: ignore[method-assign]
        net.nodes[2].table.seen(m.PeerInfo("0OIl", ("/nonsense",)), trio.current_time())
        asked = await net.nodes[0]._lookup(net.nodes[2].table.position, (), None)
        assert {info.peer for info in asked} == {"node1", "node2"}
        assert who(await net.nodes[0].find([key(1)]), key(1)) == {"node1"}

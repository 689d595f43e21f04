"""What may be dialled for a stranger, the messages, and who begins. Real NATs are in tests/nat."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from p2pnode.errors import StreamClosed
from p2pnode.net.identity import Identity, peer_id_of
from p2pnode.net.network import Network
from p2pnode.net.punch import MAX_TARGET_IPS, MAX_TARGETS, hole_punch, receive, targets
from p2pnode.net.relay.wire import MAX_MESSAGE, send_message
from protocols.errors import FrameError
from tests.net.test_network import node, ping

PEER, OTHER = (peer_id_of(bytes([n]) * 32) for n in (1, 2))
OWN = [ipaddress.ip_interface("192.168.1.5/24"), ipaddress.ip_interface("127.0.0.1/8")]


def chosen(*texts: str, lan_outside: bool = False) -> list[str]:
    return [str(address) for address in targets(texts, PEER, OWN, lan_outside)]


def test_only_addresses_that_may_be_the_peers_are_dialled() -> None:
    good = ["/ip4/9.9.9.9/tcp/4747", "/ip4/192.168.1.9/tcp/4747", "/ip4/100.64.3.3/tcp/4747"]
    assert chosen(*good) == good
    assert chosen(f"/ip4/9.9.9.9/tcp/4747/p2p/{PEER}") == ["/ip4/9.9.9.9/tcp/4747"]
    bad = [
        "/ip4/9.9.9.9/tcp/22",
        "/ip4/127.0.0.1/tcp/4747",
        "/ip4/10.0.0.1/tcp/4747",
        "/ip4/192.168.1.5/tcp/4747",
        "/dns4/victim.example/tcp/4747",
        f"/ip4/9.9.9.9/tcp/4747/p2p/{OTHER}",
        f"/ip4/9.9.9.9/tcp/4747/p2p/{OTHER}/p2p-circuit",
        "/ip4/9.9.9.9/udp/4747/quic-v1",
        "nonsense",
    ]
    assert chosen(*bad) == []
    assert chosen("/ip4/10.0.0.1/tcp/4747", lan_outside=True) == ["/ip4/10.0.0.1/tcp/4747"]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1000, 9000)), max_size=100))
def test_a_stranger_cannot_make_us_dial_many(endpoints: list[tuple[int, int]]) -> None:
    found = targets([f"/ip4/9.9.9.{ip}/tcp/{port}" for ip, port in endpoints], PEER, OWN, False)
    assert len(found) <= MAX_TARGETS
    assert len({address.host for address in found}) <= MAX_TARGET_IPS
    assert all(address.port >= 1024 for address in found)


class Bytes:
    """A stream that says `data` and no more, and keeps what it is told."""

    peer = PEER

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.taken = 0
        self.told = b""

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        piece = self.data[self.taken : self.taken + max_bytes]
        self.taken += len(piece)
        return piece

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.told += data


async def encode(kind: int, addrs: Sequence[str] = ()) -> bytes:
    stream = Bytes()
    await send_message(stream, hole_punch(kind, addrs))  # type: ignore[arg-type]
    return stream.told


async def decode(data: bytes, kind: int = HolePunch.CONNECT) -> Sequence[str]:
    return await receive(Bytes(data), kind)  # type: ignore[arg-type]


async def test_messages() -> None:
    addrs = ["/ip4/9.9.9.9/tcp/4747", "/ip6/2001:db8::1/tcp/1"]
    assert await decode(await encode(HolePunch.CONNECT, addrs)) == addrs
    assert (await encode(HolePunch.SYNC)).hex() == "0308ac02"  # as the specification's protobuf has it
    many = [f"/ip4/9.9.9.9/tcp/{port}" for port in range(1, 400)]
    assert len(await decode(await encode(HolePunch.CONNECT, many))) < 30


@pytest.mark.parametrize(
    "data",
    [
        b"\x03\x08\xac\x02",
        b"\x02\xff\xff",
        (MAX_MESSAGE + 1).to_bytes(2, "little"),
        b"\xff\xff\xff\xff\x0f",
        b"\x81" + bytes([MAX_MESSAGE >> 7]),
    ],
)
async def test_malformed_messages_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        await decode(data)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x03\x08"])
async def test_messages_that_break_off(data: bytes) -> None:
    with pytest.raises(StreamClosed):
        await decode(data)


async def test_addresses_that_make_no_sense_are_left_out() -> None:
    body = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[b"\xff\xff", b""]).SerializeToString()
    assert [addr for addr in await decode(bytes([len(body)]) + body) if addr.strip("/")] == []


async def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        here = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return here, await listener.accept()


@pytest.mark.parametrize("listens", [False, True], ids=["both dialled", "the initiator's listener took it"])
async def test_one_connection_comes_of_it_whoever_begins(listens: bool) -> None:
    """Simultaneous open: both sides dialled, one is told to begin. Or only the responder's SYN came through, and
    arrived at the other's listener: both are responders then, and ours has to see it."""

    async def make(network: Network, stream: trio.SocketStream, peer: str, initiator: bool) -> None:
        puncher = network.traversal.puncher
        assert puncher is not None
        await puncher._make(stream, peer, initiator)

    async with node(Identity.generate()) as a, node(Identity.generate()) as b:
        if listens:
            port = int(b.addrs()[0].split("/")[4])
            with trio.fail_after(8):
                await make(a, await trio.open_tcp_stream("127.0.0.1", port), b.peer_id, False)
        else:
            here, there = await socket_pair()
            with trio.fail_after(8):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(make, a, here, b.peer_id, False)
                    nursery.start_soon(make, b, there, a.peer_id, True)
        await ping(a, b)
        await ping(b, a)
        assert len(a.connections()) == len(b.connections()) == 1

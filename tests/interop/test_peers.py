"""Our `Network` and other people's libp2p, dialled and dialling: js-libp2p, kubo (go-libp2p), stock py-libp2p."""

from __future__ import annotations

import os

import pytest
import trio
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID

from p2pnode.errors import PeerUnreachable, StreamClosed
from p2pnode.net.identity import Identity
from tests.interop.link import AGENT, PING, Link, node
from tests.interop.peers.traffic import ABORT, ABORT_AFTER, AFTER_END, ECHO, exchange, exchange_on_all, open_all
from tests.interop.remote import PeerFailed, Remote

pytestmark = pytest.mark.slow

MIB = 1 << 20
IDENTIFY = "/ipfs/id/1.0.0"
AGENTS = {"js": "js-libp2p/3.3.11 ", "kubo": "kubo/0.22.0/", "stock": "py-libp2p/0.8.1"}


async def identify(link: Link) -> Identify:
    """What the peer says of itself. We end our side first, so its answer goes through a half-closed stream."""
    pipe = await link.open(IDENTIFY)
    await pipe.close_write()
    data = b""
    while piece := await pipe.receive_some(1 << 16):
        data += piece
    length, start = 0, 0
    while True:  # unsigned varint
        byte = data[start]
        length |= (byte & 0x7F) << (7 * start)
        start += 1
        if byte < 0x80:
            break
    assert len(data) == start + length
    return Identify.FromString(data[start:])


async def test_both_sides_authenticate_the_other(link: Link) -> None:
    (connection,) = link.net.connections()  # that they saw our id is checked when they dial
    assert connection.peer == link.remote.peer
    assert connection.direction == ("out" if link.we_dialled else "in")
    public_key = deserialize_public_key((await identify(link)).public_key)
    assert str(ID.from_pubkey(public_key)) == link.remote.peer


async def test_another_peer_than_expected_is_refused(remote: Remote) -> None:
    endpoint = remote.addr.split("/p2p/")[0]
    stranger = Identity.generate().peer_id
    async with node() as net:
        with trio.fail_after(20):
            with pytest.raises(PeerUnreachable, match="another peer answers there"):
                await net.connect(stranger, [endpoint])
            assert await net.connect_addr(endpoint) == remote.peer
    async with node() as net:
        with trio.fail_after(50):
            with pytest.raises(PeerFailed):
                await remote.call("connect", addr=f"{net.addrs()[0].split('/p2p/')[0]}/p2p/{stranger}")
        assert not net.connections()


async def test_identify(link: Link) -> None:
    theirs = await identify(link)
    assert {PING, IDENTIFY} <= set(theirs.protocols)
    assert theirs.agent_version.startswith(AGENTS[link.remote.name]), theirs.agent_version
    if link.remote.name != "kubo":  # it shows what it learned to nobody, but opens no stream before it
        ours = await link.remote.call("identify", peer=link.net.peer_id)
        assert ours["agent"] == AGENT
        assert {PING, IDENTIFY, ECHO, AFTER_END, ABORT} <= set(ours["protocols"])


async def test_ping(link: Link) -> None:
    await link.ping()
    if link.remote.name != "kubo":
        await link.remote.call("ping", peer=link.net.peer_id)


async def test_echo_of_64_mib_both_ways_at_once(link: Link) -> None:
    """Both sides send to the other and back over one connection: four times 64 MiB at the same time."""
    pipe = await link.open(ECHO)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: link.remote.call("echo", peer=link.net.peer_id, size=64 * MIB, streams=1))
        await exchange(pipe, 64 * MIB, half_close=link.remote.name != "kubo")
    await pipe.aclose()


async def test_200_streams_at_a_time(link: Link) -> None:
    pipes = await open_all(200, lambda: link.open(ECHO))
    await exchange_on_all(pipes, 40_000, half_close=link.remote.name != "kubo")
    for pipe in pipes:
        await pipe.aclose()
    await link.remote.call("echo", peer=link.net.peer_id, size=40_000, streams=200)
    await link.ping()


async def test_half_close(link: Link) -> None:
    """1 MiB comes back, four windows, after the end of what was sent."""
    if link.remote.name == "kubo":  # joins both directions of a stream, but for the protocols of its own
        assert (await identify(link)).protocols
        await link.remote.call("echo", peer=link.net.peer_id, size=MIB, streams=1)
    else:
        await exchange(await link.open(AFTER_END), MIB, half_close=True)
        await link.remote.call("after_end", peer=link.net.peer_id, size=MIB)
    assert await link.ends.beyond(0) == 1
    assert link.resets.count == 0


async def test_reset_by_us(link: Link) -> None:
    seen = await link.remote.call("resets", seen=-1)
    pipe = await link.open(ECHO)
    await exchange(pipe, ABORT_AFTER, half_close=False)
    await pipe.reset()
    assert await link.remote.call("resets", seen=seen) == seen + 1
    with pytest.raises(StreamClosed):
        await pipe.send_all(b"x")
    assert await link.remote.call("aborted", peer=link.net.peer_id)
    await link.ping()


async def test_reset_by_the_peer(link: Link) -> None:
    await link.remote.call("reset", peer=link.net.peer_id)
    assert await link.resets.beyond(0) == 1
    pipe = await link.open(ABORT)
    block = os.urandom(1 << 16)
    with pytest.raises(StreamClosed):
        while True:
            await pipe.send_all(block)
            await pipe.receive_some(1 << 16)
    await link.ping()

"""Real nodes on loopback, one of them a relay. What needs NATs is in tests/nat."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId, StopMessage

from p2pnode.errors import PeerUnreachable
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.addresses import parse
from p2pnode.net.changes import Change
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.relay.wire import STOP, peer_bytes, receive_message, send_message
from p2pnode.net.transport import receive_exactly
from p2pnode.net.traversal import NatSettings, Wanted
from protocols.relay import RelayLimits, Status
from tests.net.circuits import ECHO, echo, until
from tests.net.test_network import Events, ping

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@asynccontextmanager
async def node(
    *, listen: str | None = LOOPBACK, identity: Identity | None = None, **settings: object
) -> AsyncIterator[Network]:
    async with Network.open(
        identity=identity or Identity.generate(),
        listen=[listen] if listen else [],
        address_book=AddressBook(),
        agent="p2pnode-test/1",
        nat=NatSettings(**settings),  # type: ignore[arg-type]
    ) as network:
        network.handle(ECHO, echo)
        yield network


def circuit_addrs(network: Network) -> list[str]:
    return [addr for addr in network.addrs() if "/p2p-circuit" in addr]


def kinds(network: Network, peer: str) -> list[bool]:
    return sorted(connection.relayed for connection in network.connections() if connection.peer == peer)


async def test_a_private_node_is_reached_through_its_relay_and_the_relay_only() -> None:
    async with (
        node(reachability=Wanted.PUBLIC, serve=RelayLimits()) as r,
        node(listen=None, reachability=Wanted.PRIVATE, relays=(r.addrs()[0],)) as b,
        node(listen=None) as a,
    ):
        await until(lambda: circuit_addrs(b))
        events = Events(a)
        await a.connect(b.peer_id, b.addrs())
        assert await events.next() == ("up", r.peer_id)
        assert await events.next() == ("up", b.peer_id)
        assert kinds(a, b.peer_id) == kinds(b, a.peer_id) == [True]
        [connection] = [each for each in a.connections() if each.peer == b.peer_id]
        assert f"/p2p/{r.peer_id}/p2p-circuit" in connection.addr
        stream = await a.open_stream(b.peer_id, ECHO)
        data = bytes(range(256)) * 4096
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await receive_exactly(stream, len(data)) == data
        await stream.aclose()
        await ping(b, a)
        status = b.traversal.status()
        assert (status["state"], status["relays"]) == ("private", [r.peer_id])
        assert r.traversal.status()["serving"]["circuits"] == 1


@pytest.mark.slow
async def test_a_direct_connection_takes_over_and_the_relayed_one_goes() -> None:
    async with (
        node(reachability=Wanted.PUBLIC, serve=RelayLimits()) as r,
        node(reachability=Wanted.PRIVATE, relays=(r.addrs()[0],)) as b,
        node(listen=None) as a,
    ):
        upgraded: list[str] = []
        a.on_upgrade(upgraded.append)
        await until(lambda: circuit_addrs(b))
        await a.connect(b.peer_id, circuit_addrs(b))  # identify tells the rest
        old = await a.open_stream(b.peer_id, ECHO)
        await until(lambda: upgraded)
        assert upgraded == [b.peer_id]
        assert False in kinds(a, b.peer_id)
        new = await a.open_stream(b.peer_id, ECHO)
        assert not new.relayed  # type: ignore[attr-defined]
        await old.send_all(b"still there")  # nothing is torn from under a stream
        assert await receive_exactly(old, 11) == b"still there"
        await old.aclose()
        await until(lambda: True not in kinds(a, b.peer_id))
        await until(lambda: True not in kinds(b, a.peer_id))
        await new.send_all(b"goes on")
        assert await receive_exactly(new, 7) == b"goes on"


async def test_direct_addresses_are_preferred() -> None:
    async with (
        node(reachability=Wanted.PUBLIC, serve=RelayLimits()) as r,
        node(reachability=Wanted.PRIVATE, relays=(r.addrs()[0],)) as b,
        node(listen=None) as a,
    ):
        await until(lambda: circuit_addrs(b))
        await a.connect(b.peer_id, list(reversed(b.addrs())))
        assert kinds(a, b.peer_id) == [False]
        assert r.peer_id not in {connection.peer for connection in a.connections()}


async def test_another_relay_is_announced_when_one_goes_and_peers_hear_of_it() -> None:
    first, second = Identity.generate(), Identity.generate()
    async with (
        node(reachability=Wanted.PUBLIC, serve=RelayLimits(), identity=second) as r2,
        node(listen=None) as friend,
        node(reachability=Wanted.PUBLIC, serve=RelayLimits(), identity=first) as r1,
    ):
        addrs = (r1.addrs()[0], r2.addrs()[0])
        async with node(reachability=Wanted.PRIVATE, relays=addrs) as b:
            told: list[int] = []
            b.on_addrs(lambda: told.append(1))
            await until(lambda: len(circuit_addrs(b)) == 2)
            await friend.connect(b.peer_id, b.addrs())
            await until(lambda: any("p2p-circuit" in addr for addr in friend.address_book.addrs(b.peer_id)))
            told.clear()
            await r1.disconnect(b.peer_id)
            for listener in list(r1._swarm.listeners.values()):
                await listener.close()
            await until(lambda: [first.peer_id in addr for addr in circuit_addrs(b)] == [False])
            await until(lambda: told)


async def test_whoever_is_told_of_addresses_cannot_end_the_node(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a callback with a bug")

    async with (
        node(reachability=Wanted.PUBLIC, serve=RelayLimits()) as r,
        node(listen=None, reachability=Wanted.PRIVATE, relays=(r.addrs()[0],)) as b,
    ):
        told = trio.Event()
        b.on_addrs(fail)
        b.on_addrs(told.set)
        with trio.fail_after(8):
            await told.wait()
        await ping(b, r)
    assert "a callback with a bug" in caplog.text


async def test_only_relays_that_it_asked_can_bring_circuits() -> None:
    """Any peer can say that it is a relay: its circuits would take the places of those that others need."""

    async def offer(relay: Network, target: Network) -> Status:
        source = peer_bytes(Identity.generate().peer_id)
        with trio.fail_after(5):
            stop = await relay.open_stream(target.peer_id, STOP)
            await send_message(stop, StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=source)))
            answer = await receive_message(stop, StopMessage)
            await stop.reset()
        return Status(answer.status)

    async with (
        node(reachability=Wanted.PUBLIC, serve=RelayLimits()) as r,
        node(reachability=Wanted.PUBLIC, serve=RelayLimits()) as other,
        node(listen=None, reachability=Wanted.PRIVATE, relays=(r.addrs()[0],)) as b,
        node(reachability=Wanted.PUBLIC) as public,
    ):
        await until(lambda: circuit_addrs(b))
        await other.connect(public.peer_id, public.addrs())
        assert await offer(other, public) is Status.PERMISSION_DENIED
        assert await offer(r, b) is Status.OK
        b.traversal.keeper.disable()  # it has found out that it is public
        await b.connect(other.peer_id, other.addrs())
        assert await offer(other, b) is Status.PERMISSION_DENIED
        assert await offer(r, b) is Status.OK


async def test_somebody_else_behind_the_circuit_is_not_taken_for_the_peer() -> None:
    async with (
        node(reachability=Wanted.PUBLIC, serve=RelayLimits()) as r,
        node(listen=None, reachability=Wanted.PRIVATE, relays=(r.addrs()[0],)) as b,
        node(listen=None) as a,
    ):
        await until(lambda: circuit_addrs(b))
        wanted = Identity.generate().peer_id
        with pytest.raises(PeerUnreachable, match="no reservation"):
            await a.connect(wanted, [circuit_addrs(b)[0].rsplit("/p2p/", 1)[0]])


async def test_a_relay_that_is_gone_is_named() -> None:
    relay_id, peer = Identity.generate().peer_id, Identity.generate().peer_id
    async with node(listen=None) as a:
        with pytest.raises(PeerUnreachable, match=relay_id):
            await a.connect(peer, [f"/ip4/127.0.0.1/tcp/1/p2p/{relay_id}/p2p-circuit"])


@pytest.mark.slow
async def test_after_sleep_dead_connections_go_and_the_living_stay(caplog: pytest.LogCaptureFixture) -> None:
    async with node() as a, node() as b, node() as c:
        await a.connect(b.peer_id, b.addrs())
        await a.connect(c.peer_id, c.addrs())
        changes: list[Change] = []
        a.on_change(changes.append)
        [dead] = a.connections_book.of(c.peer_id)
        silent = trio.Event()

        async def freeze(*_: object) -> None:
            await silent.wait()

        with caplog.at_level(logging.INFO):
            c.host.get_network().set_stream_handler(freeze)  # like a peer behind a link that is gone
            a.traversal.moved(Change.RESUMED)
            await until(lambda: dead.is_closed, 10)
        assert changes == [Change.RESUMED]
        assert "did not survive" in caplog.text
        await ping(a, b)
        silent.set()


async def test_peers_say_where_they_see_us() -> None:
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        await until(lambda: a.traversal.observed.observations() and b.traversal.observed.observations())
        [dialled], [listened] = a.traversal.observed.observations(), b.traversal.observed.observations()
        assert str(dialled.seen.ip) == str(dialled.voter) == "127.0.0.1"
        assert (dialled.shared, dialled.inbound) == (False, False)  # nothing lies between, so from any port
        assert str(listened.seen) == b.addrs()[0].split("/p2p/")[0]
        assert (listened.shared, listened.inbound) == (True, True)
        await a.disconnect(b.peer_id)
        await until(lambda: not a.traversal.observed.observations())


async def test_the_latest_connection_carries_new_streams() -> None:
    """A peer that comes back from another address has left a connection behind that only looks alive."""
    async with node() as a, node() as b:
        await a.connect(b.peer_id, b.addrs())
        [old] = a.connections_book.of(b.peer_id)
        new = await a.connector._attempt(parse(b.addrs()[0]).with_peer(None), ID.from_string(b.peer_id))
        assert a.connections_book.of(b.peer_id) == [new, old]
        stream = await a.open_stream(b.peer_id, ECHO)
        assert stream._muxed.muxed_conn is new.muxed_conn  # type: ignore[attr-defined]
        await ping(b, a)

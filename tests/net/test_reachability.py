"""The verdict (pure), and real nodes on loopback that dial each other back."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from p2pnode.net.addressbook import AddressBook
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.reachability import PEER_BURST, State, Vote, dial_back, judge
from protocols import reach
from protocols.reach import Outcome
from tests.net.circuits import until

OWN = [ipaddress.ip_address("192.168.1.5")]
SEEN = "5.5.5.5"


def vote(n: int, reached: bool, *, stranger: bool = True, ip: str = SEEN, port: int = 4747) -> Vote:
    return Vote(f"peer{n}", f"8.8.{n}.0/24", ipaddress.ip_address(ip), port, reached, stranger)


@pytest.mark.parametrize(
    ("votes", "state"),
    [
        ([], State.UNKNOWN),
        ([vote(1, True)], State.PUBLIC),
        ([vote(1, False)], State.PRIVATE),
        ([vote(1, False, stranger=False)], State.PRIVATE),  # not even who we talk to
        ([vote(1, True, stranger=False)], State.UNKNOWN),  # a NAT may let in who we talk to
        ([vote(1, True, stranger=False, ip="192.168.1.5")], State.PUBLIC),  # there is no NAT
        ([vote(1, True), vote(2, True), vote(3, False)], State.PUBLIC),
        ([vote(1, True), vote(2, False), vote(3, False)], State.PRIVATE),
        ([vote(1, True), vote(1, True), vote(2, False), vote(3, False)], State.PRIVATE),  # one network, one voice
        ([vote(1, True, stranger=False), vote(2, False)], State.PRIVATE),
        ([vote(1, True, ip="192.168.1.5"), vote(2, False)], State.PRIVATE),  # neighbours do not speak for the world
        ([vote(1, False), vote(1, True, port=4848)], State.PUBLIC),  # the gateway's port works
    ],
)
def test_the_verdict(votes: list[Vote], state: State) -> None:
    verdict = judge(votes, OWN)
    assert verdict.state is state
    assert verdict.reason
    assert all(
        str(address) in ("/ip4/5.5.5.5/tcp/4747", "/ip4/5.5.5.5/tcp/4848", "/ip4/192.168.1.5/tcp/4747")
        for address in verdict.addrs
    )


def test_only_what_was_reached_is_announced_and_a_failure_names_the_port() -> None:
    verdict = judge([vote(1, False), vote(1, True, port=4848)], OWN)
    assert [str(address) for address in verdict.addrs] == ["/ip4/5.5.5.5/tcp/4848"]
    assert "5.5.5.5 port 4747" in judge([vote(1, False)], OWN).reason


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@asynccontextmanager
async def node(port: int = 0, ip: str = "127.0.0.1", announced: int | None = None) -> AsyncIterator[Network]:
    async with Network.open(
        identity=Identity.generate(),
        listen=[f"/ip4/{ip}/tcp/{port}"],
        address_book=AddressBook(),
        announce=[] if announced is None else [f"/ip4/127.0.0.1/tcp/{announced}"],  # loopback alone is not asked about
        agent="p2pnode-test/1",
    ) as network:
        yield network


async def test_an_open_port_is_found_open_and_a_closed_one_closed() -> None:
    port, closed = free_port(), free_port()
    async with node() as server, node(port, announced=port) as public, node(announced=closed) as private:
        for each in (public, private):
            await each.connect(server.peer_id, server.addrs())
        await until(lambda: public.traversal.verdict.state is State.PUBLIC)
        await until(lambda: private.traversal.verdict.state is State.PRIVATE)
        assert [str(address) for address in public.traversal.verdict.addrs] == [f"/ip4/127.0.0.1/tcp/{port}"]
        assert private.traversal.verdict.voters == (server.peer_id,)
        assert str(closed) in private.traversal.status()["reason"]
        assert {connection.peer for connection in server.connections()} == {public.peer_id, private.peer_id}


async def test_a_third_party_at_another_ip_does_the_dial() -> None:
    port = free_port()
    async with node() as server, node(ip="127.0.0.2") as third, node(port, announced=port) as asker:
        await server.connect(third.peer_id, third.addrs())
        await until(lambda: server.speaks(third.peer_id, reach.PROTOCOL))
        await asker.connect(server.peer_id, server.addrs())
        await until(lambda: asker.traversal.verdict.state is State.PUBLIC)
        assert list(third.traversal.reachability._buckets) == [server.peer_id]
        assert [connection.peer for connection in asker.connections()] == [server.peer_id]


async def test_neighbours_are_heard_until_somebody_from_farther_away_comes() -> None:
    """The verdict of the LAN is no reason not to ask the first peer of the world outside."""
    assert judge([vote(1, True, ip="192.168.1.5")], OWN).distance > judge([vote(1, True)], OWN).distance
    async with node() as server, node(announced=free_port()) as asker:
        reachability = asker.traversal.reachability
        lan = judge([vote(1, True, ip="192.168.1.5")], OWN)
        await asker.connect(server.peer_id, server.addrs())
        await until(lambda: asker.traversal.verdict.state is State.PRIVATE)
        reachability.decide(replace(lan, distance=4))
        reachability.consider(server.peer_id)
        await until(lambda: asker.traversal.verdict.state is State.PRIVATE)


async def ask(network: Network, peer: str, request: reach.Message) -> reach.Result:
    answer = await network.traversal.reachability._exchange(peer, request)
    assert isinstance(answer, reach.Result)
    return answer


async def test_nobody_is_dialled_for_others_beyond_the_limits() -> None:
    nonce = secrets.token_bytes(32)
    async with node() as server, node() as asker:
        await asker.connect(server.peer_id, server.addrs())
        outcomes = [
            (await ask(asker, server.peer_id, reach.Forward(ipaddress.ip_address(ip).packed, port, nonce))).outcome
            for ip, port in (("127.0.0.1", 80), ("10.255.255.1", 4747))
        ]
        assert outcomes == [Outcome.REFUSED] * 2  # a port of the system, somebody's LAN
        closed = reach.Dial(free_port(), nonce)
        outcomes = [(await ask(asker, server.peer_id, closed)).outcome for _ in range(PEER_BURST + 2)]
        assert outcomes[0] is Outcome.CLOSED
        assert outcomes[-1] is Outcome.REFUSED


async def test_a_nonce_nobody_waits_for_gets_no_answer() -> None:
    async with node() as target:
        port = int(target.addrs()[0].split("/")[4])
        with trio.fail_after(5):
            assert await dial_back("127.0.0.1", port, secrets.token_bytes(32)) is Outcome.STRANGER
        assert target.connections() == []


async def test_a_server_that_lies_is_not_believed() -> None:
    """It says that it reached us, but nothing came."""
    port = free_port()
    async with AsyncExitStack() as stack:
        liar = await stack.enter_async_context(node())
        asker = await stack.enter_async_context(node(announced=port))

        async def lie(stream: object) -> None:
            from p2pnode.net.reachability import _receive

            await _receive(stream)  # type: ignore[arg-type]
            await stream.send_all(reach.encode(reach.Result(Outcome.REACHED, bytes([127, 0, 0, 1]))))  # type: ignore[attr-defined]
            asked.set()

        asked = trio.Event()
        liar.handle(reach.PROTOCOL, lie)
        await asker.connect(liar.peer_id, liar.addrs())
        with trio.fail_after(8):
            await asked.wait()
            await trio.testing.wait_all_tasks_blocked(0.2)
        assert asker.traversal.verdict.state is State.UNKNOWN
        assert asker.traversal.verdict.addrs == ()

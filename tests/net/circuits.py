"""Nodes on loopback, with a relay between them; they leave alone what they are not asked to do across NATs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing

from p2pnode.net.addressbook import AddressBook
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.relay.client import accept_circuits
from p2pnode.net.relay.server import RelayServer
from p2pnode.net.transport import Stream, receive_exactly
from p2pnode.net.traversal import NatSettings, Wanted
from protocols.relay import RelayLimits

ECHO = "/test/echo/1"
AGENT = "p2pnode-test/1"
PASSIVE = NatSettings(reachability=Wanted.PUBLIC, punch=False)


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 16):
        await stream.send_all(data)


def anywhere(relay: str) -> bool:
    return True


@asynccontextmanager
async def node(identity: Identity | None = None, listen: str | None = "/ip4/127.0.0.1/tcp/0") -> AsyncIterator[Network]:
    async with Network.open(
        identity=identity or Identity.generate(),
        listen=[listen] if listen else [],
        address_book=AddressBook(),
        agent=AGENT,
        nat=PASSIVE,
    ) as network:
        network.handle(ECHO, echo)
        accept_circuits(network, network.connector.accept_circuit, anywhere)  # tests reserve without a keeper
        yield network


@asynccontextmanager
async def relay_node(
    limits: RelayLimits | None = None, listen: str = "/ip4/127.0.0.1/tcp/0", identity: Identity | None = None
) -> AsyncIterator[tuple[Network, RelayServer]]:
    identity = identity or Identity.generate()
    async with node(identity, listen) as network, trio.open_nursery() as nursery:
        server = RelayServer(network, limits or RelayLimits(), identity)
        nursery.start_soon(server.run)
        await trio.testing.wait_all_tasks_blocked(0.001)
        yield network, server
        nursery.cancel_scope.cancel()


async def connect_through(network: Network, relay: Network, target: Network | str) -> None:
    """Have a connection to `target`, a node or a peer id, through `relay`."""
    peer = target if isinstance(target, str) else target.peer_id
    await network.connect(peer, [f"{relay.addrs()[0]}/p2p-circuit"])


async def echo_through(source: Network, target: Network, data: bytes = b"ping") -> None:
    with trio.fail_after(10):
        stream = await source.open_stream(target.peer_id, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await receive_exactly(stream, len(data)) == data
        await stream.aclose()


async def until(condition: Callable[[], object], seconds: float = 8) -> None:
    """Wait for what another node's tasks do."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)

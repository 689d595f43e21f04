"""Peers that abuse a relay; run on hosts of the lab by test_abuse.py, one JSON line for each thing worth telling.

    hostile.py reserve RELAY COUNT    so many peers ask for a reservation each, and stay connected whatever the answer
    hostile.py hold RELAY COUNT       one peer opens so many circuits to another, and leaves them idle
    hostile.py flood RELAY CIRCUITS   one peer sends to another as fast as it can through so many circuits, and dials
                                      again when one is cut

RELAY is its multiaddress with /p2p/<id>. They stay until they are killed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import StopMessage

from p2pnode.errors import NodeError, RelayRefused
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.addresses import parse
from p2pnode.net.hardening import LIBRARY_ERRORS
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.relay.client import dial, reserve
from p2pnode.net.relay.wire import STOP, network_stream, receive_message, send_message, stop_status
from p2pnode.net.transport import Stream
from p2pnode.net.traversal import NatSettings, Wanted
from protocols.relay import Status

AT_ONCE = 8
CHUNK = bytes(1 << 16)


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


@asynccontextmanager
async def peer(relay: str) -> AsyncIterator[Network]:
    """A peer that is connected to the relay and does nothing of its own accord."""
    settings = NatSettings(reachability=Wanted.PUBLIC, punch=False)
    async with Network.open(
        identity=Identity.generate(), listen=[], address_book=AddressBook(), agent="hostile/1", nat=settings
    ) as network:
        await network.connect_addr(relay)
        yield network


async def reserve_many(relay: str, relay_id: str, count: int) -> None:
    answers: Counter[str] = Counter()
    turns = trio.CapacityLimiter(AT_ONCE)

    async def one() -> None:
        async with turns:
            stack = AsyncExitStack()
            try:
                network = await stack.enter_async_context(peer(relay))
                await reserve(network, relay_id)
                answers["granted"] += 1
            except RelayRefused:
                answers["refused"] += 1
            except (NodeError, *LIBRARY_ERRORS):
                answers["failed"] += 1
        if sum(answers.values()) == count:
            tell(asked=count, granted=answers["granted"], refused=answers["refused"], failed=answers["failed"])
        try:
            await trio.sleep_forever()
        finally:
            await stack.aclose()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)


@asynccontextmanager
async def listener(relay: str, relay_id: str, on_bytes: Callable[[int], None]) -> AsyncIterator[str]:
    """A peer with a reservation that takes every circuit and swallows what comes; its id."""

    async def swallow(stream: Stream) -> None:
        stop = network_stream(stream)
        await receive_message(stop, StopMessage)
        await send_message(stop, stop_status(Status.OK))
        while data := await stop.receive_some(1 << 20):
            on_bytes(len(data))

    async with peer(relay) as network:
        network.handle(STOP, swallow)
        await reserve(network, relay_id)
        yield network.peer_id


async def hold(relay: str, relay_id: str, count: int) -> None:
    answers: Counter[str] = Counter()
    async with listener(relay, relay_id, lambda size: None) as target, peer(relay) as network:
        circuits = []
        for _ in range(count):
            try:
                circuits.append(await dial(network, relay_id, target))
                answers["opened"] += 1
            except RelayRefused:
                answers["refused"] += 1
            except NodeError:
                answers["failed"] += 1
        tell(asked=count, opened=answers["opened"], refused=answers["refused"], failed=answers["failed"])
        await trio.sleep_forever()


async def flood(relay: str, relay_id: str, circuits: int) -> None:
    passed = dials = 0

    def count(size: int) -> None:
        nonlocal passed
        passed += size

    async def one(network: Network, target: str) -> None:
        nonlocal dials
        while True:
            try:
                circuit = await dial(network, relay_id, target)
                dials += 1
                while True:
                    await circuit.write(CHUNK)
            except (NodeError, *LIBRARY_ERRORS):
                await trio.sleep(0.1)

    async with (
        listener(relay, relay_id, count) as target,
        peer(relay) as network,
        trio.open_nursery() as nursery,
    ):
        for _ in range(circuits):
            nursery.start_soon(one, network, target)
        began = trio.current_time()
        while True:
            await trio.sleep(0.5)
            tell(seconds=round(trio.current_time() - began, 1), passed=passed, dials=dials)


def main() -> None:
    what, relay, count = sys.argv[1:]
    relay_id = parse(relay).peer
    assert relay_id is not None
    trio.run({"reserve": reserve_many, "hold": hold, "flood": flood}[what], relay, relay_id, int(count))


if __name__ == "__main__":
    main()

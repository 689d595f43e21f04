"""Circuit Relay v2 with other implementations: theirs for two of ours, ours for theirs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
import trio

from p2pnode.net.network import Network
from p2pnode.net.relay.client import dial, reserve
from p2pnode.net.transport import Stream
from protocols.relay import RelayLimits
from tests.interop import installation
from tests.interop.link import OurPipe
from tests.interop.peers.traffic import ECHO, HANDLERS, exchange
from tests.interop.remote import Remote
from tests.net.circuits import connect_through, node, relay_node

pytestmark = pytest.mark.slow

MIB = 1 << 20
TIMEOUT = 60.0  # s


@contextlib.asynccontextmanager
async def process(name: str, command: Sequence[str]) -> AsyncIterator[Remote]:
    remote = Remote(name, command)
    try:
        await remote.ensure()
        yield remote
    finally:
        remote.stop()


async def serve_echo(stream: Stream) -> None:
    await HANDLERS[ECHO](OurPipe(stream))


async def echo_through(source: Network, target: str, size: int, *, half_close: bool) -> None:
    stream = await source.open_stream(target, ECHO)
    assert stream.relayed  # type: ignore[attr-defined]
    pipe = OurPipe(stream)
    await exchange(pipe, size, half_close=half_close)
    await pipe.aclose()


async def test_js_libp2p_as_relay_for_two_of_ours() -> None:
    command = installation.js_libp2p()
    with trio.fail_after(TIMEOUT):
        async with (
            process("js", [*command, "relay"]) as relay,
            node(listen=None) as target,
            node(listen=None) as source,
        ):
            target.handle(ECHO, serve_echo)
            for network in (target, source):
                await network.connect(relay.peer, [relay.addr])
            reservation = await reserve(target, relay.peer)
            assert reservation.circuit_addrs() == [f"{relay.addr}/p2p-circuit"]
            assert reservation.expires - trio.current_time() > 600
            assert not reservation.limit
            await source.connect(target.peer_id, reservation.circuit_addrs())
            await echo_through(source, target.peer_id, 16 * MIB, half_close=True)


async def test_ours_as_relay_for_two_js_libp2p_nodes() -> None:
    command = installation.js_libp2p()
    with trio.fail_after(TIMEOUT):
        async with (
            relay_node() as (relay, relaying),
            process("js", [*command, "relayed"]) as target,
            process("js", [*command, "relayed"]) as source,
            node(listen=None) as ours,
        ):
            addr = await target.call("reserve", relay=relay.addrs()[0])
            assert addr == f"{relay.addrs()[0]}/p2p-circuit/p2p/{target.peer}"
            assert relaying.statistics().reservations == 1
            assert await source.call("connect", addr=addr) == target.peer
            await source.call("echo", peer=target.peer, size=16 * MIB, streams=2)
            assert relaying.statistics().bytes_relayed > 64 * MIB
            assert relaying.statistics().circuits == 1
            await target.call("echo", peer=source.peer, size=MIB, streams=1)
            # And between one of theirs and one of ours, both ways.
            ours.handle(ECHO, serve_echo)
            await ours.connect(target.peer, [addr])
            await echo_through(ours, target.peer, MIB, half_close=True)
            await reserve(ours, relay.peer_id)
            assert (
                await source.call("connect", addr=f"{relay.addrs()[0]}/p2p-circuit/p2p/{ours.peer_id}") == ours.peer_id
            )
            await source.call("echo", peer=ours.peer_id, size=MIB, streams=1)


async def test_limits_of_ours_are_understood_by_js_libp2p() -> None:
    command = installation.js_libp2p()
    with trio.fail_after(TIMEOUT):
        async with (
            relay_node(RelayLimits(circuit_bytes=64 * MIB, circuit_seconds=600)) as (relay, _),
            process("js", [*command, "relayed"]) as target,
            node(listen=None) as source,
        ):
            await target.call("reserve", relay=relay.addrs()[0])
            await source.connect(relay.peer_id, relay.addrs())
            raw = await dial(source, relay.peer_id, target.peer)
            assert (raw.limit.bytes, raw.limit.seconds) == (64 * MIB, 600)
            await raw.abort()


async def test_kubo_behind_a_relay_of_ours() -> None:
    command = installation.kubo()
    with trio.fail_after(TIMEOUT):
        async with (
            relay_node() as (relay, relaying),
            process("kubo", [*command, relay.addrs()[0]]) as kubo,
            node(listen=None) as source,
        ):
            while not relaying.statistics().reservations:  # it asks by itself
                await trio.sleep(0.05)
            await connect_through(source, relay, kubo.peer)
            await echo_through(source, kubo.peer, 16 * MIB, half_close=False)
            assert relaying.statistics().bytes_relayed > 32 * MIB


async def test_kubo_dials_through_a_relay_of_ours() -> None:
    command = installation.kubo()
    with trio.fail_after(TIMEOUT):
        async with (
            relay_node() as (relay, relaying),
            process("kubo", [*command, relay.addrs()[0]]) as kubo,
            node(listen=None) as target,
        ):
            target.handle(ECHO, serve_echo)
            await target.connect(relay.peer_id, relay.addrs())
            await reserve(target, relay.peer_id)
            addr = f"{relay.addrs()[0]}/p2p-circuit/p2p/{target.peer_id}"
            assert await kubo.call("connect", addr=addr) == target.peer_id
            await kubo.call("echo", peer=target.peer_id, size=MIB, streams=1)
            assert relaying.statistics().circuits == 1

"""Keeping reservations at relays on loopback."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing

from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.relay import reservations
from p2pnode.net.relay.client import Reservation, reserve
from p2pnode.net.relay.reservations import Candidate, ReservationKeeper
from p2pnode.net.relay.server import RelayServer
from protocols.relay import RelayLimits
from tests.net.circuits import echo_through, node, relay_node, until


class Kept:
    """A keeper with what it reported."""

    def __init__(self, network: Network, relays: list[Network]) -> None:
        self.candidates: list[Candidate] = [(relay.peer_id, relay.addrs()) for relay in relays]
        self.changes = 0
        self.keeper = ReservationKeeper(
            network, lambda: self.candidates, on_change=self._count, chance=random.Random(1)
        )

    def _count(self) -> None:
        self.changes += 1

    def held(self) -> set[str]:
        return {reservation.relay for reservation in self.keeper.statistics().held}

    async def hold(self, relays: set[str], seconds: float = 5) -> None:
        await until(lambda: self.held() == relays, seconds)


@asynccontextmanager
async def keeping(network: Network, *relays: Network) -> AsyncIterator[Kept]:
    kept = Kept(network, list(relays))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.keeper.run)
        yield kept
        nursery.cancel_scope.cancel()


async def test_two_relays_are_kept_while_private() -> None:
    async with (
        relay_node() as (first, _),
        relay_node() as (second, _),
        relay_node() as (third, at_third),
        node(listen=None) as private,
        keeping(private, first, second, third) as kept,
    ):
        assert not kept.keeper.statistics().waiting
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert kept.keeper.circuit_addrs() == []
        kept.keeper.enable()
        await kept.hold({first.peer_id, second.peer_id})
        assert kept.changes >= 1
        addrs = [f"{relay.addrs()[0]}/p2p-circuit" for relay in (first, second)]
        assert sorted(kept.keeper.circuit_addrs()) == sorted(addrs)
        assert at_third.statistics().reservations == 0
        kept.keeper.disable()
        assert kept.keeper.circuit_addrs() == []
        kept.keeper.enable()
        await kept.hold({first.peer_id, second.peer_id})


async def test_a_relay_that_goes_is_replaced_at_once() -> None:
    async with (
        relay_node() as (second, _),
        relay_node() as (third, _),
        node(listen=None) as private,
        keeping(private) as kept,
    ):
        async with relay_node() as (first, _):
            kept.candidates = [(relay.peer_id, relay.addrs()) for relay in (first, second, third)]
            kept.keeper.enable()
            await kept.hold({first.peer_id, second.peer_id})
            changes = kept.changes
        await kept.hold({second.peer_id, third.peer_id}, 2)
        assert kept.changes > changes
        assert "lost" in kept.keeper.statistics().failures[first.peer_id]


async def test_with_no_other_relay_it_waits_until_one_returns(caplog: pytest.LogCaptureFixture) -> None:
    identity = Identity.generate()
    async with node(listen=None) as private, keeping(private) as kept:
        async with relay_node(identity=identity) as (relay, _):
            kept.candidates = [(relay.peer_id, relay.addrs())]
            listen = relay.addrs()[0].split("/p2p/")[0]
            kept.keeper.enable()
            await kept.hold({relay.peer_id})
        await until(lambda: kept.keeper.statistics().waiting)
        assert "no relay is left" in caplog.text
        async with relay_node(listen=listen, identity=identity) as (relay, relaying):
            await kept.hold({relay.peer_id}, 8)
            await until(lambda: relaying.statistics().reservations == 1)
            assert not kept.keeper.statistics().failures


async def test_reservations_are_renewed_at_half_their_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "MIN_RENEW", 0.05)
    times = []

    async def counted(network: Network, relay: str) -> Reservation:
        times.append(trio.current_time())
        return await reserve(network, relay)

    monkeypatch.setattr(reservations, "reserve", counted)
    async with (
        relay_node(RelayLimits(reservation_ttl=3.0)) as (relay, relaying),
        node(listen=None) as private,
        keeping(private, relay) as kept,
    ):
        kept.keeper.enable()
        await kept.hold({relay.peer_id})
        await until(lambda: len(times) >= 3, 8)
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert all(0.8 < gap < 1.6 for gap in gaps), gaps  # the relay rounds the expiry down to a second
        assert relaying.statistics().reservations == 1


async def test_refusals_dead_addresses_and_silence_do_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "SLOW_ATTEMPT", 0.2)
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = silent[0].socket.getsockname()[1]
    async with (
        relay_node(RelayLimits(max_reservations=0)) as (full, _),
        node() as no_relay,
        relay_node() as (first, _),
        relay_node() as (second, _),
        node(listen=None) as private,
        keeping(private, full, no_relay, first, second) as kept,
    ):
        dead, mute = Identity.generate().peer_id, Identity.generate().peer_id
        kept.candidates[:0] = [(dead, ["/ip4/127.0.0.1/tcp/1"]), (mute, [f"/ip4/127.0.0.1/tcp/{port}"])]
        kept.candidates.insert(0, (private.peer_id, []))
        kept.keeper.enable()
        await kept.hold({first.peer_id, second.peer_id}, 4)
        failures = kept.keeper.statistics().failures
        assert "takes no more" in failures[full.peer_id]
        assert "does not speak" in failures[no_relay.peer_id]
        assert "refused" in failures[dead]
        assert set(kept.keeper.statistics().trying) <= {mute}
    await silent[0].aclose()


async def test_circuits_are_admitted_for_as_long_as_a_relay_may_bring_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "GRACE", 0.2)
    async with (
        relay_node(RelayLimits(reservation_ttl=2.0)) as (relay, _),
        node(listen=None) as private,
        keeping(private, relay) as kept,
    ):
        keeper, peer = kept.keeper, relay.peer_id
        assert not keeper.admits(peer)
        keeper.enable()
        await until(lambda: peer in keeper.statistics().trying or bool(kept.held()))
        assert keeper.admits(peer)  # the relay may know of the place before we do
        await kept.hold({peer})
        [held] = keeper.statistics().held
        await until(lambda: keeper.statistics().held != (held,))  # renewed
        assert keeper.admits(peer) and not keeper.admits(private.peer_id)
        keeper.disable()
        assert kept.held() == set() and keeper.admits(peer)  # neither the relay knows nor who has the address
        await until(lambda: not keeper.admits(peer))
        assert trio.current_time() > held.expires


async def test_poking_tries_again_but_not_where_it_was_refused() -> None:
    identity = Identity.generate()
    async with (
        relay_node(RelayLimits(max_reservations=0)) as (full, at_full),
        node(identity) as later_a_relay,
        node(listen=None) as private,
        keeping(private, full, later_a_relay) as kept,
    ):
        kept.keeper.enable()
        await until(lambda: len(kept.keeper.statistics().failures) == 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(RelayServer(later_a_relay, RelayLimits(), identity).run)
            with trio.fail_after(5):
                while not kept.held():
                    kept.keeper.poke()
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert sum(at_full.statistics().refused.values()) == 1


async def test_a_node_behind_kept_relays_is_reached_through_them() -> None:
    async with (
        relay_node() as (relay, _),
        node(listen=None) as private,
        node(listen=None) as source,
        keeping(private, relay) as kept,
    ):
        kept.keeper.enable()
        await kept.hold({relay.peer_id})
        await source.connect(private.peer_id, kept.keeper.circuit_addrs())
        await echo_through(source, private)

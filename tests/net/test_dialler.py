from __future__ import annotations

import ipaddress
import math

import pytest
import trio
from trio.testing import MockClock

from p2pnode.net.addresses import Address, parse
from p2pnode.net.dialler import (
    ATTEMPT_TIMEOUT,
    DIAL_TIMEOUT,
    RELAY_DELAY,
    STAGGER,
    AttemptFailed,
    DialFailed,
    candidates,
    circuits,
    race,
)
from p2pnode.net.identity import peer_id_of

ALICE, BOB = (peer_id_of(bytes([n]) * 32) for n in (1, 2))
OWN = [ipaddress.ip_interface("127.0.0.1/8"), ipaddress.ip_interface("192.168.5.7/24")]
FIVE = [parse(f"/ip4/192.0.2.{n}/tcp/1") for n in range(1, 6)]


def ordered(*texts: str, peer: str | None = ALICE, listening: tuple[tuple[str, int], ...] = ()) -> list[str]:
    return [str(address) for address in candidates(texts, peer, OWN, listening)]


def test_near_addresses_come_first_and_the_given_order_stays_within_a_class() -> None:
    assert ordered(
        "/dns4/a.example/tcp/1",
        "/ip4/9.9.9.9/tcp/1",
        "/ip4/8.8.8.8/tcp/1",
        "/ip4/10.0.0.1/tcp/1",
        "/ip4/192.168.5.9/tcp/1",
        "/ip4/127.0.0.1/tcp/1",
    ) == [
        "/ip4/192.168.5.9/tcp/1",
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/10.0.0.1/tcp/1",
        "/ip4/9.9.9.9/tcp/1",
        "/ip4/8.8.8.8/tcp/1",
        "/dns4/a.example/tcp/1",
    ]


def test_useless_addresses_are_left_out() -> None:
    assert ordered(
        "/ip4/192.168.5.7/tcp/4001",  # our own listener
        "/ip4/192.168.5.7/tcp/4002",  # another node on this machine
        f"/ip4/192.168.5.7/tcp/4002/p2p/{ALICE}",  # the same once more
        f"/ip4/9.9.9.9/tcp/1/p2p/{BOB}",
        f"/ip4/9.9.9.9/tcp/1/p2p/{BOB}/p2p-circuit/p2p/{ALICE}",
        "/ip4/9.9.9.9/udp/1/quic-v1",
        "",
        listening=(("192.168.5.7", 4001),),
    ) == ["/ip4/192.168.5.7/tcp/4002"]


def test_the_number_of_candidates_is_bounded() -> None:
    assert len(ordered(*(f"/ip4/9.9.9.9/tcp/{port}" for port in range(1, 500)))) == 24


async def hang(address: Address) -> str:
    await trio.sleep(math.inf)
    raise AssertionError


async def test_a_dead_first_address_costs_one_stagger(autojump_clock: MockClock) -> None:
    async def attempt(address: Address) -> str:
        if address == FIVE[0]:
            return await hang(address)
        await trio.sleep(0.01)
        return "up"

    start = trio.current_time()
    assert await race(FIVE, attempt) == (FIVE[1], "up")
    assert trio.current_time() - start == pytest.approx(STAGGER + 0.01)


async def test_a_refused_address_costs_nothing(autojump_clock: MockClock) -> None:
    failures = []

    async def attempt(address: Address) -> str:
        if address != FIVE[4]:
            raise AttemptFailed("connection refused")
        return "up"

    start = trio.current_time()
    assert await race(FIVE, attempt, lambda *failure: failures.append(failure)) == (FIVE[4], "up")
    assert trio.current_time() == start
    assert failures == [(address, "connection refused") for address in FIVE[:4]]


async def test_losers_are_cancelled(autojump_clock: MockClock) -> None:
    cancelled = []

    async def attempt(address: Address) -> str:
        if address == FIVE[2]:
            return "up"
        try:
            return await hang(address)
        except trio.Cancelled:
            cancelled.append(address)
            raise

    assert (await race(FIVE, attempt))[0] == FIVE[2]
    assert cancelled == FIVE[:2] or cancelled == FIVE[1::-1]


async def test_all_dead_ends_in_time_with_every_reason(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    with pytest.raises(DialFailed) as caught:
        await race(FIVE, hang)
    assert trio.current_time() - start <= ATTEMPT_TIMEOUT + 4 * STAGGER + 0.01
    assert [address for address, _ in caught.value.reasons] == FIVE
    assert all(reason == "no answer within 5 s" for _, reason in caught.value.reasons)


async def test_many_dead_addresses_end_at_the_overall_limit(autojump_clock: MockClock) -> None:
    many = [parse(f"/ip4/192.0.2.1/tcp/{port}") for port in range(1, 100)]
    start = trio.current_time()
    with pytest.raises(DialFailed) as caught:
        await race(many, hang)
    assert trio.current_time() - start == pytest.approx(DIAL_TIMEOUT)
    assert len(caught.value.reasons) == 99


async def test_no_address_fails_at_once(autojump_clock: MockClock) -> None:
    with pytest.raises(DialFailed):
        await race([], hang)


def circuit(relay: str, host: str = "9.9.9.9", peer: str = "") -> str:
    return f"/ip4/{host}/tcp/1/p2p/{relay}/p2p-circuit{peer and f'/p2p/{peer}'}"


def test_circuits_one_for_each_relay() -> None:
    relays = [peer_id_of(bytes([n]) * 32) for n in range(3, 10)]
    found = circuits([circuit(relay, peer=ALICE) for relay in relays], ALICE, BOB)
    assert [address.relay for address in found] == relays[:4]
    assert {address.peer for address in found} == {None}
    assert circuits([circuit(relays[0]), circuit(relays[0], "8.8.8.8")], ALICE, BOB) == [parse(circuit(relays[0]))]


def test_circuits_that_lead_nowhere_are_left_out() -> None:
    relay = peer_id_of(bytes([3]) * 32)
    texts = [circuit(BOB), circuit(ALICE), circuit(relay, peer=BOB), "/ip4/9.9.9.9/tcp/1", "nonsense"]
    assert circuits(texts, ALICE, BOB) == []


async def test_relays_wait_for_direct_addresses_a_little(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    started: dict[Address, float] = {}
    relayed = parse(circuit(BOB))

    async def attempt(address: Address) -> str:
        started[address] = trio.current_time() - began
        return await hang(address) if address.relay is None else "relayed"

    assert await race([*FIVE, relayed], attempt) == (relayed, "relayed")
    assert started[relayed] == pytest.approx(RELAY_DELAY)
    assert FIVE[0] in started


async def test_a_quick_direct_connection_spares_the_relay(autojump_clock: MockClock) -> None:
    async def attempt(address: Address) -> str:
        assert address.relay is None
        await trio.sleep(RELAY_DELAY * 0.9)
        return "direct"

    assert await race([FIVE[0], parse(circuit(BOB))], attempt) == (FIVE[0], "direct")


async def test_relays_start_at_once_when_nothing_else_is_left(autojump_clock: MockClock) -> None:
    began = trio.current_time()

    async def attempt(address: Address) -> str:
        if address.relay is None:
            raise AttemptFailed("refused")
        return "relayed"

    await race([FIVE[0], parse(circuit(BOB))], attempt)
    assert trio.current_time() - began < 0.01

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
    STAGGER,
    AttemptFailed,
    DialFailed,
    candidates,
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

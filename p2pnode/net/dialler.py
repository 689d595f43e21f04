"""Which of a peer's addresses to dial, in which order, and the race between them.

The race is Happy Eyeballs (RFC 8305) as go-libp2p's dial ranker uses it: a new attempt every 250 ms or as soon as one
failed, first success wins, the others are cancelled. One dead address in front of a good one costs a quarter of a
second, not a connect time-out. Relays have a lane of their own that starts after RELAY_DELAY: a direct connection that
comes up quickly is spared the relay, one that never comes up costs no more than the delay.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import trio

from p2pnode.errors import UsageError
from p2pnode.net.addresses import Address, Interface, Scope, parse, scope_of

T = TypeVar("T")

STAGGER = 0.25  # s between attempts: RFC 8305 section 8 recommends 250 ms
RELAY_DELAY = 0.25  # s that direct addresses are ahead of relays; go-libp2p waits 250 ms as well
ATTEMPT_TIMEOUT = 5.0  # s for one address: connect, handshake and multiplexer
DIAL_TIMEOUT = 10.0  # s for a peer, however many addresses it has
MAX_CANDIDATES = 24  # more could not be started within DIAL_TIMEOUT with time left to answer
MAX_CIRCUITS = 4  # relays tried for one peer; it has reservations on two


class AttemptFailed(Exception):
    """One address did not work; `str()` is the reason in a few words."""


class DialFailed(Exception):
    """No address worked. `reasons` has (address, reason) in the order of dialling."""

    def __init__(self, reasons: Sequence[tuple[Address, str]]) -> None:
        super().__init__(", ".join(f"{address}: {reason}" for address, reason in reasons))
        self.reasons = tuple(reasons)


def candidates(
    texts: Iterable[str], peer: str | None, own: Sequence[Interface], listening: Iterable[tuple[str, int]]
) -> list[Address]:
    """The addresses worth dialling to reach `peer`, best first; pure.

    This machine and its own networks come first, then private addresses, public ones and names; within a class the
    given order stays. Left out: what does not parse, leads to another peer, goes through a relay (see `circuits`),
    occurs twice, or is one of our own listeners, given as (IP, port).
    """
    ours = set(listening)
    found: dict[Address, int] = {}
    for text in texts:
        try:
            address = parse(text)
        except UsageError:
            continue
        if address.relay is not None or (peer is not None and address.peer not in (None, peer)):
            continue
        if (address.host, address.port) not in ours:
            address = address.with_peer(None)
            found.setdefault(address, _distance(address, own))
    return sorted(found, key=found.__getitem__)[:MAX_CANDIDATES]


def _distance(address: Address, own: Sequence[Interface]) -> int:
    ip = address.ip
    if ip is None:
        return 3
    if ip.is_loopback or any(ip in interface.network for interface in own):
        return 0
    scope = scope_of(ip)
    if scope is Scope.OVERLAY:  # a mesh gives its members single addresses, so no network of ours contains it
        return 1 if any(scope_of(interface.ip) is scope for interface in own) else 2
    return 1 if scope is Scope.LAN else 2


def circuits(texts: Iterable[str], peer: str, own_peer: str) -> list[Address]:
    """The relay circuits that lead to `peer`, in the given order; pure.

    Without /p2p/<peer>; several addresses of one relay count as one, the first, as the relay is dialled with all that
    is known of it. Left out: relays that are `own_peer` or `peer`, and relays reached through relays.
    """
    found: dict[str, Address] = {}
    for text in texts:
        try:
            address = parse(text)
        except UsageError:
            continue
        if address.relay is None or address.relay in (own_peer, peer) or address.peer not in (None, peer):
            continue
        found.setdefault(address.relay, address.with_peer(None))
    return list(found.values())[:MAX_CIRCUITS]


async def race(
    addresses: Sequence[Address],
    attempt: Callable[[Address], Awaitable[T]],
    on_failure: Callable[[Address, str], None] = lambda address, reason: None,
) -> tuple[Address, T]:
    """Run `attempt(address)` over `addresses` in order, staggered; the first to succeed wins, the rest are cancelled.

    Circuits start RELAY_DELAY after the direct addresses, or as soon as all of those have failed.
    `attempt` raises `AttemptFailed` with a reason; `on_failure` hears of each, also when another address wins. Raises
    `DialFailed` with every address and reason when none worked.
    """
    winners: list[tuple[Address, T]] = []
    reasons: dict[Address, str] = {}

    async def run_one(address: Address, failed: trio.Event, everybody: trio.CancelScope) -> None:
        try:
            with trio.fail_after(ATTEMPT_TIMEOUT):
                winners.append((address, await attempt(address)))
            everybody.cancel()
            return
        except trio.TooSlowError:
            reasons[address] = f"no answer within {ATTEMPT_TIMEOUT:.0f} s"
        except AttemptFailed as exc:
            reasons[address] = str(exc)
        on_failure(address, reasons[address])
        failed.set()

    async def run_lane(lane: Sequence[Address], everybody: trio.CancelScope) -> None:
        async with trio.open_nursery() as attempts:
            for address in lane:
                failed = trio.Event()
                attempts.start_soon(run_one, address, failed, everybody)
                with trio.move_on_after(STAGGER):
                    await failed.wait()

    direct = [address for address in addresses if address.relay is None]
    relayed = [address for address in addresses if address.relay is not None]
    with trio.move_on_after(DIAL_TIMEOUT):
        async with trio.open_nursery() as nursery:
            over = trio.Event()

            async def run_direct() -> None:
                await run_lane(direct, nursery.cancel_scope)
                over.set()

            nursery.start_soon(run_direct)
            if relayed:
                with trio.move_on_after(RELAY_DELAY):
                    await over.wait()
                await run_lane(relayed, nursery.cancel_scope)
    if winners:
        return winners[0]
    late = f"no answer within {DIAL_TIMEOUT:.0f} s"
    raise DialFailed([(address, reasons.get(address, late)) for address in addresses])

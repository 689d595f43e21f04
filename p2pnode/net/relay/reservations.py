"""Keeps a private node reachable: reservations on two relays, renewed in time, replaced when a relay goes.

    keeper = ReservationKeeper(network, candidates, on_change=announce)
    nursery.start_soon(keeper.run)
    keeper.enable()  # this node has found out that it is private

One task per relay connects, reserves, and renews at half of the life; a lost connection ends it at once, and the next
candidate takes its place.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from p2pnode.errors import NodeError, PeerUnreachable, RelayRefused
from p2pnode.net.relay.client import Reservation, reserve
from p2pnode.net.transport import Transport

log = logging.getLogger(__name__)

WANTED = 2  # so that the loss of one relay is no loss of reachability
ATTEMPT_TIMEOUT = 15.0  # s for connecting and reserving
SLOW_ATTEMPT = 2.0  # s after which another candidate is tried beside one that does not answer
POLL_INTERVAL = 5.0  # s between looks for new candidates while there are too few reservations
RENEW_JITTER = 0.1  # of the half life, so that those who came together do not renew together
MIN_RENEW = 1.0  # s
GRACE = 60.0  # s after a reservation's end in which the relay may still take it for good: its clock is not ours
MAX_GRANTED = 64  # relays remembered that granted one

# First pause after a failure, in s; it doubles with each further one.
PAUSE_LOST = 1.0  # also unreachable: it may be restarting
PAUSE_BROKEN = 5.0  # no relay, or one that does not answer
PAUSE_REFUSED = 30.0  # full: go-libp2p's reservations live for an hour, so asking soon is no use
MAX_PAUSE = 120.0
MAX_PAUSE_ALONE = 8.0  # while we have no reservation at all; for those who did not refuse

Candidate = tuple[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class ReservationStatistics:
    """`waiting`: enabled, and reachable through no relay now. `failures`: why each was last tried in vain, and
    `refusals`: with which status of the protocol, where the relay itself said no."""

    enabled: bool
    waiting: bool
    held: tuple[Reservation, ...]
    trying: tuple[str, ...]
    failures: Mapping[str, str]
    refusals: Mapping[str, int]


@dataclass(slots=True)
class _Slot:
    """A relay we hold a reservation at, or are asking for one."""

    since: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    lost: trio.Event = field(default_factory=trio.Event)
    reservation: Reservation | None = None


@dataclass(slots=True)
class _Failure:
    """The last failures in a row at one relay."""

    why: str
    count: int
    at: float
    pause: float
    refusal: int | None  # the relay's status

    @property
    def refused(self) -> bool:
        return self.refusal is not None


class ReservationKeeper:
    """`candidates()` gives relays as (peer, addresses to dial), the preferred ones first; it is asked often.

    `on_change()` is called, synchronously, whenever `circuit_addrs()` has changed. Neither may block.
    """

    def __init__(
        self,
        network: Transport,
        candidates: Callable[[], Sequence[Candidate]],
        *,
        wanted: int = WANTED,
        on_change: Callable[[], None] | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._network = network
        self._candidates = candidates
        self._wanted = wanted
        self._on_change = on_change
        self._chance = chance or random.Random()
        self._enabled = False
        self._slots: dict[str, _Slot] = {}
        self._failures: dict[str, _Failure] = {}
        self._granted: dict[str, float] = {}  # until when a relay may bring circuits, the latest granted last
        self._announced: list[str] = []
        self._wake = trio.Event()
        network.on_disconnect(self._disconnected)

    def enable(self) -> None:
        """Hold reservations from now on: this node cannot be reached otherwise."""
        self._enabled = True
        self._wake.set()

    def disable(self) -> None:
        """Hold none from now on: this node is public. What is held is no longer renewed."""
        self._enabled = False
        for slot in self._slots.values():
            slot.scope.cancel()
        self._slots.clear()
        self._changed()
        self._wake.set()

    def poke(self) -> None:
        """There may be new candidates, or another network: try again now, except where we were just refused.

        May be called as often as one likes."""
        recent = trio.current_time() - PAUSE_LOST
        self._failures = {
            relay: failure for relay, failure in self._failures.items() if failure.refused or failure.at > recent
        }
        self._wake.set()

    def circuit_addrs(self) -> list[str]:
        """<relay's address>/p2p/<relay>/p2p-circuit for everything that is held."""
        return [addr for held in self._held() for addr in held.circuit_addrs()]

    def admits(self, relay: str) -> bool:
        """Whether `relay` may bring us circuits.

        It may where a place is held, or being asked for, as the answer may come after the first circuit; and where one
        was held, until that has run out: we cannot give it back, and others know the address.
        """
        return relay in self._slots or trio.current_time() < self._granted.get(relay, float("-inf"))

    def statistics(self) -> ReservationStatistics:
        held = self._held()
        return ReservationStatistics(
            enabled=self._enabled,
            waiting=self._enabled and not held,
            held=tuple(held),
            trying=tuple(relay for relay, slot in self._slots.items() if slot.reservation is None),
            failures={relay: failure.why for relay, failure in self._failures.items()},
            refusals={relay: each.refusal for relay, each in self._failures.items() if each.refusal is not None},
        )

    async def run(self) -> None:
        """Works while enabled, until cancelled. May be called once."""
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                now = trio.current_time()
                again = float("inf")
                if self._enabled:
                    for relay, addrs in self._choose(now):
                        self._slots[relay] = slot = _Slot(now)
                        nursery.start_soon(self._hold, relay, addrs, slot)
                    again = self._again(now)
                with trio.move_on_at(again):
                    await self._wake.wait()

    # -- deciding

    def _held(self) -> list[Reservation]:
        return [slot.reservation for slot in self._slots.values() if slot.reservation is not None]

    def _missing(self, now: float) -> int:
        """How many relays to ask now; those that let us wait do not count."""
        counted = sum(slot.reservation is not None or now - slot.since < SLOW_ATTEMPT for slot in self._slots.values())
        return self._wanted - counted

    def _choose(self, now: float) -> list[Candidate]:
        missing = self._missing(now)
        if missing <= 0:
            return []
        candidates = {relay: addrs for relay, addrs in self._candidates() if relay != self._network.peer_id}
        for relay in self._failures.keys() - candidates.keys():
            del self._failures[relay]
        ready = [
            (relay, addrs)
            for relay, addrs in candidates.items()
            if relay not in self._slots and self._retry_at(relay) <= now
        ]
        return ready[:missing]

    def _retry_at(self, relay: str) -> float:
        failure = self._failures.get(relay)
        if failure is None:
            return float("-inf")
        pause = failure.pause
        if not self._held():
            pause = min(pause, PAUSE_REFUSED if failure.refused else MAX_PAUSE_ALONE)
        return failure.at + pause

    def _again(self, now: float) -> float:
        """When to choose again if nothing happens before."""
        slow = [
            slot.since + SLOW_ATTEMPT
            for slot in self._slots.values()
            if slot.reservation is None and slot.since + SLOW_ATTEMPT > now
        ]
        if self._missing(now) <= 0:
            return min(slow, default=float("inf"))
        retries = [at for relay in self._failures if (at := self._retry_at(relay)) > now and relay not in self._slots]
        return min([*slow, *retries, now + POLL_INTERVAL])

    # -- acting

    async def _hold(self, relay: str, addrs: Sequence[str], slot: _Slot) -> None:
        """Get a reservation at `relay` and keep it. Ends with a failure on record, or cancelled."""
        failure: tuple[str, float, int | None] | None = None
        try:
            with slot.scope:
                with trio.fail_after(ATTEMPT_TIMEOUT):
                    await self._network.connect(relay, addrs)
                    reservation = await reserve(self._network, relay)
                if len(self._held()) >= self._wanted:  # we stopped waiting for this one
                    return
                self._failures.pop(relay, None)
                log.info("reserved a place at relay %s", relay)
                while not slot.lost.is_set():
                    slot.reservation = reservation
                    self._remember(reservation)
                    self._changed()
                    half = (reservation.expires - trio.current_time()) / 2
                    half *= 1 - RENEW_JITTER * self._chance.random()
                    with trio.move_on_after(max(MIN_RENEW, half)):
                        await slot.lost.wait()
                        break
                    with trio.fail_after(ATTEMPT_TIMEOUT):
                        reservation = await reserve(self._network, relay)
                failure = f"the connection to relay {relay} was lost", PAUSE_LOST, None
        except trio.TooSlowError:
            failure = f"relay {relay} did not answer within {ATTEMPT_TIMEOUT:.0f} s", PAUSE_BROKEN, None
        except RelayRefused as exc:
            failure = str(exc), PAUSE_REFUSED, exc.status
        except NodeError as exc:
            gone = slot.lost.is_set() or isinstance(exc, PeerUnreachable)
            failure = str(exc), PAUSE_LOST if gone else PAUSE_BROKEN, None
        finally:
            if self._slots.get(relay) is slot:
                del self._slots[relay]
                if failure is not None:
                    self._failed(relay, *failure)
                self._changed(lost=failure is not None)
                self._wake.set()

    def _failed(self, relay: str, why: str, pause: float, refusal: int | None) -> None:
        count = self._failures[relay].count + 1 if relay in self._failures else 1
        pause = min(MAX_PAUSE, pause * 2 ** min(count - 1, 10)) * (0.75 + self._chance.random() / 2)
        self._failures[relay] = _Failure(why, count, trio.current_time(), pause, refusal)
        log.log(logging.INFO if count == 1 else logging.DEBUG, "%s; trying again in %.1f s", why, pause)

    def _remember(self, reservation: Reservation) -> None:
        self._granted.pop(reservation.relay, None)
        while len(self._granted) >= MAX_GRANTED:
            del self._granted[next(iter(self._granted))]
        self._granted[reservation.relay] = reservation.expires + GRACE

    def _disconnected(self, peer: str) -> None:
        slot = self._slots.get(peer)
        if slot is not None:
            slot.lost.set()
            slot.reservation = None
            self._changed(lost=True)

    def _changed(self, lost: bool = False) -> None:
        addrs = self.circuit_addrs()
        if addrs == self._announced:
            return
        if lost and not addrs:
            log.warning("no relay is left: this node cannot be reached from outside until one returns")
        self._announced = addrs
        if self._on_change is not None:
            self._on_change()

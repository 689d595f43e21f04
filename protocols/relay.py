"""Circuit Relay v2, the deciding half: who may reserve, who may connect to whom, and whose bytes go next.

Wire format and status codes: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md. Everything here is
synchronous and takes the time as `now` (seconds of any monotonic clock); peers are peer ids as text.
"""

from __future__ import annotations

import heapq
import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

# Whoever has one IPv6 address has its /64 (RFC 4291, 2.5.1), and often a /48 of them (RFC 6177).
IPV6_HOST, IPV6_SITE, IPV4_SITE = 64, 48, 24
BURST = 0.05  # s of the bandwidth that may go out at once: a few frames, so that a wait is never long


class Status(IntEnum):
    """Status codes of the specification."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives away. Zero means unlimited where that is said.

    go-libp2p (p2p/protocol/circuitv2/relay/resources.go) has 128 reservations, 8 per IP, 1 h, 16 circuits per peer, and
    cuts a circuit at 2 min and 128 KiB in each direction, because its relays only mediate hole punching. Ours carry
    images between those for whom it fails, so by default a circuit is not cut but shares the bandwidth fairly.
    """

    max_reservations: int = 512
    max_reservations_per_ip: int = 16  # several nodes behind one NAT
    max_reservations_per_prefix: int = 64  # IPv4 /24, IPv6 /48
    reservation_ttl: float = 3600.0  # s, go-libp2p's
    max_circuits: int = 256
    max_circuits_per_pair: int = 4  # one source must not take all of a target's places; a lost one may linger
    max_circuits_per_peer: int = 32  # as source and destination together; one seed serves a small swarm
    circuit_bytes: int = 0  # in each direction, as the specification counts; 0: unlimited
    circuit_seconds: float = 0.0  # 0: unlimited
    bandwidth: int = 0  # bytes/s over all circuits and both directions; 0: unlimited
    idle: float = 120.0  # s after which a circuit that moves nearly nothing makes room when another needs it
    idle_bytes: int = 16 * 1024  # moved within `idle` seconds; keep-alives of a multiplexer inside are a fifth of it

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is negative")


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer in the negative, and the reason in words for logs and `doctor`."""

    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class Granted:
    """A reservation, until `expires`."""

    expires: float


@dataclass(frozen=True, slots=True)
class Opened:
    """A circuit that may be built. The circuits in `evicted` must be ended: they made room."""

    circuit: int
    evicted: tuple[int, ...] = ()
    ends: float = float("inf")


@dataclass(frozen=True, slots=True)
class RelayStatistics:
    """Counters are since the start; bytes in both directions together."""

    reservations: int
    circuits: int
    circuits_opened: int
    circuits_evicted: int
    bytes_relayed: int
    refused: Mapping[Status, int]


@dataclass(slots=True)
class _Reservation:
    groups: tuple[str, str]  # the IP and its prefix
    expires: float


@dataclass(slots=True)
class _Circuit:
    source: str
    target: str
    ends: float
    moved: list[int] = field(default_factory=lambda: [0, 0])  # to the target, to the source
    quiet_since: float = 0.0  # start of the time in which `quiet_bytes` were moved
    quiet_bytes: int = 0


class RelayTable:
    """All reservations and circuits of one relay. Memory is bounded by the limits."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self._reservations: dict[str, _Reservation] = {}
        self._groups: Counter[str] = Counter()  # reservations per IP and prefix
        # In the order in which they last moved more than nothing worth mentioning, the quietest first.
        self._circuits: OrderedDict[int, _Circuit] = OrderedDict()
        self._per_peer: Counter[str] = Counter()
        self._next = 1
        self._evicted = 0
        self._bytes = 0
        self._refused: Counter[Status] = Counter()

    # -- reservations

    def reserve(self, peer: str, ip: str | None, now: float) -> Granted | Refused:
        """Grant or renew a reservation of `peer`, connected from `ip` (all unknown ones, None, count as one)."""
        self.expire(now)
        limits = self.limits
        groups = _groups(ip)
        old = self._reservations.get(peer)
        kept = old.groups if old is not None else ()
        if old is None and len(self._reservations) >= limits.max_reservations:
            return self._refuse(Status.RESERVATION_REFUSED, "the relay has no reservations left")
        for group, limit in zip(
            groups, (limits.max_reservations_per_ip, limits.max_reservations_per_prefix), strict=True
        ):
            if group not in kept and self._groups[group] >= limit:
                return self._refuse(Status.RESERVATION_REFUSED, f"there are {limit} reservations from {group} already")
        self._drop(peer)
        self._groups.update(groups)
        expires = now + limits.reservation_ttl
        self._reservations[peer] = _Reservation(groups, expires)  # at the end: `_reservations` is ordered by expiry
        return Granted(expires)

    def reserved(self, peer: str, now: float) -> bool:
        reservation = self._reservations.get(peer)
        return reservation is not None and reservation.expires > now

    def peer_gone(self, peer: str) -> None:
        """The last connection to `peer` ended. Its circuits end with their streams."""
        self._drop(peer)

    def expire(self, now: float) -> None:
        """Forget reservations that were not renewed. Circuits under way stay (as go-libp2p does)."""
        while self._reservations:
            peer = next(iter(self._reservations))
            if self._reservations[peer].expires > now:
                return
            self._drop(peer)

    def _drop(self, peer: str) -> None:
        reservation = self._reservations.pop(peer, None)
        if reservation is not None:
            for group in reservation.groups:
                self._groups[group] -= 1
                if not self._groups[group]:
                    del self._groups[group]

    # -- circuits

    def connect(self, source: str, target: str, now: float) -> Opened | Refused:
        """Take a place for a circuit; to be given back with `close` whether or not it is ever built."""
        limits = self.limits
        if source == target:
            return self._refuse(Status.PERMISSION_DENIED, "a peer cannot be connected to itself")
        if not self.reserved(target, now):
            return self._refuse(Status.NO_RESERVATION, f"{target} has no reservation here")
        pair = sum((each.source, each.target) == (source, target) for each in self._circuits.values())
        if pair >= limits.max_circuits_per_pair:
            return self._refuse(Status.RESOURCE_LIMIT_EXCEEDED, f"{source} has {pair} circuits to {target} already")
        evicted: list[int] = []
        for peer in (source, target):
            if self._per_peer[peer] - _of_peer(self._circuits, evicted, peer) >= limits.max_circuits_per_peer:
                idle = self._idle(now, peer, evicted)
                if idle is None:
                    return self._refuse(
                        Status.RESOURCE_LIMIT_EXCEEDED, f"{peer} has {limits.max_circuits_per_peer} circuits already"
                    )
                evicted.append(idle)
        if len(self._circuits) - len(evicted) >= limits.max_circuits:
            idle = self._idle(now, None, evicted)
            if idle is None:
                return self._refuse(Status.RESOURCE_LIMIT_EXCEEDED, "the relay has no circuits left")
            evicted.append(idle)
        for number in evicted:
            self.close(number)
        self._evicted += len(evicted)
        number = self._next
        self._next += 1
        ends = now + limits.circuit_seconds if limits.circuit_seconds else float("inf")
        self._circuits[number] = _Circuit(source, target, ends, quiet_since=now)
        self._per_peer.update((source, target))
        return Opened(number, tuple(evicted), ends)

    def _idle(self, now: float, peer: str | None, spared: list[int]) -> int | None:
        """The circuit (of `peer`, if given) that moved nearly nothing for longest, if that is longer than `idle`."""
        for number, circuit in self._circuits.items():
            if now - circuit.quiet_since < self.limits.idle:
                return None
            if number not in spared and (peer is None or peer in (circuit.source, circuit.target)):
                return number
        return None

    def moved(self, circuit: int, n_bytes: int, now: float, *, to_source: bool = False) -> Refused | None:
        """Account for bytes that are about to be forwarded. `Refused`: they are past a limit, end the circuit."""
        entry = self._circuits.get(circuit)
        if entry is None:
            return Refused(Status.RESOURCE_LIMIT_EXCEEDED, "the circuit was ended to make room for another")
        entry.moved[to_source] += n_bytes
        if self.limits.circuit_bytes and entry.moved[to_source] > self.limits.circuit_bytes:
            return self._refuse(
                Status.RESOURCE_LIMIT_EXCEEDED, f"the circuit has moved {self.limits.circuit_bytes} bytes"
            )
        if now >= entry.ends:
            return self._refuse(Status.RESOURCE_LIMIT_EXCEEDED, f"the circuit is {self.limits.circuit_seconds:g} s old")
        self._bytes += n_bytes
        entry.quiet_bytes += n_bytes
        if entry.quiet_bytes >= self.limits.idle_bytes:
            entry.quiet_since, entry.quiet_bytes = now, 0
            self._circuits.move_to_end(circuit)
        return None

    def close(self, circuit: int) -> None:
        """The circuit has ended. Idempotent."""
        entry = self._circuits.pop(circuit, None)
        if entry is not None:
            for peer in (entry.source, entry.target):
                self._per_peer[peer] -= 1
                if not self._per_peer[peer]:
                    del self._per_peer[peer]

    # -- the rest

    def refuse(self, status: Status, reason: str) -> Refused:
        """Count a refusal that was decided elsewhere (a malformed message, a target that cannot be reached)."""
        return self._refuse(status, reason)

    def _refuse(self, status: Status, reason: str) -> Refused:
        self._refused[status] += 1
        return Refused(status, reason)

    def statistics(self) -> RelayStatistics:
        return RelayStatistics(
            reservations=len(self._reservations),
            circuits=len(self._circuits),
            circuits_opened=self._next - 1,
            circuits_evicted=self._evicted,
            bytes_relayed=self._bytes,
            refused=dict(self._refused),
        )


def _of_peer(circuits: Mapping[int, _Circuit], numbers: list[int], peer: str) -> int:
    return sum(peer in (circuits[number].source, circuits[number].target) for number in numbers)


def _groups(ip: str | None) -> tuple[str, str]:
    """The address and the network around it, as keys of what is counted together."""
    if ip is None:
        return ("an unknown address", "an unknown network")
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return ("an unknown address", "an unknown network")
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return (_network(address, IPV6_HOST), _network(address, IPV6_SITE))
        address = address.ipv4_mapped
    return (str(address), _network(address, IPV4_SITE))


def _network(address: ipaddress.IPv4Address | ipaddress.IPv6Address, bits: int) -> str:
    return str(ipaddress.ip_network((address, bits), strict=False))


class FairBandwidth:
    """A token bucket whose tokens go to circuits in fair shares: start-time fair queueing (Goyal, Vin and Cheng 1996).

    Who wants to send `ask`s for a ticket; `grants` returns the tickets whose turn has come. Each circuit's requests are
    stamped with a virtual time that advances by the bytes it was granted, and the lowest stamp goes first: a circuit
    that asks for less than its share waits for one request of each of the others at most, and what some leave the
    others get.
    """

    def __init__(self, rate: int, now: float) -> None:
        """`rate` in bytes/s, not 0."""
        if rate <= 0:
            raise ValueError("a bandwidth must be positive")
        self._rate = rate
        self._burst = rate * BURST
        self._tokens = self._burst
        self._since = now
        self._virtual = 0.0
        self._finish: dict[int, float] = {}  # circuit -> virtual time at which its last request ends
        self._queue: list[tuple[float, int, int]] = []  # (start stamp, ticket, bytes)
        self._waiting: set[int] = set()
        self._next = 1

    def ask(self, circuit: int, n_bytes: int) -> int:
        """Queue a request; returns its ticket."""
        start = max(self._virtual, self._finish.get(circuit, 0.0))
        self._finish[circuit] = start + n_bytes
        ticket = self._next
        self._next += 1
        heapq.heappush(self._queue, (start, ticket, n_bytes))
        self._waiting.add(ticket)
        return ticket

    def withdraw(self, ticket: int) -> None:
        """Nobody waits for this ticket any more. Idempotent."""
        self._waiting.discard(ticket)

    def forget(self, circuit: int) -> None:
        self._finish.pop(circuit, None)

    def grants(self, now: float) -> list[int]:
        """The tickets that may go now, in their order."""
        self._tokens = min(self._burst, self._tokens + (now - self._since) * self._rate)
        self._since = now
        granted = []
        while self._queue and (self._tokens > 0 or self._queue[0][1] not in self._waiting):
            start, ticket, n_bytes = heapq.heappop(self._queue)
            if ticket not in self._waiting:
                continue
            self._waiting.remove(ticket)
            self._virtual = start
            self._tokens -= n_bytes  # into debt, which is paid before the next
            granted.append(ticket)
        return granted

    def wait(self, now: float) -> float | None:
        """Seconds until `grants` is worth calling again; None when nobody waits."""
        if not self._queue:
            return None
        tokens = self._tokens + (now - self._since) * self._rate
        return max(0.0, (1.0 - tokens) / self._rate)

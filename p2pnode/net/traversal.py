"""Being reachable across NATs: what this node is seen as, whether strangers can reach it, and what it does if not.

    verdict public   -> the addresses at which peers reached us are announced
    verdict private  -> two relays are kept, and the circuits through them announced
    not known yet    -> both, as far as there is anything

Relayed connections are upgraded by hole punching (punch.py). Changes of the network are noticed here and repaired.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio
from libp2p.custom_types import TProtocol

from p2pnode.callbacks import call_all
from p2pnode.net import upnp
from p2pnode.net.addresses import Address, Scope, parse
from p2pnode.net.changes import Change, watch
from p2pnode.net.connections import is_relayed
from p2pnode.net.identity import Identity
from p2pnode.net.observed import ObservedAddresses
from p2pnode.net.punch import Puncher
from p2pnode.net.reachability import Nonces, Reachability, State, Verdict
from p2pnode.net.relay.client import CircuitConnection, accept_circuits, dial
from p2pnode.net.relay.reservations import Candidate, ReservationKeeper
from p2pnode.net.relay.server import RelayServer
from p2pnode.net.relay.wire import HOP
from protocols.reach import DIALBACK
from protocols.relay import RelayLimits

if TYPE_CHECKING:
    from p2pnode.net.network import Network

log = logging.getLogger(__name__)

PUSH_DELAY = 0.3  # s; changes come in groups
PUSH_TIMEOUT = 5.0  # s for one peer; also how long a connection gets to prove that it is alive
RETIRE_AFTER = 3.0  # s that a relayed connection stays without streams beside a direct one
RETIRE_POLL = 0.5
MAX_RELAYS = 16  # remembered after they went away
MAX_REACHED = 4  # addresses announced because peers reached us there


class Wanted(enum.Enum):
    """What the user says of this node's reachability; AUTO finds out."""

    AUTO = "auto"
    PUBLIC = "public"
    PRIVATE = "private"


@dataclass(frozen=True, slots=True)
class NatSettings:
    """How a network deals with NATs."""

    reachability: Wanted = Wanted.AUTO
    relays: tuple[str, ...] = ()  # addresses with /p2p/<id> of relays to prefer
    serve: RelayLimits | None = None  # be a relay within these limits
    punch: bool = True
    upnp: bool = False


class Traversal:
    """One network's dealings with NATs. Made and run by `Network`."""

    def __init__(self, network: Network, settings: NatSettings, identity: Identity) -> None:
        self._network = network
        self._settings = settings
        self._identity = identity
        self.nonces = Nonces()
        self.observed = ObservedAddresses(lambda: network.place().listening, self._observed_changed)
        self._mapped: Address | None = None
        self._relays: dict[str, None] = {}  # peers that said they are one, the latest last
        self._announced: list[str] = []
        self._push = trio.Event()
        self._moved = trio.Event()
        self._private = trio.Event()  # the verdict was private at least once
        self._nursery: trio.Nursery | None = None
        self._probing: set[Any] = set()
        self.change_callbacks: list[Callable[[Change], None]] = []
        self.addrs_callbacks: list[Callable[[], None]] = []

    def security_options(self) -> Mapping[Any, Any]:
        """Beside Noise: it only takes dial-backs."""
        return {TProtocol(DIALBACK): self.nonces}

    def attach(self) -> None:
        """The network has its parts now."""
        network = self._network
        self.reachability = Reachability(network, self.nonces, self._ports, self._verdict_changed)
        self.keeper = ReservationKeeper(network, self._candidates, on_change=self._addrs_changed)
        self.server = None
        if self._settings.serve is not None:
            self.server = RelayServer(network, self._settings.serve, self._identity)
        self.puncher = Puncher(network, self._own_endpoints) if self._settings.punch else None
        accept_circuits(network, network.connector.accept_circuit, self.keeper.admits)
        network.on_upgrade(self._upgraded)
        network.on_connect(self._news)
        network.on_identified(self._identified)
        network.connections_book.new_callbacks.append(self._came_again)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            wanted = self._settings.reachability
            if wanted is Wanted.AUTO:
                nursery.start_soon(self.reachability.run)
            else:
                self.reachability.decide(Verdict(State(wanted.value), "the configuration says so"))
            if self.verdict.state is not State.PUBLIC:
                self.keeper.enable()
            nursery.start_soon(self.keeper.run)
            if self.server is not None:
                nursery.start_soon(self.server.run)
            if self.puncher is not None:
                nursery.start_soon(self.puncher.run)
            if self._settings.upnp and wanted is Wanted.AUTO:
                nursery.start_soon(self._map_port)
            nursery.start_soon(self._push_changes)
            nursery.start_soon(watch, self._network.interfaces, self.moved)

    @property
    def verdict(self) -> Verdict:
        return self.reachability.verdict

    def addrs(self) -> list[Address]:
        """What may be announced beside our interfaces' addresses: where peers reached us, and circuits."""
        found = list(self.verdict.addrs)[:MAX_REACHED] if self.verdict.state is not State.PRIVATE else []
        if self.verdict.state is not State.PUBLIC:
            found += [parse(addr) for addr in self.keeper.circuit_addrs()]
        return found

    async def dial_circuit(self, relay: str, target: str) -> CircuitConnection:
        return await dial(self._network, relay, target)

    def moved(self, change: Change) -> None:
        """The machine is somewhere else, or was asleep: nothing known of the outside is known any more. Where only
        something was added, what is known is looked at again."""
        log.info("%s", change.value)
        self._moved.set()
        self._moved = trio.Event()
        self._network.forget_interfaces()
        if change is Change.ADDED:
            self.reachability.recheck()
            self.keeper.poke()
        else:
            if self._settings.reachability is Wanted.AUTO:
                self.reachability.forget()
            if self._nursery is not None:
                self._nursery.start_soon(self._probe_all)
        self._addrs_changed()
        call_all(self.change_callbacks, change)

    def status(self) -> dict[str, Any]:
        """For `status` and `doctor`, as JSON."""
        verdict, kept = self.verdict, self.keeper.statistics()
        result: dict[str, Any] = {
            "state": verdict.state.value,
            "reason": verdict.reason,
            "voters": list(verdict.voters),
            "reached_at": [str(address) for address in verdict.addrs],
            "observed": [str(address) for address in self.observed.endpoints()[:MAX_REACHED]],
            "mapping": self.observed.mapping().value,
            "upnp": None if self._mapped is None else str(self._mapped),
            "relays": [held.relay for held in kept.held],
            "relay_failures": dict(kept.failures),
            "waiting_for_relay": kept.waiting and verdict.state is State.PRIVATE,
            "punches": {} if self.puncher is None else dict(self.puncher.results),
        }
        if self.server is not None:
            serving = self.server.statistics()
            result["serving"] = {
                "reservations": serving.reservations,
                "circuits": serving.circuits,
                "circuits_opened": serving.circuits_opened,
                "circuits_evicted": serving.circuits_evicted,
                "bytes_relayed": serving.bytes_relayed,
                "refused": {status.name.lower(): count for status, count in serving.refused.items()},
            }
        return result

    # What is known of the outside

    def _listen_ports(self) -> list[int]:
        outside = [a for a in self._network.place().listening if a.ip is not None]
        outside = [a for a in outside if a.scope is not Scope.HOST or (a.ip is not None and a.ip.is_unspecified)]
        return list(dict.fromkeys(address.port for address in outside))[:1]

    def _ports(self) -> list[int]:
        """Where peers shall try to reach us."""
        mapped = [] if self._mapped is None else [self._mapped.port]
        announced = [address.port for address in self._network.announced if address.relay is None]
        return list(dict.fromkeys([*self._listen_ports(), *mapped, *announced]))[:2]

    def _own_endpoints(self) -> list[Address]:
        """Where a peer's SYN could reach us, for hole punching."""
        reached = [address for address in self.addrs() if address.relay is None]
        found = [*reached, *self.observed.endpoints(), *self._network.announced]
        if self._mapped is not None:
            found.append(self._mapped)
        return list(dict.fromkeys(address.with_peer(None) for address in found if address.scope is not Scope.HOST))

    async def _map_port(self) -> None:
        """A gateway is asked only when strangers cannot connect: most nodes need none, or are gone soon."""
        await self._private.wait()
        if ports := self._listen_ports():
            await upnp.keep_mapping(ports[0], self._gateway_says, lambda: self._moved)

    def _gateway_says(self, mapped: Address | None) -> None:
        self._mapped = mapped
        self.reachability.recheck()

    def _observed_changed(self) -> None:
        if self.verdict.state is State.UNKNOWN:
            self.reachability.recheck()
        if self.puncher is not None and self._nursery is not None:
            self.puncher.retry()

    def _identified(self, peer: str) -> None:
        self._news(peer)
        if self._network.speaks(peer, HOP):
            self._relays.pop(peer, None)
            while len(self._relays) >= MAX_RELAYS:
                del self._relays[next(iter(self._relays))]
            self._relays[peer] = None
        if self.puncher is not None:
            self.puncher.retry_peer(peer)

    def _news(self, peer: str) -> None:
        """Somebody is connected, or said what they speak: a voter, or a relay."""
        if self._settings.reachability is Wanted.AUTO:
            self.reachability.consider(peer)
        if not self.keeper.circuit_addrs():
            self.keeper.poke()

    def _verdict_changed(self, verdict: Verdict) -> None:
        if verdict.state is State.PRIVATE:
            self._private.set()
        if verdict.state is State.PUBLIC:
            self.keeper.disable()
        else:
            self.keeper.enable()
        self._addrs_changed()

    def _candidates(self) -> list[Candidate]:
        """Relays: those of the configuration, then connected peers that are one, then those that were."""
        found: dict[str, Sequence[str]] = {}
        for text in self._settings.relays:
            address = parse(text)
            if address.peer is not None:
                found[address.peer] = [*found.get(address.peer, ()), text]
        for peer in self._network.connections_book.peers():
            if self._network.connections_book.direct(peer) and self._network.speaks(peer, HOP):
                found.setdefault(peer, ())
        for peer in reversed(self._relays):  # the address book knows where
            found.setdefault(peer, ())
        return list(found.items())

    # Telling others

    def _addrs_changed(self) -> None:
        self._push.set()

    async def _push_changes(self) -> None:
        """identify push (https://github.com/libp2p/specs/blob/master/identify/README.md) whenever addresses changed."""
        self._announced = self._network.addrs()
        while True:
            await self._push.wait()
            await trio.sleep(PUSH_DELAY)
            self._push = trio.Event()
            addrs = self._network.addrs()
            if addrs == self._announced:
                continue
            self._announced = addrs
            log.info("this node's addresses are now %s", ", ".join(addrs))
            call_all(self.addrs_callbacks)
            async with trio.open_nursery() as nursery:
                for conn in self._network.connections_book.every():
                    nursery.start_soon(self._network.push_identify, conn, PUSH_TIMEOUT)

    async def _probe_all(self) -> None:
        """Every connection has to prove that it is alive, or is closed."""
        async with trio.open_nursery() as nursery:
            for conn in self._network.connections_book.every():
                nursery.start_soon(self._probe, conn)
        if self.puncher is not None:
            self.puncher.retry()
        self.keeper.poke()

    def _came_again(self, conn: Any) -> None:
        """A peer that connects anew may have lost what we take for a connection."""
        peer = str(conn.muxed_conn.peer_id)
        if is_relayed(conn) and self._network.connections_book.direct(peer):
            self._upgraded(peer)  # the direct one was faster: this one is not needed
        others = [
            other for other in self._network.connections_book.of(str(conn.muxed_conn.peer_id)) if other is not conn
        ]
        for other in others:
            if is_relayed(other) == is_relayed(conn) and self._nursery is not None and other not in self._probing:
                self._probing.add(other)
                self._nursery.start_soon(self._probe, other)

    async def _probe(self, conn: Any) -> None:
        try:
            if not await self._network.push_identify(conn, PUSH_TIMEOUT):
                log.info("a connection with %s did not survive", conn.muxed_conn.peer_id)
                await conn.close()
        finally:
            self._probing.discard(conn)

    def _upgraded(self, peer: str) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._retire, peer)

    async def _retire(self, peer: str) -> None:
        """Close relayed connections beside a direct one, once nothing uses them."""
        book = self._network.connections_book
        idle: dict[Any, float] = {}
        while book.direct(peer) and (relayed := book.relayed(peer)):
            now = trio.current_time()
            for conn in relayed:
                if conn.get_streams():
                    idle.pop(conn, None)
                elif now - idle.setdefault(conn, now) >= RETIRE_AFTER:
                    log.info("the relayed connection with %s is no longer needed", peer)
                    await conn.close()
            await trio.sleep(RETIRE_POLL)

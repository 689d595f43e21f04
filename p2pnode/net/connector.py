"""From a peer id to a connection: one dial per peer however many want it, and the steps that make a connection.

A raw connection (TCP, or a relay's circuit) becomes one of the swarm by authentication (Noise) and multiplexing
(Yamux). Who plays the initiator in these is said here, not derived from who dialled: with a simultaneous open both did.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey

from p2pnode.errors import NodeError, PeerUnreachable, StreamClosed
from p2pnode.net import sockets
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.addresses import Address, Interface, check_peer_id, parse, valid
from p2pnode.net.connections import Connections, is_inbound, is_relayed
from p2pnode.net.dialler import AttemptFailed, DialFailed, candidates, circuits, race
from p2pnode.net.hardening import HANDSHAKE_TIMEOUT, MAX_CONNECTIONS

log = logging.getLogger(__name__)

MAX_RELAYED_INBOUND = 128  # with hardening.MAX_INBOUND direct ones it leaves places for our own dials
IMPROVE_PAUSE = 12.0  # s from one search for a direct connection to the next; one takes DIAL_TIMEOUT at most
CLOSE_TIMEOUT = 1.0  # s for a raw connection that came to nothing

CircuitDial = Callable[[str, str], Awaitable[Any]]  # (relay peer, target peer) -> the raw circuit


@dataclass(frozen=True, slots=True)
class Place:
    """Where this node is: what its addresses and sockets depend on."""

    listening: Sequence[Address]
    interfaces: Sequence[Interface]
    endpoints: set[tuple[str, int]]  # its own listeners as (IP, port), not worth dialling


class Upgrader:
    """Makes connections of the swarm out of raw ones."""

    def __init__(self, swarm: Any) -> None:
        self._swarm = swarm

    async def outbound(self, raw: Any, expected: Any) -> Any:
        """As initiator, to `expected` (an `ID`) or to whoever answers (None). Raises `AttemptFailed` and others."""
        return await self._finish(await self._security.secure_outbound(raw, expected), expected, "outbound")

    async def inbound(self, raw: Any, expected: Any) -> Any:
        """As responder."""
        return await self._finish(await self._security.secure_inbound(raw), expected, "inbound")

    async def authenticate(self, raw: Any) -> str:
        """Who answers, and nothing more: no connection comes of it."""
        return str((await self._security.secure_outbound(raw, None)).get_remote_peer())

    @property
    def _security(self) -> Any:
        return self._swarm.upgrader.security_multistream

    async def _finish(self, secured: Any, expected: Any, direction: str) -> Any:
        remote = secured.get_remote_peer()
        if remote == self._swarm.self_id:
            raise AttemptFailed("this node itself answers there")
        if expected is not None and remote != expected:
            raise AttemptFailed("another peer answers there")
        if len(self._swarm.get_connections()) >= MAX_CONNECTIONS:
            raise AttemptFailed("this node has as many connections as it may")
        muxed = await self._swarm.upgrader.upgrade_connection(secured, remote)
        return await self._swarm.add_conn(muxed, direction=direction)


async def attempt(raw: Any, make: Callable[[], Awaitable[Any]]) -> Any:
    """`make()` a connection out of `raw`, which is closed if that fails. Raises `AttemptFailed` only."""
    conn = None
    try:
        conn = await make()
        return conn
    except AttemptFailed:
        raise
    except PeerIDMismatchesPubkey as exc:
        raise AttemptFailed("another peer answers there") from exc
    except OSError as exc:
        raise AttemptFailed(sockets.reason(exc)) from exc
    except Exception as exc:  # the top of an attempt's task: a stranger's bytes can raise anything
        log.debug("a handshake failed", exc_info=True)
        raise AttemptFailed(f"the handshake failed ({str(exc)[:80] or type(exc).__name__})") from exc
    finally:
        if conn is None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
                await raw.close()


def raw_tcp(stream: trio.SocketStream, initiator: bool) -> RawConnection:
    return RawConnection(TrioTCPStream(stream), initiator)


@dataclass(slots=True)
class _Dial:
    """A dial in progress and those who wait for it."""

    tried: frozenset[Address]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    error: PeerUnreachable | None = None
    waiting: int = 0


class Connector:
    """Dials peers. `place()` says where we are, `dial_circuit` opens a circuit through a relay we are connected to."""

    def __init__(
        self,
        own: str,
        swarm: Any,
        book: AddressBook,
        connections: Connections,
        place: Callable[[], Place],
        dial_circuit: CircuitDial,
    ) -> None:
        self._own = own
        self._book = book
        self._connections = connections
        self._place = place
        self._dial_circuit = dial_circuit
        self.upgrader = Upgrader(swarm)
        self._dials: dict[str, _Dial] = {}
        self._improving: dict[str, float] = {}  # peers and until when they are not tried again
        self._answers: dict[Address, str] = {}  # who was found at addresses that the user gave without a peer id
        self._nursery: trio.Nursery | None = None
        self._closing = False

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def close(self) -> None:
        self._closing = True

    async def connect(self, peer: str, addrs: Sequence[str] = ()) -> None:
        """See `Network.connect`."""
        check_peer_id(peer)
        if peer == self._own:
            raise PeerUnreachable(f"{peer} is this node itself")
        if addrs and self._connections.live(peer):
            self.improve(peer, addrs)
        while not self._connections.live(peer):
            if self._closing:
                raise PeerUnreachable(f"peer {peer} cannot be reached: this node is closing")
            dial = self._dials.get(peer)
            wanted = self._candidates(peer, addrs)
            if dial is None or dial.scope.cancel_called:
                dial = self._start_dial(peer, wanted)
            dial.waiting += 1
            try:
                await dial.done.wait()
            finally:
                dial.waiting -= 1
                if not dial.waiting:
                    dial.scope.cancel()
            if dial.error is None:
                if not self._connections.live(peer):
                    raise PeerUnreachable(f"peer {peer} closed the connection at once")
            elif dial.tried.issuperset(wanted):
                raise PeerUnreachable(str(dial.error)) from dial.error

    async def connect_addr(self, addr: str) -> str:
        """See `Network.connect_addr`."""
        address = parse(addr)
        if address.peer is not None:
            await self.connect(address.peer, [addr])
            return address.peer
        answered = self._answers.get(address)
        if answered is not None and self._connections.live(answered):
            return answered
        if address.relay is not None:
            raise PeerUnreachable(f"{addr} leads to a relay; add /p2p/<id> of the peer behind it")
        try:
            _, conn = await race([address], lambda address: self._attempt(address, None))
        except DialFailed as exc:
            raise PeerUnreachable(f"no peer could be reached at {exc}") from exc
        peer = str(conn.muxed_conn.peer_id)
        self._book.reached(peer, addr)
        self._answers[address] = peer
        if len(self._connections.of(peer)) > 1:  # only now do we know that it is somebody we had already
            await conn.close()
        return peer

    def candidates(self, peer: str, addrs: Sequence[str] = ()) -> list[Address]:
        """What `connect` would dial, in that order: direct addresses, then circuits."""
        return self._candidates(peer, addrs)

    def improve(self, peer: str, addrs: Sequence[str] = ()) -> None:
        """Look for a direct connection to a peer that has a relayed one, in the background and not too often."""
        if self._nursery is None or self._closing or self._connections.direct(peer):
            return
        if trio.current_time() < self._improving.get(peer, float("-inf")):
            return
        direct = [address for address in self._candidates(peer, addrs) if address.relay is None]
        if direct:
            now = trio.current_time()
            self._improving = {other: until for other, until in self._improving.items() if until > now}
            self._improving[peer] = now + IMPROVE_PAUSE
            self._nursery.start_soon(self._improve, peer, direct)

    async def _improve(self, peer: str, addresses: Sequence[Address]) -> None:
        expected = ID.from_string(peer)
        try:
            # Should the peer have found a way as well, both stay: if each closed its own, none would be left.
            address, _ = await race(
                addresses,
                lambda address: self._attempt(address, expected),
                lambda address, _reason: self._book.failed(peer, str(address)),
            )
            self._book.reached(peer, str(address))
        except DialFailed as exc:
            log.debug("no direct connection to %s: %s", peer, exc)
        except Exception:  # the top of a task, too
            log.exception("looking for a direct connection to %s failed", peer)

    def _candidates(self, peer: str, addrs: Sequence[str]) -> list[Address]:
        place = self._place()
        texts = [*addrs, *self._book.addrs(peer)]
        direct = candidates(texts, peer, place.interfaces, place.endpoints)
        relayed = circuits(texts, peer, self._own)
        for text in valid(texts, peer):  # a relay is dialled at all of its addresses
            address = parse(text)
            if address.relay is not None and any(address.relay == each.relay for each in relayed):
                self._book.heard(address.relay, [str(replace(address, relay=None))])
        return [*direct, *relayed]

    def _start_dial(self, peer: str, addresses: Sequence[Address]) -> _Dial:
        assert self._nursery is not None
        dial = self._dials[peer] = _Dial(frozenset(addresses))
        self._nursery.start_soon(self._run_dial, peer, addresses, dial)
        return dial

    async def _run_dial(self, peer: str, addresses: Sequence[Address], dial: _Dial) -> None:
        try:
            with dial.scope:
                expected = ID.from_string(peer)
                address, _ = await race(
                    addresses,
                    lambda address: self._attempt(address, expected),
                    lambda address, _reason: self._book.failed(peer, str(address)),
                )
                self._book.reached(peer, str(address))
                if address.relay is not None:
                    self.improve(peer, [str(each) for each in addresses])
        except DialFailed as exc:
            why = str(exc) if addresses else "no usable address of it is known"
            dial.error = PeerUnreachable(f"peer {peer} cannot be reached: {why}")
        except Exception:  # the top of a dial's task: the node must not die of an address
            log.exception("the dial of %s failed", peer)
            dial.error = PeerUnreachable(f"peer {peer} cannot be reached: the dial failed; see the log")
        finally:
            if self._dials.get(peer) is dial:
                del self._dials[peer]
            dial.done.set()

    async def _attempt(self, address: Address, expected: Any) -> Any:
        """Connect, authenticate and multiplex over one address. Returns the swarm's connection."""
        if address.relay is not None:
            return await self._attempt_circuit(address, expected)
        place = self._place()
        try:
            stream = await sockets.connect(address, place.listening, place.interfaces)
        except UnicodeError as exc:
            raise AttemptFailed("not a host name") from exc
        except OSError as exc:
            raise AttemptFailed(sockets.reason(exc)) from exc
        shared = stream.socket.getsockname()[1] in {listener.port for listener in place.listening}
        try:
            return await self._upgrade(stream, expected)
        except AttemptFailed:
            # From the listen port two nodes that dial each other at the same instant get one connection with two
            # initiators; from a port of its own this cannot happen.
            if not shared or address.ip is None:
                raise
        try:
            stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError as exc:
            raise AttemptFailed(sockets.reason(exc)) from exc
        return await self._upgrade(stream, expected)

    async def _upgrade(self, stream: trio.SocketStream, expected: Any) -> Any:
        raw = raw_tcp(stream, True)
        return await attempt(raw, lambda: self.upgrader.outbound(raw, expected))

    async def _attempt_circuit(self, address: Address, expected: Any) -> Any:
        relay, peer = address.relay, str(expected)
        assert relay is not None
        try:
            await self.connect(relay, [str(replace(address, relay=None, peer=None))])
            circuit = await self._dial_circuit(relay, peer)
        except NodeError as exc:
            raise AttemptFailed(str(exc)) from exc
        return await attempt(circuit, lambda: self.upgrader.outbound(circuit, expected))

    async def accept_circuit(self, circuit: Any, peer: str, relay: str) -> None:
        """Upgrade a circuit that `peer` opened to us through `relay`."""
        if sum(is_relayed(conn) and is_inbound(conn) for conn in self._connections.every()) >= MAX_RELAYED_INBOUND:
            raise StreamClosed(f"too many relayed connections: one of {peer} through {relay} is refused")
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                await attempt(circuit, lambda: self.upgrader.inbound(circuit, ID.from_string(peer)))
        except (AttemptFailed, trio.TooSlowError) as exc:
            log.info("a circuit of %s through %s came to nothing: %s", peer, relay, exc)

"""The real network: a libp2p host behind `transport.Transport`, with a dialler and an address book of our own.

    async with Network.open(identity=identity, listen=["/ip4/0.0.0.0/tcp/4001"], address_book=book, agent="...") as net:
        net.handle("/echo/1", echo)
        stream = await net.open_stream(peer, "/echo/1")

This file composes; what is wrong in the library is corrected in hardening.py. Importing it costs 1.6 s: nothing that
works without the network may do so.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import multiaddr
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.exceptions import OpenConnectionError

from p2pnode.errors import NodeError, NotListening, PeerUnreachable, StreamClosed
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.addresses import Address, Interface, check_peer_id, endpoints, expand, interfaces, parse, parse_listen
from p2pnode.net.dialler import AttemptFailed, DialFailed, candidates, race
from p2pnode.net.hardening import LIBRARY_ERRORS, make_host, open_stream, raise_file_limit
from p2pnode.net.identity import Identity
from p2pnode.net.noise import security_options
from p2pnode.net.streams import NetworkStream
from p2pnode.net.transport import Connection, Stream, StreamHandler
from protocols.errors import ProtocolError

log = logging.getLogger(__name__)

OPEN_STREAM_TIMEOUT = 10.0  # s: two round trips, and a free place among the connection's streams
CLOSE_TIMEOUT = 1.5  # s for goodbyes and listeners when the network closes; 2 s is what a user waits for Ctrl-C
SAVE_INTERVAL = 60.0  # s between saves of the address book
INTERFACES_TTL = 5.0  # s: laptops change networks, but nobody needs to know within a second


@dataclass(slots=True)
class _Dial:
    """A dial in progress and those who wait for it."""

    tried: frozenset[Address]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    error: PeerUnreachable | None = None
    waiting: int = 0


class Network:
    """A node's connections and streams (`transport.Transport`). Made by `Network.open`."""

    def __init__(self, identity: Identity, address_book: AddressBook, announce: Sequence[str], agent: str) -> None:
        self._peer_id = identity.peer_id
        self._book = address_book
        self._announce = [parse(text).with_peer(identity.peer_id) for text in announce]
        key_pair = create_new_key_pair(identity.seed)
        self.host = make_host(
            key_pair,
            security_options(key_pair),
            addrs=lambda: [multiaddr.Multiaddr(addr) for addr in self.addrs()],
            dial=self._dial_for_library,
            heard=lambda peer, addrs: self._book.heard(str(peer), map(str, addrs)),
            agent=agent,
        )
        self._swarm = self.host.get_network()
        self._swarm.register_notifee(_Notifee(self._connected, self._disconnected))
        self._listening: list[Address] = []
        self._interfaces: Sequence[Interface] = ()
        self._interfaces_at = float("-inf")
        self._since: dict[str, dict[Any, float]] = {}  # peer -> its live connections and when they came up
        self._dials: dict[str, _Dial] = {}
        self._answers: dict[Address, str] = {}  # who was found at addresses that the user gave without a peer id
        self._connect_callbacks: list[Callable[[str], None]] = []
        self._disconnect_callbacks: list[Callable[[str], None]] = []
        self._nursery: trio.Nursery | None = None
        self._up = trio.Event()
        self._stop = trio.Event()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        *,
        identity: Identity,
        listen: Sequence[str],
        address_book: AddressBook,
        announce: Sequence[str] = (),
        agent: str,
    ) -> AsyncIterator[Network]:
        """A running network that listens on every address of `listen` (none: it only dials).

        `announce` are addresses that lead here though we cannot see them (a forwarded port). Raises `UsageError` for a
        malformed address and `NotListening` when one cannot be bound. Closes everything within 2 s on exit.
        """
        listeners = list(dict.fromkeys(parse_listen(text) for text in listen))
        raise_file_limit()
        network = cls(identity, address_book, announce, agent)
        try:
            async with trio.open_nursery() as nursery:
                network._nursery = nursery
                nursery.start_soon(network._serve, listeners)
                try:
                    await network._up.wait()
                    nursery.start_soon(network._keep_address_book)
                    yield network
                finally:
                    network._stop.set()
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            error = _unwrap(group)
            raise error from error.__cause__
        finally:
            address_book.save()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def address_book(self) -> AddressBook:
        return self._book

    def addrs(self) -> list[str]:
        """Addresses others can dial, each ending in /p2p/<our id>; the announced ones last."""
        here = expand(self._listening, self._own_interfaces())
        found = [address.with_peer(self._peer_id) for address in here]
        return [str(address) for address in dict.fromkeys([*found, *self._announce])]

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve `protocol`, from now on. A handler's exception is logged and resets its stream, nothing more."""

        async def serve(net_stream: Any) -> None:
            stream = NetworkStream(net_stream)
            try:
                await handler(stream)
            except Exception as exc:
                if _only_remote(exc):
                    log.info("%s with %s ended: %s", protocol, stream.peer, exc)
                else:
                    log.exception("the handler of %s failed with %s", protocol, stream.peer)
            else:
                await stream.aclose()
                return
            await stream.reset()

        self.host.set_stream_handler(TProtocol(protocol), serve)

    async def connect(self, peer: str, addrs: Sequence[str] = ()) -> None:
        """Be connected to `peer`, trying `addrs` and what the address book knows. Raises `PeerUnreachable`.

        Callers who want the same peer at the same time share one dial; it ends when the last of them is cancelled.
        """
        check_peer_id(peer)
        if peer == self._peer_id:
            raise PeerUnreachable(f"{peer} is this node itself")
        while not self._live(peer):
            if self._stop.is_set():
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
                if not self._live(peer):
                    raise PeerUnreachable(f"peer {peer} closed the connection at once")
            elif dial.tried.issuperset(wanted):
                raise PeerUnreachable(str(dial.error)) from dial.error

    async def connect_addr(self, addr: str) -> str:
        """Connect to whoever answers at `addr` and return the authenticated peer id.

        For bootstrap addresses: with /p2p/<id> in it the id must match. Raises `UsageError`, `PeerUnreachable`.
        """
        address = parse(addr)
        if address.peer is not None:
            await self.connect(address.peer, [addr])
            return address.peer
        answered = self._answers.get(address)
        if answered is not None and self._live(answered):
            return answered
        try:
            _, conn = await race([address], lambda address: self._attempt(address, None))
        except DialFailed as exc:
            raise PeerUnreachable(f"no peer could be reached at {exc}") from exc
        peer = str(conn.muxed_conn.peer_id)
        self._book.reached(peer, addr)
        self._answers[address] = peer
        if len(self._since.get(peer, ())) > 1:  # only now do we know that it is somebody we had already
            await conn.close()
        return peer

    async def open_stream(self, peer: str, protocol: str) -> Stream:
        """A new stream, connecting first if need be, within 10 s more.

        Raises `PeerUnreachable`, or `StreamClosed` if the peer does not speak `protocol` or does not answer.
        """
        await self.connect(peer)
        try:
            live = [conn for conn in self._since.get(peer, ()) if not conn.is_closed]
            return NetworkStream(await open_stream(self.host, live, protocol, OPEN_STREAM_TIMEOUT))
        except trio.TooSlowError:
            raise StreamClosed(f"peer {peer} did not open {protocol} within {OPEN_STREAM_TIMEOUT:.0f} s") from None
        except LIBRARY_ERRORS as exc:
            if not self._live(peer):
                raise StreamClosed(f"the connection to peer {peer} was lost") from exc
            if "not supported" in str(exc):  # the library has one exception for all failed negotiations
                raise StreamClosed(f"peer {peer} does not speak {protocol}") from exc
            raise StreamClosed(f"peer {peer} ended the stream while {protocol} was negotiated") from exc

    def connections(self) -> list[Connection]:
        return [
            self._describe(peer, conn, since) for peer, conns in self._since.items() for conn, since in conns.items()
        ]

    def on_connect(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` (synchronously, must not block) when the first connection to a peer is up."""
        self._connect_callbacks.append(callback)

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` (synchronously, must not block) when the last connection to a peer ends."""
        self._disconnect_callbacks.append(callback)

    async def disconnect(self, peer: str) -> None:
        """Close every connection to `peer`. Bounded in time, also when the peer no longer answers."""
        async with trio.open_nursery() as nursery:
            for conn in list(self._since.get(peer, ())):
                nursery.start_soon(conn.close)

    async def _serve(self, listeners: Sequence[Address]) -> None:
        """The host's life: listen, wait for the end, say goodbye.

        Shielded, so that the order is the same when the caller is cancelled: the library leaves sockets and half-closed
        connections behind when its tasks are cancelled before `close()`.
        """
        try:
            with trio.CancelScope(shield=True) as life:
                async with background_trio_service(self._swarm):
                    try:
                        await self._swarm.event_background_nursery_created.wait()
                        for address in listeners:
                            await self._listen(address)
                        self._up.set()
                        await self._stop.wait()
                    finally:
                        life.deadline = trio.current_time() + CLOSE_TIMEOUT
                        await self._close()
        except ExceptionGroup as group:
            if isinstance(error := _unwrap(group), NodeError):
                raise error from error.__cause__
            log.error("the network host failed", exc_info=group)
            raise NodeError("the network host failed; this is a bug, please report it with the log") from group

    async def _listen(self, address: Address) -> None:
        # Swarm.listen (network/swarm.py:1930) keeps the reason of a failure to itself, so its steps are taken here.
        target = multiaddr.Multiaddr(str(address))
        listener = self._swarm.transport_manager.add_listen_addr(target, self._accept(target))
        try:
            await listener.listen(target)
        except OpenConnectionError as exc:
            await listener.close()
            raise NotListening(f"cannot listen on {address}: {_bind_failure(exc)}") from exc
        self._swarm.listeners[str(target)] = listener
        self._listening += [parse_listen(str(bound)) for bound in listener.get_addrs()]
        await self._swarm.notify_listen(target)

    def _accept(self, target: multiaddr.Multiaddr) -> Callable[[Any], Awaitable[None]]:
        async def accept(raw: Any) -> None:
            await self._swarm._handle_inbound_connection(raw, target)

        return accept

    async def _close(self) -> None:
        """Stop accepting, then close all connections at the same time (the library would do it one by one)."""
        for listener in list(self._swarm.listeners.values()):
            await listener.close()
        async with trio.open_nursery() as nursery:
            for conn in self._swarm.get_connections():
                nursery.start_soon(conn.close)
        await self.host.close()

    async def _keep_address_book(self) -> None:
        while True:
            await trio.sleep(SAVE_INTERVAL)
            if self._book.changed:
                await trio.to_thread.run_sync(self._book.write, self._book.snapshot())

    def _own_interfaces(self) -> Sequence[Interface]:
        now = time.monotonic()
        if now - self._interfaces_at > INTERFACES_TTL:
            self._interfaces, self._interfaces_at = interfaces(), now
        return self._interfaces

    def _candidates(self, peer: str, addrs: Sequence[str]) -> list[Address]:
        own = self._own_interfaces()
        return candidates([*addrs, *self._book.addrs(peer)], peer, own, endpoints(self._listening, own))

    def _live(self, peer: str) -> bool:
        return any(not conn.is_closed for conn in self._since.get(peer, ()))

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
        except DialFailed as exc:
            why = str(exc) if addresses else "no usable address of it is known"
            dial.error = PeerUnreachable(f"peer {peer} cannot be reached: {why}")
        finally:
            if self._dials.get(peer) is dial:
                del self._dials[peer]
            dial.done.set()

    async def _attempt(self, address: Address, expected: Any) -> Any:
        """Connect, authenticate and multiplex over one address. Returns the swarm's connection."""
        upgrader = self._swarm.upgrader
        raw = None
        conn = None
        try:
            raw = TrioTCPStream(await trio.open_tcp_stream(address.host, address.port))
            secured = await upgrader.security_multistream.secure_outbound(RawConnection(raw, True), expected)
            remote = secured.get_remote_peer()
            if remote == self._swarm.self_id:
                raise AttemptFailed("this node itself answers there")
            if expected is not None and remote != expected:
                raise AttemptFailed("another peer answers there")
            muxed = await upgrader.upgrade_connection(secured, remote)
            conn = await self._swarm.add_conn(muxed, direction="outbound")
            return conn
        except AttemptFailed:
            raise
        except PeerIDMismatchesPubkey as exc:
            raise AttemptFailed("another peer answers there") from exc
        except OSError as exc:
            raise AttemptFailed(_os_reason(exc)) from exc
        except Exception as exc:  # the top of an attempt's task: a stranger's bytes can raise anything
            log.debug("dialling %s failed", address, exc_info=True)
            raise AttemptFailed(f"the handshake failed ({str(exc)[:80] or type(exc).__name__})") from exc
        finally:
            if raw is not None and conn is None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
                    await raw.close()

    async def _dial_for_library(self, peer_id: Any) -> list[Any]:
        """`Swarm.dial_peer` for the library's own protocols."""
        try:
            await self.connect(str(peer_id))
        except NodeError as exc:
            raise SwarmException(str(exc)) from exc
        return [conn for conn in self._swarm.get_connections(peer_id) if not conn.is_closed]

    def _connected(self, conn: Any) -> None:
        if conn.is_closed:  # it ended before it was announced; the end will not be announced either
            return
        peer = str(conn.muxed_conn.peer_id)
        conns = self._since.setdefault(peer, {})
        conns[conn] = trio.current_time()
        if len(conns) == 1:
            _call(self._connect_callbacks, peer)

    def _disconnected(self, conn: Any) -> None:
        peer = str(conn.muxed_conn.peer_id)
        conns = self._since.get(peer, {})
        if conns.pop(conn, None) is not None and not conns:
            del self._since[peer]
            _call(self._disconnect_callbacks, peer)

    @staticmethod
    def _describe(peer: str, conn: Any, since: float) -> Connection:
        addr = next(iter(conn.get_transport_addresses()), "")
        direction = "in" if conn.direction == Direction.INBOUND else "out"
        rtt = getattr(conn.muxed_conn, "rtt", None)
        return Connection(peer, str(addr), direction, since, rtt if isinstance(rtt, float) else None)


class _Notifee:
    """The library's notifications, as two plain calls."""

    def __init__(self, connected: Callable[[Any], None], disconnected: Callable[[Any], None]) -> None:
        self._connected = connected
        self._disconnected = disconnected

    async def connected(self, network: Any, conn: Any) -> None:
        self._connected(conn)

    async def disconnected(self, network: Any, conn: Any) -> None:
        self._disconnected(conn)

    async def opened_stream(self, network: Any, stream: Any) -> None: ...

    async def closed_stream(self, network: Any, stream: Any) -> None: ...

    async def listen(self, network: Any, addr: Any) -> None: ...

    async def listen_close(self, network: Any, addr: Any) -> None: ...


def _call(callbacks: Sequence[Callable[[str], None]], peer: str) -> None:
    for callback in callbacks:
        try:
            callback(peer)
        except Exception:
            log.exception("a callback for peer %s failed", peer)


def _unwrap(error: BaseException) -> BaseException:
    """What a nursery wrapped: callers know nothing of nurseries and catch plain errors."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _only_remote(error: BaseException) -> bool:
    """Whether all of it is errors with a name, which end a stream in the normal course of things."""
    if isinstance(error, BaseExceptionGroup):
        return all(_only_remote(inner) for inner in error.exceptions)
    return isinstance(error, NodeError | ProtocolError)


def _bind_failure(exc: BaseException) -> str:
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, OSError):
            return _os_reason(cause)
        cause = cause.__cause__
    return str(exc)


def _os_reason(exc: OSError) -> str:
    """The system's words for an error, in lower case; trio joins those of several attempts into one OSError."""
    if exc.errno is not None:
        return os.strerror(exc.errno).lower()
    cause = exc.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and cause is not exc:
        return _os_reason(cause)
    return str(exc) or type(exc).__name__

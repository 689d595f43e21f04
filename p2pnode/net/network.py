"""The real network: a libp2p host behind `transport.Transport`, with a dialler and an address book of our own.

    async with Network.open(identity=identity, listen=["/ip4/0.0.0.0/tcp/4001"], address_book=book, agent="...") as net:
        net.handle("/echo/1", echo)
        stream = await net.open_stream(peer, "/echo/1")

This file composes; what is wrong in the library is corrected in hardening.py. Importing it costs 1.6 s: nothing that
works without the network may do so.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import multiaddr
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.identity.identify.identify import _mk_identify_protobuf
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.utils import varint

from p2pnode.callbacks import call_all
from p2pnode.errors import NodeError, NotListening, StreamClosed
from p2pnode.net import sockets
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.addresses import Address, Interface, endpoints, expand, interfaces, parse, parse_listen
from p2pnode.net.changes import Change
from p2pnode.net.clock import Clock
from p2pnode.net.connections import Connections, Notifee, is_relayed
from p2pnode.net.connector import Connector, Place
from p2pnode.net.hardening import LIBRARY_ERRORS, make_host, open_stream, raise_file_limit
from p2pnode.net.identity import Identity
from p2pnode.net.noise import security_options
from p2pnode.net.streams import NetworkStream
from p2pnode.net.transport import Connection, Stream, StreamHandler
from p2pnode.net.traversal import NatSettings, Traversal
from protocols.errors import ProtocolError

log = logging.getLogger(__name__)

OPEN_STREAM_TIMEOUT = 10.0  # s: two round trips, and a free place among the connection's streams
CLOSE_TIMEOUT = 1.5  # s for goodbyes and listeners when the network closes; 2 s is what a user waits for Ctrl-C
SAVE_INTERVAL = 60.0  # s between saves of the address book
INTERFACES_TTL = 2.0  # s: laptops change networks, but nobody needs to know within a second
NO_NAT = NatSettings()


class Network:
    """A node's connections and streams (`transport.Transport`). Made by `Network.open`."""

    def __init__(
        self, identity: Identity, address_book: AddressBook, announce: Sequence[str], agent: str, nat: NatSettings
    ) -> None:
        self._peer_id = identity.peer_id
        self._book = address_book
        self.announced = [parse(text).with_peer(identity.peer_id) for text in announce]
        key_pair = create_new_key_pair(identity.seed)
        self.traversal = Traversal(self, nat, identity)
        self.host = make_host(
            key_pair,
            {**security_options(key_pair), **self.traversal.security_options()},
            addrs=lambda: [multiaddr.Multiaddr(addr) for addr in self.addrs()],
            dial=self._dial_for_library,
            heard=self._heard,
            agent=agent,
        )
        self.host._observed_addr_manager = self.traversal.observed  # told by the library's identify
        self._swarm = self.host.get_network()
        self.connections_book = Connections()
        self._swarm.register_notifee(Notifee(self.connections_book))
        self._listening: list[Address] = []
        self._interfaces: Sequence[Interface] = ()
        self._interfaces_at = float("-inf")
        self._identified_callbacks: list[Callable[[str], None]] = []
        self.connector = Connector(
            self._peer_id, self._swarm, self._book, self.connections_book, self.place, self.traversal.dial_circuit
        )
        self.traversal.attach()
        self.clock = Clock(self)
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
        nat: NatSettings = NO_NAT,
    ) -> AsyncIterator[Network]:
        """A running network that listens on every address of `listen` (none: it only dials).

        `announce` are addresses that lead here though we cannot see them (a forwarded port). Raises `UsageError` for a
        malformed address and `NotListening` when one cannot be bound. Closes everything within 2 s on exit.
        """
        listeners = list(dict.fromkeys(parse_listen(text) for text in listen))
        raise_file_limit()
        network = cls(identity, address_book, announce, agent, nat)
        try:
            async with trio.open_nursery() as nursery:
                network.connector.start(nursery)
                nursery.start_soon(network._serve, listeners)
                try:
                    await network._up.wait()
                    nursery.start_soon(network._keep_address_book)
                    nursery.start_soon(network.traversal.run)
                    yield network
                finally:
                    network.connector.close()
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
        """Addresses others can dial, each ending in /p2p/<our id>: our interfaces', those that the configuration names,
        those at which peers reached us, and circuits through relays."""
        here = [*expand(self._listening, self.interfaces()), *self.announced, *self.traversal.addrs()]
        return list(dict.fromkeys(str(address.with_peer(self._peer_id)) for address in here))

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
        await trio.lowlevel.checkpoint()  # what fails at once must not be tried again before anything else happens
        await self.connector.connect(peer, addrs)

    async def connect_addr(self, addr: str) -> str:
        """Connect to whoever answers at `addr` and return the authenticated peer id.

        For bootstrap addresses: with /p2p/<id> in it the id must match. Raises `UsageError`, `PeerUnreachable`.
        """
        await trio.lowlevel.checkpoint()
        return await self.connector.connect_addr(addr)

    async def open_stream(self, peer: str, protocol: str) -> Stream:
        """A new stream, connecting first if need be, within 10 s more.

        Raises `PeerUnreachable`, or `StreamClosed` if the peer does not speak `protocol` or does not answer.
        """
        await self.connect(peer)
        return await self._open_on(self.connections_book.of(peer), peer, protocol)

    async def open_relayed(self, peer: str, protocol: str) -> Stream:
        """A new stream over a relayed connection to `peer`; for what is about to make a direct one."""
        await trio.lowlevel.checkpoint()
        return await self._open_on(self.connections_book.relayed(peer), peer, protocol)

    async def _open_on(self, conns: Sequence[Any], peer: str, protocol: str) -> Stream:
        if not conns:
            raise StreamClosed(f"the connection to peer {peer} was lost")
        try:
            return NetworkStream(await open_stream(self.host, conns[:1], protocol, OPEN_STREAM_TIMEOUT))
        except trio.TooSlowError:
            raise StreamClosed(f"peer {peer} did not open {protocol} within {OPEN_STREAM_TIMEOUT:.0f} s") from None
        except LIBRARY_ERRORS as exc:
            if not self.connections_book.live(peer):
                raise StreamClosed(f"the connection to peer {peer} was lost") from exc
            if "not supported" in str(exc):  # the library has one exception for all failed negotiations
                raise StreamClosed(f"peer {peer} does not speak {protocol}") from exc
            raise StreamClosed(f"peer {peer} ended the stream while {protocol} was negotiated") from exc

    async def push_identify(self, conn: Any, timeout: float) -> bool:
        """Tell one peer our addresses anew. False when the connection seems dead: nothing came back over it."""
        message = _mk_identify_protobuf(self.host, None).SerializeToString()
        try:
            with trio.fail_after(timeout):
                stream = await open_stream(self.host, [conn], str(ID_PUSH), timeout)
                await stream.write(varint.encode_uvarint(len(message)) + message)
                await stream.close()
        except trio.TooSlowError:
            return False
        except LIBRARY_ERRORS as exc:
            log.debug("identify push to %s: %r", conn.muxed_conn.peer_id, exc)  # it may not speak it
        return not conn.is_closed

    def speaks(self, peer: str, protocol: str) -> bool:
        """Whether `peer` said in identify that it speaks `protocol`."""
        return bool(self.host.get_peerstore().supports_protocols(ID.from_string(peer), [protocol]))

    def protocols(self, peer: str) -> list[str]:
        """What `peer` said in identify that it speaks; empty before that."""
        try:
            return [str(each) for each in self.host.get_peerstore().get_protocols(ID.from_string(peer))]
        except PeerStoreError:
            return []

    def connections(self) -> list[Connection]:
        return self.connections_book.describe()

    def near(self, peer: str) -> bool:
        """Whether a direct connection to `peer` stays within this machine's own networks."""
        for conn in self.connections_book.of(peer):
            remote = None if is_relayed(conn) else conn.muxed_conn.get_remote_address()
            if remote is not None:
                ip = ipaddress.ip_address(remote[0].split("%")[0])
                if ip.is_loopback or any(ip in interface.network for interface in self.interfaces()):
                    return True
        return False

    def on_connect(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` (synchronously, must not block) when the first connection to a peer is up."""
        self.connections_book.connect_callbacks.append(callback)

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` (synchronously, must not block) when the last connection to a peer ends."""
        self.connections_book.disconnect_callbacks.append(callback)

    def on_upgrade(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` (synchronously, must not block) when the first direct connection to a peer is up to
        whom there were only relayed ones."""
        self.connections_book.upgrade_callbacks.append(callback)

    def on_identified(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` when a peer has said what it speaks and where it is."""
        self._identified_callbacks.append(callback)

    def on_addrs(self, callback: Callable[[], None]) -> None:
        """Call `callback()` when `addrs()` has changed."""
        self.traversal.addrs_callbacks.append(callback)

    def on_change(self, callback: Callable[[Change], None]) -> None:
        """Call `callback(change)` when the machine's network changed or it was asleep."""
        self.traversal.change_callbacks.append(callback)

    async def disconnect(self, peer: str) -> None:
        """Close every connection to `peer`. Bounded in time, also when the peer no longer answers."""
        async with trio.open_nursery() as nursery:
            for conn in self.connections_book.known(peer):
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
            raise NotListening(f"cannot listen on {address}: {sockets.reason(exc)}") from exc
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

    def interfaces(self) -> Sequence[Interface]:
        """This machine's addresses, as of a few seconds ago at most."""
        now = time.monotonic()
        if now - self._interfaces_at > INTERFACES_TTL:
            self._interfaces_at = now
            try:
                self._interfaces = interfaces()
            except OSError as exc:  # no file descriptor left: what was known a moment ago is right most probably
                log.warning("this machine's interfaces cannot be listed: %s", exc.strerror)
        return self._interfaces

    def forget_interfaces(self) -> None:
        self._interfaces_at = float("-inf")

    def place(self) -> Place:
        own = self.interfaces()
        return Place(self._listening, own, endpoints(self._listening, own))

    def _heard(self, peer_id: Any, addrs: Sequence[Any]) -> None:
        """The library's identify (and push) told the peer store."""
        peer = str(peer_id)
        self._book.heard(peer, map(str, addrs))
        if self.connections_book.live(peer):
            if not self.connections_book.direct(peer):
                self.connector.improve(peer)
            # The protocols come after the addresses, within the same step of the event loop.
            trio.lowlevel.current_trio_token().run_sync_soon(call_all, self._identified_callbacks, peer)

    async def _dial_for_library(self, peer_id: Any) -> list[Any]:
        """`Swarm.dial_peer` for the library's own protocols."""
        try:
            await self.connect(str(peer_id))
        except NodeError as exc:
            raise SwarmException(str(exc)) from exc
        return self.connections_book.of(str(peer_id))


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

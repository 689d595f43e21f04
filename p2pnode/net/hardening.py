"""Every weakness of libp2p 0.8.1 that this node would meet, met in one place.

`apply()` replaces what is wrong in the library's classes, once per process. `make_host()` composes a host of the parts
that are right, and corrects the instance. Each correction says what was wrong, where (file:line of 0.8.1), and why it
matters. `WEAKNESSES` names the attributes they hang on; a missing one is an error at start and in the tests, so that an
upgrade of the library cannot lose a correction silently.

What is corrected by composition alone, without a patch:

- plaintext, secio and TLS are offered by default (libp2p/__init__.py:653): only our Noise is passed in (noise.py).
- Mplex is offered beside Yamux (libp2p/__init__.py:248): only our Yamux is passed in (yamux.py).
- the default ResourceManager refuses the 257th inbound connection after the dialler saw success, and leaks a slot for
  each denial (rcmgr/connection_limits.py:244): there is none, `ConnectionConfig.max_connections` is the cap.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import libp2p
import libp2p.host.basic_host
import libp2p.identity.identify.identify as identify
import libp2p.io.utils
import libp2p.network.connection.swarm_connection as swarm_connection
import libp2p.transport.tcp.tcp as tcp
import multiaddr
import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.io.exceptions import IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.upgrader import TransportUpgrader

from p2pnode.net import yamux

log = logging.getLogger(__name__)

VERSION = "0.8.1"
MAX_CONNECTIONS = 1000
MAX_INBOUND = 800  # the rest is for our own dials: a flood must not take the power to dial away
MAX_INBOUND_PER_ADDRESS = 400  # of an IPv4 address or IPv6 /64: many nodes may be behind one NAT, not most of them
CROWDED_PER_ADDRESS = 64  # once half of all places are taken: the other half is for those who are not there yet
CROWDED_PER_NETWORK = 256
MAX_HANDSHAKES = 256  # that are not finished; then the oldest of the address that has the most gives way to a new one
HANDSHAKE_TIMEOUT = 5.0  # s, inbound: security and multiplexer; how long a silent stranger can hold a slot
CLOSE_TIMEOUT = 0.5  # s that a connection gets to say goodbye
MAX_STORED_PEERS = 2000
MAX_STORED_ADDRS = 16
BACKLOG = 1024

# A silent peer is given up after idle + probes * interval = 20 s, and unacknowledged data after as long.
KEEPALIVE_IDLE = 8
KEEPALIVE_INTERVAL = 4
KEEPALIVE_PROBES = 3
USER_TIMEOUT_MS = 20_000

# What the library raises for a peer's or the network's fault, when it does not let something else escape.
LIBRARY_ERRORS = (BaseLibp2pError, OSError, EOFError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)

# (object, attribute) of everything replaced or called below the library's public interface.
WEAKNESSES: tuple[tuple[Any, str], ...] = (
    (Swarm, "_do_handle_inbound_connection"),
    (Swarm, "_handle_inbound_connection"),
    (Swarm, "upgrade_inbound_raw_conn"),
    (Swarm, "_build_remote_multiaddr"),
    (Swarm, "add_conn"),
    (Swarm, "dial_peer"),
    (Swarm, "set_stream_handler"),
    (Swarm, "_best_connection"),
    (SwarmConn, "close"),
    (SwarmConn, "new_stream"),
    (SwarmConn, "_add_stream"),
    (SwarmConn, "_notify_disconnected"),
    (TrioTCPStream, "__init__"),
    (TrioTCPStream, "get_remote_address"),
    (tcp, "_open_reuseport_listeners"),
    (libp2p.io.utils, "read_exactly"),
    (identify, "AGENT_VERSION"),
    (identify, "_mk_identify_protobuf"),
    (BasicHost, "_on_notifee_disconnected"),  # tells host._observed_addr_manager, which network.py replaces
    (swarm_connection, "logging"),
    (AutoConnector, "maybe_connect"),
    (AutoConnector, "record_disconnect"),
    (BasicHost, "_swarm_stream_handler"),
    (BasicHost, "get_addrs"),
    (PeerStore, "_enforce_peer_limit"),
    (PeerStore, "add_addrs"),
)

_stock_tcp_init = TrioTCPStream.__init__
_stock_read_exactly = libp2p.io.utils.read_exactly
_applied = False


def apply() -> None:
    """Correct the library's classes. Idempotent. Raises `RuntimeError` when this is not the library we know."""
    global _applied
    if _applied:
        return
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in WEAKNESSES if not hasattr(owner, name)]
    if libp2p.__version__ != VERSION or missing:
        raise RuntimeError(
            f"libp2p {libp2p.__version__} is not {VERSION}, for which the corrections were written {missing}"
        )
    Swarm._do_handle_inbound_connection = _handle_inbound
    SwarmConn.close = _close_connection
    SwarmConn.new_stream = _new_stream
    TrioTCPStream.__init__ = _init_tcp_stream
    tcp._open_reuseport_listeners = _open_listeners
    for module in list(sys.modules.values()):
        # Not getattr: it makes hundreds of lazy modules import what they offer.
        if getattr(module, "__dict__", {}).get("read_exactly") is _stock_read_exactly:
            setattr(module, "read_exactly", _read_exactly)  # noqa: B010 (a module object has no such attribute for mypy)
    # The library's muxer breaks when a read or write is cancelled, dead-locks under load in both directions, shows a
    # reset as an end of stream and never notices a frozen peer (stream_muxer/yamux/yamux.py): ours takes its place.
    yamux.install()
    _quiet()
    _applied = True


def _quiet() -> None:
    """Only our own logger speaks to the user.

    The library logs expected events (EOF, refused dials, failed negotiations) as WARNING and ERROR on a logger without
    handlers, so Python's last resort prints them; and network/connection/swarm_connection.py logs on the *root* logger
    by `logging.debug()`, which installs a handler on it. LIBP2P_DEBUG still works.
    """
    top = logging.getLogger("libp2p")
    if not os.environ.get("LIBP2P_DEBUG"):
        top.addHandler(logging.NullHandler())
        top.setLevel(logging.CRITICAL)
    swarm_connection.logging = logging.getLogger(swarm_connection.__name__)


async def _handle_inbound(swarm: Any, raw: Any, listener: multiaddr.Multiaddr, failure_event: Any) -> None:
    """An inbound connection from accept to its end, at which its slot is free again.

    network/swarm.py:1978 takes the slot and :2044 holds it until the end of the *swarm*: after max_connections -
    min_connections accepted connections in total the stock node is deaf for ever.
    """
    admission = swarm.__dict__.setdefault("_admission", Admission())
    source = _source(raw.get_remote_address())
    if not admission.enter(source):
        await raw.close()
        return
    muxed = None
    try:
        with admission.handshake(source), trio.fail_after(HANDSHAKE_TIMEOUT):
            remote = swarm._build_remote_multiaddr(raw)
            if remote is not None and not await swarm.connection_gate.is_allowed(remote):
                return
            muxed = await swarm.upgrade_inbound_raw_conn(RawConnection(raw, False), listener)
    except Exception as exc:  # noqa: BLE001 (the top of the task serving this connection; a stranger can cause anything)
        log.debug("inbound connection from %s failed: %r", raw.get_remote_address(), exc)
    finally:
        if muxed is None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
                await raw.close()
            admission.leave(source)
    if muxed is not None:
        try:
            for conn in swarm.get_connections(muxed.peer_id):
                if conn.muxed_conn is muxed:
                    await conn.event_closed.wait()
            # The listener closes the socket when we return; what was written, and the goodbye, may be on its way.
            with trio.move_on_after(yamux.CLOSE_GRACE + CLOSE_TIMEOUT):
                await muxed.event_closed.wait()
        finally:
            admission.leave(source)


class Admission:
    """Who has how many of a swarm's inbound places, so that one address cannot have all of them.

    The library counts all connections together (network/swarm.py:1978): a few hundred silent sockets of one machine
    keep everybody else out.
    """

    def __init__(self) -> None:
        self._connections: Counter[str] = Counter()
        self._networks: Counter[str] = Counter()
        self._handshakes: dict[trio.CancelScope, str] = {}  # oldest first

    def enter(self, source: str) -> bool:
        """Take a place; false when `source` has too many already."""
        network = _network(source)
        if self._connections[source] >= MAX_INBOUND_PER_ADDRESS:
            return False
        if self._connections.total() >= MAX_INBOUND // 2 and (
            self._connections[source] >= CROWDED_PER_ADDRESS
            or (network != source and self._networks[network] >= CROWDED_PER_NETWORK)
        ):
            return False
        self._connections[source] += 1
        self._networks[network] += 1
        return True

    def leave(self, source: str) -> None:
        for counter, key in ((self._connections, source), (self._networks, _network(source))):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]

    @contextmanager
    def handshake(self, source: str) -> Iterator[None]:
        """While a connection authenticates. The block is cancelled when it must give way to another one."""
        if len(self._handshakes) >= MAX_HANDSHAKES:
            ((crowd, _),) = Counter(self._handshakes.values()).most_common(1)
            oldest = next(scope for scope, other in self._handshakes.items() if other == crowd)
            del self._handshakes[oldest]
            oldest.cancel()
        with trio.CancelScope() as scope:
            self._handshakes[scope] = source
            try:
                yield
            finally:
                self._handshakes.pop(scope, None)


def _source(address: tuple[str, int] | None) -> str:
    """What counts as one machine: an IPv4 address, or the /64 that anybody with IPv6 has."""
    if address is None:
        return ""
    ip = ipaddress.ip_address(address[0].split("%")[0])
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def _network(source: str) -> str:
    """What counts as one site: an IPv4 /24, an IPv6 /48. On our own networks each machine is one."""
    site = ipaddress.ip_network(source or "0.0.0.0", strict=False)
    if not site.is_global:
        return source
    return str(site.supernet(new_prefix=24 if site.version == 4 else 48))


async def _close_connection(conn: Any) -> None:
    """Close a connection and forget it, in bounded time and whatever the caller's cancellation.

    The stock one (network/connection/swarm_connection.py:160) sets `event_closed` first, so that when it is cancelled
    later the dead connection stays in the books for ever and nobody is told; it sleeps 0.1 s per connection (100 s for
    a thousand at shutdown), and waits for the muxer to write to a peer that may be frozen.
    """
    if conn.event_closed.is_set():
        return
    conn.event_closed.set()
    with trio.CancelScope(shield=True):
        # A duplicate made by a race in Swarm.add_conn shares its muxed connection with the one that is kept.
        if not getattr(conn, "_shared_muxed_conn", False):
            with trio.move_on_after(CLOSE_TIMEOUT):
                try:
                    await conn.muxed_conn.close()
                except LIBRARY_ERRORS as exc:
                    log.debug("closing a connection to %s: %r", conn.muxed_conn.peer_id, exc)
        conn.swarm.remove_conn(conn)
        with trio.move_on_after(CLOSE_TIMEOUT):
            for stream in conn.streams.copy():
                await stream.reset()
        await conn._notify_disconnected()


async def _new_stream(conn: Any) -> Any:
    """Open a stream; once the muxer has it, it is registered whatever the caller's cancellation.

    Stock (network/connection/swarm_connection.py:330) a cancellation between the two steps leaves a stream that nobody
    closes, and a connection has 256 of them.
    """
    muxed_stream = await conn.muxed_conn.open_stream()
    with trio.CancelScope(shield=True):
        return await conn._add_stream(muxed_stream)


def _init_tcp_stream(self: Any, stream: trio.SocketStream) -> None:
    """Every TCP connection notices a dead peer, and knows the peer's address.

    Stock, nothing is noticed on an idle connection when a cable is pulled (io/trio.py:28 sets no option), and the
    remote address of an IPv6 socket, a tuple of four, counts as invalid (io/trio.py:116).
    """
    _stock_tcp_init(self, stream)
    try:
        sock = stream.socket
        self._cached_remote_address = tuple(sock.getpeername()[:2])
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    except OSError as exc:  # reset before we came to it: the first read will say so
        log.debug("socket options: %r", exc)


async def _open_listeners(host: str | None, port: int) -> list[trio.SocketListener]:
    """Listen exclusively, then share the port with our own outgoing connections.

    transport/tcp/tcp.py:44 sets SO_REUSEPORT before bind, so a second process of the same user binds the same port
    without an error and the kernel deals connections to the two at random. Hole punching needs the option on the
    listener only when a dial binds the same port, so it is set after the bind. IPV6_V6ONLY lets 0.0.0.0 and :: stand
    side by side.
    """
    if host is None:
        raise OpenConnectionError("a listen address needs an IP")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return [trio.SocketListener(sock)]
    except BaseException:
        sock.close()
        raise


async def _read_exactly(reader: Any, n: int, retry_count: int = 0) -> bytes:
    """Exactly `n` bytes. The stock one (io/utils.py:8) gives up after 101 partial reads, and retries after an EOF."""
    buffer = bytearray()
    while len(buffer) < n:
        data = await reader.read(n - len(buffer))
        if not data:
            raise IncompleteReadError(
                f"connection closed: expected {n} bytes, got {len(buffer)}",
                expected_bytes=n,
                received_bytes=len(buffer),
            )
        buffer += data
    return bytes(buffer)


class BoundedPeerStore(PeerStore):  # type: ignore[misc]
    """The library's peer store, bounded per peer, and telling us what it hears.

    The stock one (peer/peerstore.py:201) evicts peers without addresses first when it holds more than `max_peers`.
    The first of these is the node itself, with its keys: after a thousand peers it could not identify itself any more.
    It takes any number of addresses per peer.
    """

    def __init__(self, own: Any, heard: Callable[[Any, Sequence[multiaddr.Multiaddr]], None]) -> None:
        super().__init__(max_records=MAX_STORED_PEERS, max_peers=MAX_STORED_PEERS)
        self._own = own
        self._heard = heard

    def add_addrs(self, peer_id: Any, addrs: Sequence[multiaddr.Multiaddr], ttl: int = 0) -> None:
        known = self.peer_data_map[peer_id].get_addrs() if peer_id in self.peer_data_map else []
        new = [addr for addr in addrs[: 4 * MAX_STORED_ADDRS] if addr not in known]
        super().add_addrs(peer_id, new[: max(0, MAX_STORED_ADDRS - len(known))], ttl)
        if peer_id != self._own:
            self._heard(peer_id, addrs)

    def _enforce_peer_limit(self) -> None:
        excess = len(self.peer_data_map) - self.max_peers
        if excess <= 0:
            return
        oldest = (peer for peer in list(self.peer_data_map) if peer != self._own)
        # Some more than needed, or every further peer would cost a pass over all of them.
        for peer, _ in zip(oldest, range(excess + self.max_peers // 20), strict=False):
            self.peer_record_map.pop(peer, None)
            del self.peer_data_map[peer]


def make_host(
    key_pair: Any,
    security: Mapping[Any, Any],
    *,
    addrs: Callable[[], list[multiaddr.Multiaddr]],
    dial: Callable[[Any], Awaitable[list[Any]]],
    heard: Callable[[Any, Sequence[multiaddr.Multiaddr]], None],
    agent: str,
) -> Any:
    """A `BasicHost` with TCP, `security` and Yamux only, that announces `addrs()` and dials with `dial(peer id)`."""
    apply()
    own = ID.from_pubkey(key_pair.public_key)
    store = BoundedPeerStore(own, heard)
    store.add_key_pair(own, key_pair)
    config = ConnectionConfig(
        min_connections=MAX_CONNECTIONS - MAX_INBOUND,  # the swarm's inbound cap is max - min (network/swarm.py:350)
        low_watermark=MAX_CONNECTIONS - MAX_INBOUND,
        high_watermark=MAX_CONNECTIONS,
        max_connections=MAX_CONNECTIONS,
        inbound_upgrade_timeout=HANDSHAKE_TIMEOUT,
    )
    upgrader = TransportUpgrader(security, {TProtocol(YAMUX): yamux.Yamux})
    swarm = Swarm(own, store, upgrader, transports=[tcp.TCP()], connection_config=config)
    # One address per peer is dialled without a time limit, four times, and the peer is then blacklisted for 60 s
    # (network/swarm.py:733, :889, :701). This is what the library's own protocols (DHT, relay) dial with.
    swarm.dial_peer = dial
    # Entries of the peer store are dialled up to a watermark that 0 does not disable (network/auto_connector.py:300).
    swarm.auto_connector.maybe_connect = _do_nothing
    # Every peer that ever disconnected is remembered for ever, for that dialling (network/auto_connector.py:625).
    swarm.auto_connector.record_disconnect = lambda peer_id: None
    identify.AGENT_VERSION = agent
    host = BasicHost(swarm)
    # Listening on 0.0.0.0 is announced literally, and circuit addresses are cut at the first /p2p/
    # (host/basic_host.py:534). identify, the DHT and DCUtR all ask this one method.
    host.get_addrs = addrs
    _guard_handlers(host)
    return host


async def open_stream(host: Any, connections: Sequence[Any], protocol: str, timeout: float) -> Any:
    """A stream for `protocol` over the best of `connections`, a direct one before a relayed one.

    `BasicHost.new_stream` (host/basic_host.py:899) waits without a limit, for a free place among the connection's 256
    streams and, when it was cancelled, for a reset to be written to a peer that may be frozen; and it dials by itself.
    """
    with trio.fail_after(timeout):
        stream = await host.get_network()._best_connection(connections).new_stream()
        try:
            await host.multiselect_client.select_one_of([TProtocol(protocol)], MultiselectCommunicator(stream), timeout)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
                await stream.reset()
            raise
    stream.set_protocol(TProtocol(protocol))
    return stream


async def _do_nothing() -> None:
    return


def _guard_handlers(host: Any) -> None:
    """The supervisor of stream handlers: an exception ends its own stream, never more.

    Stock, any exception but the expected ones cancels the whole swarm, and the expected ones cancel the other handlers
    and the accept loop of the connection, which stays listed as a zombie (tools/anyio_service/trio_manager.py:365,
    network/connection/swarm_connection.py:226).
    """
    stock = host._swarm_stream_handler

    async def guarded(stream: Any) -> None:
        try:
            await stock(stream)
        except Exception as exc:  # noqa: BLE001 (the top of the task of one stream)
            log.debug("stream %s of %s ended: %r", stream.get_protocol(), stream.muxed_conn.peer_id, exc)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
                await stream.reset()

    host.get_network().set_stream_handler(guarded)


def raise_file_limit(wanted: int = 8192) -> None:
    """Let the process open as many files as MAX_CONNECTIONS sockets and a store need; the usual soft limit is 1024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))

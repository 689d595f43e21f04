"""Direct connections through two NATs: DCUtR over TCP (https://github.com/libp2p/specs/blob/master/relay/DCUtR.md).

Over the relayed connection the two peers exchange where they are seen, and then send their SYNs at the same time, each
from its listen port. Each NAT lets the other's SYN in as the answer to its own; the two kernels make one connection of
them (simultaneous open, RFC 9293 section 3.5). Of the two SYNs the later one always finds the hole open, so a NAT that
drops what it does not expect needs no exact timing. One that refuses it with a RST does: hence half a round trip, and
further tries at once.

On a simultaneous open both sides dialled. As in go-libp2p the one that opened the DCUtR stream, to whom the relayed
connection was inbound, is then the initiator of the handshakes.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import multiaddr
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from p2pnode.errors import NodeError, StreamClosed
from p2pnode.net import sockets
from p2pnode.net.addresses import Address, Interface, Scope, parse, valid
from p2pnode.net.connections import is_inbound, is_relayed
from p2pnode.net.connector import Place, attempt, raw_tcp
from p2pnode.net.dialler import AttemptFailed
from p2pnode.net.relay.wire import receive_message, send_message
from p2pnode.net.transport import Stream
from protocols.announce.records import TokenBucket
from protocols.errors import FrameError, ProtocolError

if TYPE_CHECKING:
    from p2pnode.net.network import Network

log = logging.getLogger(__name__)

T = TypeVar("T")

PROTOCOL = "/libp2p/dcutr"
ROUNDS = 3  # the specification's
PAUSES = (1.0, 11.0)  # s between rounds; Linux NATs remember a refused SYN for 10 s (nf_conntrack_tcp_timeout_close)
EXCHANGE_TIMEOUT = 10.0  # s for the messages over the relay
MAX_WAIT = 2.0  # s; half a round trip is less on any path worth punching for
WINDOW = 5.0  # s in which SYNs are sent
TRY_TIMEOUT = 2.5  # s for one socket: the kernel repeats its SYN after 1 s
REFUSED_TRY = 0.7  # s for one socket where a NAT refused an earlier one: it takes many tries for two to cross
REFUSED_PAUSE = 0.1  # s after a RST
RETRY = 150.0  # s between attempts while nothing changes; Linux NATs forget half-closed connections after 120 s
AGAIN_AFTER = 20.0  # s until a peer is tried again because something changed
ROLE_TIMEOUT = 1.5  # s for the initiator's first words
MULTISTREAM = b"\x13/multistream/1.0.0\n"  # what both sides of a negotiation may say first; only an initiator goes on
HANDSHAKE_TIMEOUT = 5.0
MAX_SYNS = 40  # to one IP in a round: a NAT that answers with RST is tried every few milliseconds, others once or twice
INITIATED_RATE, INITIATED_BURST = 0.5, 24  # rounds per second that we begin: a peer names whom we dial in them
START_DELAY = 0.05  # s for the other side of the relayed connection to have registered it

# What a peer can make us send, were it to name somebody else's addresses: 6 addresses for 5 s are some 30 SYNs, of
# which nobody gets more than 15, 10 times a minute at most.
MAX_TARGETS = 6
MAX_TARGET_IPS = 3
MAX_OWN = 6  # addresses that we send
LOWEST_PORT = 1024
RATE, BURST = 10 / 60, 10  # rounds per second that all peers together can make us take part in
PEER_RATE, PEER_BURST = 4 / 60, 6
MAX_PEERS = 500


def targets(texts: Sequence[str], peer: str, own: Sequence[Interface], lan_outside: bool) -> list[Address]:
    """Which of the addresses that `peer` named may be sent SYNs, bounded; pure.

    Public ones and those of overlay meshes, and of private ones those in our own networks or, where what we ourselves
    are seen at from outside is a private address, all (`lan_outside`: a NAT within a site).
    """
    found: dict[Address, None] = {}
    ips: set[str] = set()
    for text in valid(texts, peer, 4 * MAX_TARGETS):
        address = parse(text)
        if address.ip is None or address.relay is not None or address.port < LOWEST_PORT:
            continue
        near = any(address.ip in interface.network for interface in own)
        if address.scope is Scope.HOST or (address.scope is Scope.LAN and not (near or lan_outside)):
            continue
        if any(address.ip == interface.ip for interface in own):
            continue
        if address.host in ips or len(ips) < MAX_TARGET_IPS:
            ips.add(address.host)
            found[address] = None
    return list(found)[:MAX_TARGETS]


def hole_punch(kind: Any, addrs: Sequence[str] = ()) -> HolePunch:
    """A message. `kind` is HolePunch.CONNECT or SYNC."""
    return HolePunch(type=kind, ObsAddrs=[multiaddr.Multiaddr(addr).to_bytes() for addr in addrs])


async def receive(stream: Stream, kind: int) -> list[str]:
    """The addresses in the next message, which must be of `kind`. Raises `FrameError`, `StreamClosed`."""
    message = await receive_message(stream, HolePunch)
    if message.type != kind:
        raise FrameError("a DCUtR message of another type than expected")
    found = []
    for raw in message.ObsAddrs[: 4 * MAX_TARGETS]:
        try:
            found.append(str(multiaddr.Multiaddr(bytes(raw))))
        except ValueError:  # all of the library's errors are
            continue
    return found


class Puncher:
    """Upgrades relayed connections. `own_addrs()` are those at which we are seen from outside."""

    def __init__(self, network: Network, own_addrs: Callable[[], Sequence[Address]]) -> None:
        self._open_relayed = network.open_relayed
        self._connections = network.connections_book
        self._upgrader = network.connector.upgrader
        self._place = network.place
        self._own_addrs = own_addrs
        self._nursery: trio.Nursery | None = None
        self._active: set[str] = set()
        self._ended: dict[str, float] = {}  # when the last series of rounds with a peer was over
        self._bucket = TokenBucket(RATE, BURST, 0.0)
        self._initiated = TokenBucket(INITIATED_RATE, INITIATED_BURST, 0.0)
        self._buckets: dict[str, TokenBucket] = {}
        self.results: dict[str, str] = {}  # peer -> how the last attempt ended, for those who look
        network.handle(PROTOCOL, self._serve)
        self._connections.new_callbacks.append(self._connected)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:  # a NAT's memory of what was before may have been in the way
                await trio.sleep(RETRY)
                self.retry()

    def retry(self) -> None:
        """Our place in the network changed: try again where it failed before."""
        for peer in self._connections.peers():
            self.retry_peer(peer)

    def retry_peer(self, peer: str) -> None:
        """Ours or the peer's place in the network changed."""
        if trio.current_time() - self._ended.get(peer, float("-inf")) >= AGAIN_AFTER:
            self._start(peer)

    def _connected(self, conn: Any) -> None:
        if is_relayed(conn) and is_inbound(conn):  # the dialler waits for us
            self._start(str(conn.muxed_conn.peer_id))

    def _start(self, peer: str) -> None:
        inbound = any(is_inbound(conn) for conn in self._connections.relayed(peer))
        if self._nursery is None or peer in self._active or self._connections.direct(peer) or not inbound:
            return
        self._active.add(peer)
        self._nursery.start_soon(self._upgrade, peer)

    async def _upgrade(self, peer: str) -> None:
        try:
            await trio.sleep(START_DELAY)
            for number in range(ROUNDS):
                if self._connections.direct(peer) or not self._connections.relayed(peer):
                    return
                if number:
                    await trio.sleep(PAUSES[number - 1])
                try:
                    result = await self._initiate(peer)
                except (NodeError, ProtocolError, trio.TooSlowError) as exc:
                    result = str(exc) or "the peer did not answer"
                self._note(peer, f"round {number + 1}: {result}")
        finally:
            self._active.discard(peer)
            _remember(self._ended, peer, trio.current_time())

    def _note(self, peer: str, result: str) -> None:
        log.info("hole punching with %s, %s", peer, result)
        _remember(self.results, peer, result)

    async def _initiate(self, peer: str) -> str:
        """One round as the side that the relayed connection came in to."""
        now = trio.current_time()
        if self._initiated.delay(now) > 0:
            return "too many hole punches at once"
        self._initiated.take(1, now)
        with trio.fail_after(EXCHANGE_TIMEOUT):
            stream = await self._open_relayed(peer, PROTOCOL)
            done = False
            try:
                began = trio.current_time()
                await send_message(stream, hole_punch(HolePunch.CONNECT, self._own_texts()))
                theirs = await receive(stream, HolePunch.CONNECT)
                rtt = trio.current_time() - began
                await send_message(stream, hole_punch(HolePunch.SYNC))
                done = True
            finally:
                with trio.CancelScope() as quick:
                    quick.deadline = trio.current_time() + 1
                    await (stream.aclose() if done else stream.reset())
        await trio.sleep(min(max(0.0, began + 1.5 * rtt - trio.current_time()), MAX_WAIT))
        return await self._punch(peer, theirs, initiator=True)

    async def _serve(self, stream: Stream) -> None:
        peer = stream.peer
        with trio.move_on_after(EXCHANGE_TIMEOUT) as scope:
            theirs = await receive(stream, HolePunch.CONNECT)
            if not self._allowed(peer):
                raise StreamClosed("too many hole punches at once")
            await send_message(stream, hole_punch(HolePunch.CONNECT, self._own_texts()))
            await receive(stream, HolePunch.SYNC)
        if scope.cancelled_caught:
            raise StreamClosed(f"peer {peer} did not go on with a hole punch")
        self._note(peer, await self._punch(peer, theirs, initiator=False))

    def _own_texts(self) -> list[str]:
        return [str(address) for address in self._own_addrs()][:MAX_OWN]

    def _allowed(self, peer: str) -> bool:
        if not self._connections.relayed(peer) or self._connections.direct(peer):
            return False
        now = trio.current_time()
        own = self._buckets.get(peer) or TokenBucket(PEER_RATE, PEER_BURST, now)
        _remember(self._buckets, peer, own)
        buckets = (own, self._bucket)
        if any(bucket.delay(now) > 0 for bucket in buckets):
            return False
        for bucket in buckets:
            bucket.take(1, now)
        return True

    async def _punch(self, peer: str, theirs: Sequence[str], initiator: bool) -> str:
        """Dial all of the peer's addresses until one answers or the window closes. Returns what happened in words."""
        place = self._place()
        seen = self._own_addrs()
        lan_outside = bool(seen) and all(address.scope is Scope.LAN for address in seen)
        chosen = targets(theirs, peer, place.interfaces, lan_outside)
        if not chosen:
            return "the peer named no address that could be dialled"
        began = trio.current_time()
        failures: dict[str, str] = {}
        dialling: set[trio.CancelScope] = set()
        sent: Counter[str] = Counter()
        async with trio.open_nursery() as nursery:
            for address in chosen:
                nursery.start_soon(self._try_address, address, peer, initiator, place, failures, dialling, sent)
            # Dials are called off when another won, handshakes are not: one cut short in the end would take back
            # the very connection that won.
            with trio.move_on_after(WINDOW):
                while not self._connections.direct(peer) and len(nursery.child_tasks):
                    await trio.sleep(0.05)
            for scope in dialling:
                scope.cancel()
        if self._connections.direct(peer):
            return f"direct after {trio.current_time() - began:.2f} s"
        return "failed (" + "; ".join(f"{addr}: {why}" for addr, why in failures.items()) + ")"

    async def _try_address(
        self,
        address: Address,
        peer: str,
        initiator: bool,
        place: Place,
        failures: dict[str, str],
        dialling: set[trio.CancelScope],
        sent: Counter[str],
    ) -> None:
        assert address.ip is not None
        local = sockets.local_endpoint(place.listening, address.ip.version)
        failures[str(address)] = "no listen port of this IP version"
        deadline = trio.current_time() + WINDOW
        patience = TRY_TIMEOUT
        while (
            local is not None
            and sent[address.host] < MAX_SYNS
            and trio.current_time() < deadline
            and not self._connections.direct(peer)
        ):
            sent[address.host] += 1
            stream: trio.SocketStream | None = None
            with trio.move_on_at(min(trio.current_time() + patience, deadline)) as scope:
                dialling.add(scope)
                try:
                    stream = await sockets.connect_from(local, address.host, address.port)
                except OSError as exc:
                    failures[str(address)] = sockets.reason(exc)
                    if exc.errno in (errno.ENETUNREACH, errno.EACCES, errno.EPERM):
                        break
                    patience = REFUSED_TRY
                    await trio.sleep(REFUSED_PAUSE)
            dialling.discard(scope)
            if stream is None:
                if scope.cancelled_caught:
                    failures[str(address)] = "no answer"
                continue
            try:
                with trio.fail_after(HANDSHAKE_TIMEOUT):
                    await self._make(stream, peer, initiator)
                return
            except trio.TooSlowError:
                failures[str(address)] = "no handshake in time"
            except AttemptFailed as exc:
                failures[str(address)] = str(exc)

    async def _make(self, stream: trio.SocketStream, peer: str, initiator: bool) -> None:
        expected = ID.from_string(peer)
        raw = raw_tcp(stream, initiator)

        async def upgrade() -> Any:
            # If the other's dial failed but ours arrived at its listener, it is the responder like us, and waits.
            raw.is_initiator = initiator or not await _initiator_speaks(raw, stream.socket)
            if raw.is_initiator:
                return await self._upgrader.outbound(raw, expected)
            return await self._upgrader.inbound(raw, expected)

        await attempt(raw, upgrade)


def _remember(what: dict[str, T], peer: str, value: T) -> None:
    """Put an entry at the end and drop the oldest ones past the limit."""
    what.pop(peer, None)
    while len(what) >= MAX_PEERS:
        del what[next(iter(what))]
    what[peer] = value


async def _initiator_speaks(raw: Any, sock: trio.socket.SocketType) -> bool:
    """Whether the other side of a new connection is its initiator: it proposes a protocol, seen without taking its
    words away.

    Some do so only when they have read our greeting, which is the same in both roles. So it is sent here, and the one
    that the library would send left out.
    """

    async def skip_greeting(data: bytes) -> None:
        del raw.write
        if data != MULTISTREAM:
            raise AttemptFailed("the negotiation did not begin with a greeting")

    await raw.write(MULTISTREAM)
    raw.write = skip_greeting
    with trio.move_on_after(ROLE_TIMEOUT):
        while True:
            data = await sock.recv(64, socket.MSG_PEEK)
            if not data or len(data) > len(MULTISTREAM) or not MULTISTREAM.startswith(data):
                return True  # also at the end, where the handshake will find the reason
            await trio.sleep(0.02)
    return False

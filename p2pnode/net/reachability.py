"""Can strangers connect to this node? Found out by asking peers to try (`/p2pnode/reach/1`, protocols/reach.py).

A peer that we are connected to may reach us where a stranger cannot: many NATs let in whom we talked to. So the peer
asked passes the request on to one of its own peers at another IP, and dials itself only when it has none; its own
success through a NAT is then no proof. Failure always is.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from libp2p.crypto.keys import PublicKey
from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.exceptions import HandshakeFailure

from p2pnode.errors import NodeError
from p2pnode.net import sockets
from p2pnode.net.addresses import IP, Address, Interface, Scope, scope_of
from p2pnode.net.connections import Connections, is_relayed
from p2pnode.net.connector import raw_tcp
from p2pnode.net.hardening import LIBRARY_ERRORS
from p2pnode.net.observed import group_of
from p2pnode.net.transport import Stream, StreamHandler, receive_exactly
from protocols import reach
from protocols.announce.records import TokenBucket
from protocols.errors import ProtocolError
from protocols.reach import Outcome

log = logging.getLogger(__name__)

VOTERS = 4  # peers asked at once, of different networks where we have such
ASK_TIMEOUT = 14.0  # s: the peer asked may ask two others in turn
FORWARD_TIMEOUT = 6.0
DIAL_TIMEOUT = 4.0  # s for the dial back: connect, two round trips
HELPERS = 2  # peers that a request is passed on to
SOON = 0.5  # s after a peer came or the network changed: others come with it
RETRY_UNKNOWN = 20.0  # s between rounds without a verdict
RETRY_KNOWN = 240.0  # s between rounds with one
SERVE_RATE = 0.5  # dials per second for all others together ...
SERVE_BURST = 20
PEER_RATE = 0.1  # per second for one peer, which may have two ports to try and passes on what others want
PEER_BURST = 6
MAX_PEERS = 1000  # that are remembered for this


class State(enum.Enum):
    PUBLIC = "public"
    PRIVATE = "private"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Vote:
    """What one peer's dial came to."""

    voter: str
    group: str  # of its IP, see `observed.group_of`
    ip: IP  # that it dialled
    port: int
    reached: bool
    stranger: bool  # whoever dialled has an IP that none of our peers has, so no NAT was waiting for it
    outcome: Outcome = Outcome.UNREACHABLE  # in the dialler's words, which only matter where it did not reach us


@dataclass(frozen=True, slots=True)
class Verdict:
    state: State
    reason: str
    addrs: tuple[Address, ...] = ()  # where we were reached
    voters: tuple[str, ...] = ()
    distance: int = 3  # 0: the voters saw us at a public address, more: they are neighbours of some kind


NO_VOTES = Verdict(State.UNKNOWN, "no peer has tried to connect to this node yet")


def judge(votes: Sequence[Vote], own: Sequence[IP]) -> Verdict:
    """The majority's word, by networks of voters. Pure. `own` are the IPs of this machine: seen at one of them, there
    is no NAT."""
    if not votes:
        return NO_VOTES
    best = min(_distance(vote.ip) for vote in votes)
    votes = [vote for vote in votes if _distance(vote.ip) == best]  # a neighbour in the LAN says nothing of the world
    voters = tuple(dict.fromkeys(vote.voter for vote in votes))
    strong = {vote.group for vote in votes if vote.reached and (vote.stranger or vote.ip in own)}
    weak = {vote.group for vote in votes if vote.reached} - strong
    reached_at = [Address(f"ip{vote.ip.version}", str(vote.ip), vote.port) for vote in votes if vote.reached]
    addrs = tuple(dict.fromkeys(reached_at))
    # A node may have two ports to try (its own and one that a gateway mapped): a voter failed if all of them did.
    failed = {vote.group for vote in votes if not vote.reached} - strong - weak
    if strong and len(strong) >= len(failed):
        return Verdict(
            State.PUBLIC, f"{len(strong)} of {len(strong | failed)} networks could connect", addrs, voters, best
        )
    if failed:
        count = f"{len(failed)} of {len(failed | strong | weak)} networks"
        return Verdict(State.PRIVATE, f"{count} could not connect to {_targets(votes)}", addrs, voters, best)
    why = "only peers this node is connected to could connect, which many NATs allow"
    return Verdict(State.UNKNOWN, why, addrs, voters, best)


def _distance(ip: IP) -> int:
    return {Scope.PUBLIC: 0, Scope.OVERLAY: 1, Scope.LAN: 2, Scope.HOST: 3}[scope_of(ip)]


def _targets(votes: Sequence[Vote]) -> str:
    return ", ".join(sorted({f"{vote.ip} port {vote.port}" for vote in votes if not vote.reached}))


@dataclass(slots=True)
class _Arrival:
    """A dial-back that is awaited, and from where it came."""

    source: IP | None = None


class Nonces:
    """Takes dial-backs: a security "transport" that only ever looks for a nonce, and never makes a connection."""

    def __init__(self) -> None:
        self.expected: dict[bytes, _Arrival] = {}

    async def secure_inbound(self, conn: Any) -> Any:
        nonce = bytearray()
        while len(nonce) < reach.NONCE:
            data = await conn.read(reach.NONCE - len(nonce))
            if not data:
                raise HandshakeFailure("a dial-back ended early")
            nonce += data
        arrival = self.expected.get(bytes(nonce))
        remote = conn.get_remote_address()
        if arrival is None or remote is None:
            raise HandshakeFailure("a dial-back that nobody asked for")
        arrival.source = _plain(remote[0])
        await conn.write(reach.ACCEPTED)
        raise HandshakeFailure("a dial-back, which is no connection")

    async def secure_outbound(self, conn: Any, peer_id: Any) -> Any:
        raise HandshakeFailure("a dial-back is no connection")

    def get_pattern(self) -> str:  # the library asks its own Noise transports for it
        return ""

    def get_public_key(self) -> PublicKey | None:
        return None


class Host(Protocol):
    """What this needs of a network."""

    connections_book: Connections

    def handle(self, protocol: str, handler: StreamHandler) -> None: ...

    async def open_stream(self, peer: str, protocol: str) -> Stream: ...

    def interfaces(self) -> Sequence[Interface]: ...

    def speaks(self, peer: str, protocol: str) -> bool: ...


class Reachability:
    """Asks, answers and judges. `ports()` are the ports to be reached at; `nonces` hears of dial-backs."""

    def __init__(
        self,
        host: Host,
        nonces: Nonces,
        ports: Callable[[], Sequence[int]],
        changed: Callable[[Verdict], None],
    ) -> None:
        self._host = host
        self._ports = ports
        self._changed = changed
        self._nonces = nonces
        self.verdict = NO_VOTES
        self.votes: Sequence[Vote] = ()  # that were last cast
        self._again = trio.Event()
        self._bucket = TokenBucket(SERVE_RATE, SERVE_BURST, 0.0)
        self._buckets: dict[str, TokenBucket] = {}
        host.handle(reach.PROTOCOL, self._serve)

    def recheck(self) -> None:
        """Ask again soon."""
        self._again.set()

    def consider(self, peer: str) -> None:
        """Somebody new who may vote: ask again if there is no verdict, or only one of nearer neighbours."""
        ip = self._ip_of(peer)
        nearer = ip is not None and _distance(ip) < self.verdict.distance
        if self.verdict.state is State.UNKNOWN or nearer:
            self.recheck()

    def forget(self) -> None:
        """What was found out is of another place: begin anew."""
        self.decide(Verdict(State.UNKNOWN, "the network changed; peers are being asked"))
        self.recheck()

    async def run(self) -> None:
        while True:
            self._again = trio.Event()
            votes = await self._round()
            if votes:
                self.decide(judge(votes, [interface.ip for interface in self._host.interfaces()]))
            with trio.move_on_after(RETRY_UNKNOWN if self.verdict.state is State.UNKNOWN else RETRY_KNOWN):
                await self._again.wait()
            await trio.sleep(SOON)

    async def probe(self) -> Sequence[Vote]:
        """Ask peers now. The votes are those of the last round when none of those asked would try so soon again."""
        return await self._round() or self.votes

    def decide(self, verdict: Verdict) -> None:
        before, self.verdict = self.verdict, verdict
        if (before.state, before.addrs) != (verdict.state, verdict.addrs):
            log.info("reachability: %s (%s)", verdict.state.value, verdict.reason)
            self._changed(verdict)

    # Asking

    async def _round(self) -> list[Vote]:
        votes: list[Vote] = []
        async with trio.open_nursery() as nursery:
            for peer, ip in self._voters():
                for port in self._ports():
                    nursery.start_soon(self._ask, peer, ip, port, votes)
        if votes:
            self.votes = tuple(votes)
        return votes

    def _voters(self) -> list[tuple[str, IP]]:
        """Connected peers that can be asked, of different networks and far ones first."""
        found = [(peer, ip) for peer in self._host.connections_book.peers() if (ip := self._ip_of(peer)) is not None]
        found = [(peer, ip) for peer, ip in found if self._host.speaks(peer, reach.PROTOCOL)]
        found.sort(key=lambda each: _distance(each[1]))
        groups: dict[str, int] = {}
        order = []
        for peer, ip in found:
            group = group_of(ip)
            groups[group] = groups.get(group, 0) + 1
            order.append((groups[group], peer, ip))
        order.sort(key=lambda each: each[0])
        return [(peer, ip) for _, peer, ip in order[:VOTERS]]

    async def _ask(self, peer: str, ip: IP, port: int, votes: list[Vote]) -> None:
        nonce = secrets.token_bytes(reach.NONCE)
        arrived = self._nonces.expected[nonce] = _Arrival()
        try:
            with trio.fail_after(ASK_TIMEOUT):
                answer = await self._exchange(peer, reach.Dial(port, nonce))
        except (NodeError, ProtocolError, trio.TooSlowError) as exc:
            log.debug("asking %s to connect back: %r", peer, exc)
            return
        finally:
            del self._nonces.expected[nonce]
        # A dial that we saw arrive was a success whatever the peer says, and one that we did not was none.
        dialled = ipaddress.ip_address(answer.ip)
        if answer.outcome is Outcome.REFUSED or (answer.outcome is Outcome.REACHED and arrived.source is None):
            return
        known = {self._ip_of(other) for other in self._host.connections_book.peers()}
        stranger = arrived.source is not None and arrived.source not in known
        reached = arrived.source is not None
        outcome = Outcome.REACHED if reached else answer.outcome
        votes.append(Vote(peer, group_of(ip), dialled, port, reached, stranger, outcome))

    async def _exchange(self, peer: str, request: reach.Message) -> reach.Result:
        stream = await self._host.open_stream(peer, reach.PROTOCOL)
        done = False
        try:
            await stream.send_all(reach.encode(request))
            answer = await _receive(stream)
            if not isinstance(answer, reach.Result):
                raise ProtocolError("a reach request was answered by something else than a result")
            await stream.aclose()
            done = True
            return answer
        finally:
            if not done:
                await stream.reset()

    # Answering

    async def _serve(self, stream: Stream) -> None:
        with trio.move_on_after(ASK_TIMEOUT):
            request = await _receive(stream)
            match request:
                case reach.Dial(port, nonce):
                    result = await self._dial_asker(stream.peer, port, nonce)
                case reach.Forward(ip, port, nonce):
                    result = await self._dial_for(stream.peer, ip, port, nonce)
                case _:
                    raise ProtocolError("a reach request that is a result")
            await stream.send_all(reach.encode(result))

    async def _dial_asker(self, peer: str, port: int, nonce: bytes) -> reach.Result:
        """Only the IP we see the asker at is dialled, so that nobody can turn us against somebody else."""
        ip = self._ip_of(peer)
        if ip is None or not self._allowed(peer):
            packed = b"\0\0\0\0" if ip is None else ip.packed
            return reach.Result(Outcome.REFUSED, packed)
        if port >= reach.LOWEST_PORT:
            for helper in self._helpers(peer, ip):
                try:
                    with trio.fail_after(FORWARD_TIMEOUT):
                        answer = await self._exchange(helper, reach.Forward(ip.packed, port, nonce))
                except (NodeError, ProtocolError, trio.TooSlowError) as exc:
                    log.debug("passing a dial-back on to %s: %r", helper, exc)
                    continue
                if answer.outcome is not Outcome.REFUSED:
                    return reach.Result(answer.outcome, ip.packed)
        outcome = await dial_back(str(ip), port, nonce)
        return reach.Result(outcome, ip.packed)

    async def _dial_for(self, peer: str, packed: bytes, port: int, nonce: bytes) -> reach.Result:
        """The one asked vouches for the address; we keep to few dials, harmless ports and places that are no LAN of
        ours or anybody's."""
        ip = ipaddress.ip_address(packed)
        scope = scope_of(ip)
        if not self._allowed(peer) or port < reach.LOWEST_PORT or (scope is Scope.HOST and not self._is_host(peer)):
            return reach.Result(Outcome.REFUSED, packed)
        asker = self._ip_of(peer)
        if scope is Scope.LAN and not any(
            ip in each.network and asker in each.network for each in self._host.interfaces() if asker is not None
        ):
            return reach.Result(Outcome.REFUSED, packed)
        if scope is Scope.OVERLAY and (asker is None or scope_of(asker) is not Scope.OVERLAY):
            return reach.Result(Outcome.REFUSED, packed)
        return reach.Result(await dial_back(str(ip), port, nonce), packed)

    def _helpers(self, asker: str, ip: IP) -> list[str]:
        """Peers at other IPs than the asker's, and not of its kind only: a LAN neighbour of ours may be one of it."""
        found = []
        for peer in self._host.connections_book.peers():
            other = self._ip_of(peer)
            if peer != asker and other not in (None, ip) and self._host.speaks(peer, reach.PROTOCOL):
                found.append(peer)
        secrets.SystemRandom().shuffle(found)
        return found[:HELPERS]

    def _allowed(self, peer: str) -> bool:
        now = trio.current_time()
        while len(self._buckets) >= MAX_PEERS:
            del self._buckets[next(iter(self._buckets))]
        buckets = (self._buckets.setdefault(peer, TokenBucket(PEER_RATE, PEER_BURST, now)), self._bucket)
        if any(bucket.delay(now) > 0 for bucket in buckets):
            return False
        for bucket in buckets:
            bucket.take(1, now)
        return True

    def _is_host(self, peer: str) -> bool:
        ip = self._ip_of(peer)
        return ip is not None and scope_of(ip) is Scope.HOST

    def _ip_of(self, peer: str) -> IP | None:
        """The IP of a direct connection with `peer`."""
        for conn in self._host.connections_book.of(peer):
            remote = None if is_relayed(conn) else conn.muxed_conn.get_remote_address()
            if remote is not None:
                return _plain(remote[0])
        return None


def _plain(host: str) -> IP:
    ip = ipaddress.ip_address(host.partition("%")[0])
    return (isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped) or ip


async def dial_back(host: str, port: int, nonce: bytes) -> Outcome:
    """Connect from a port of the system's choice and hand over the nonce."""
    outcome = Outcome.SILENT
    try:
        with trio.fail_after(DIAL_TIMEOUT):
            try:
                stream = await trio.open_tcp_stream(host, port)
            except OSError as exc:
                outcome = _FAILURES[sockets.failure(exc)]
                raise
            outcome = Outcome.STRANGER
            async with stream:
                raw = raw_tcp(stream, True)
                await MultiselectClient().select_one_of([TProtocol(reach.DIALBACK)], MultiselectCommunicator(raw))
                await raw.write(nonce)
                return Outcome.REACHED if await raw.read(1) == reach.ACCEPTED else Outcome.STRANGER
    except (*LIBRARY_ERRORS, trio.TooSlowError) as exc:
        log.debug("dialling back %s port %d: %r", host, port, exc)
        return outcome


_FAILURES = {
    sockets.Failure.REFUSED: Outcome.CLOSED,
    sockets.Failure.SILENT: Outcome.SILENT,
    sockets.Failure.UNREACHABLE: Outcome.UNREACHABLE,
}


async def _receive(stream: Stream) -> reach.Message:
    header = await receive_exactly(stream, reach.HEADER)
    return reach.decode(await receive_exactly(stream, reach.body_size(header)))

"""What peers see us as: the outside of the NATs between us and them, by votes.

Every peer says in identify from where our connection reached it. For a connection that left from the listen port, or
that the peer opened, address and port are one at which we may be reached; for any other only the IP means something.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from p2pnode.errors import UsageError
from p2pnode.net import sockets
from p2pnode.net.addresses import IP, Address, Scope, parse, scope_of
from p2pnode.net.connections import is_inbound, is_relayed

log = logging.getLogger(__name__)

_RANK = {Scope.PUBLIC: 0, Scope.OVERLAY: 1, Scope.LAN: 2, Scope.HOST: 3}


class Mapping(enum.Enum):
    """How the NAT in front of us gives out ports (RFC 4787 section 4.1), as far as observations tell."""

    UNKNOWN = "unknown"
    ENDPOINT_INDEPENDENT = "endpoint-independent"  # one outside port for all peers: holes can be punched
    ENDPOINT_DEPENDENT = "endpoint-dependent"  # another one for each ("symmetric"): nobody can know the next


@dataclass(frozen=True, slots=True)
class Observation:
    """One peer's word: the address it sees us at, and whether the port of it is our listen port's."""

    voter: IP  # where the peer itself is
    seen: Address
    shared: bool  # the connection uses our listen port
    inbound: bool  # the peer opened it, so that its view of the port is what it dialled


def group_of(ip: IP) -> str:
    """Addresses that one party commonly holds many of count as one voter: a /24, of IPv6 a /56."""
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 56), strict=False))


def ranked(observations: Sequence[Observation]) -> list[Address]:
    """Addresses with meaningful ports, public ones first, by the number of voter groups. Pure."""
    return _by_votes((group_of(each.voter), each.seen) for each in observations if each.shared or each.inbound)


def ranked_ips(observations: Sequence[Observation]) -> list[IP]:
    """The IPs we are seen at, public ones first, by the number of voter groups. Pure."""
    ips = _by_votes((group_of(each.voter), Address(each.seen.kind, each.seen.host, 1)) for each in observations)
    return [address.ip for address in ips if address.ip is not None]


def mapping(observations: Sequence[Observation]) -> Mapping:
    """Pure. Needs two voters at different IPs who saw us at the same IP, over connections that we opened."""
    ports: dict[str, dict[IP, int]] = {}
    for each in observations:
        if each.shared and not each.inbound:
            ports.setdefault(each.seen.host, {})[each.voter] = each.seen.port
    verdicts = [len(set(seen.values())) == 1 for seen in ports.values() if len(seen) > 1]
    if not verdicts:
        return Mapping.UNKNOWN
    return Mapping.ENDPOINT_INDEPENDENT if all(verdicts) else Mapping.ENDPOINT_DEPENDENT


def _by_votes(votes: Any) -> list[Address]:
    distinct: Counter[Address] = Counter(address for _, address in dict.fromkeys(votes))
    return sorted(distinct, key=lambda address: (_RANK[address.scope or Scope.HOST], -distinct[address], str(address)))


class ObservedAddresses:
    """Observations of the connections that are up. The library's identify calls `record_observation` and `remove_conn`
    (host/basic_host.py:1318, :1392), as it would call its own manager, which counts ephemeral ports."""

    def __init__(self, listening: Callable[[], Sequence[Address]], changed: Callable[[], None]) -> None:
        self._listening = listening
        self._changed = changed
        self._of: dict[Any, Observation] = {}

    def observations(self) -> list[Observation]:
        return list(self._of.values())

    def endpoints(self) -> list[Address]:
        return ranked(self.observations())

    def ips(self) -> list[IP]:
        return ranked_ips(self.observations())

    def mapping(self) -> Mapping:
        return mapping(self.observations())

    def record_observation(self, conn: Any, observed: Any, _listen: Any) -> None:
        sock = sockets.of_connection(conn)
        if sock is None or is_relayed(conn) or conn.is_closed:
            return
        try:
            seen = parse(str(observed)).with_peer(None)
            local, remote = sock.getsockname(), sock.getpeername()
        except (UsageError, OSError) as exc:
            log.debug("an observed address is of no use: %r", exc)
            return
        if seen.ip is None or seen.relay is not None:
            return
        voter = ipaddress.ip_address(str(remote[0]).partition("%")[0])
        if scope_of(seen.ip) is Scope.HOST and scope_of(voter) is not Scope.HOST:
            return
        shared = local[1] in {address.port for address in self._listening()}
        before = self.endpoints(), self.ips()
        self._of[conn] = Observation(voter, seen, shared, is_inbound(conn))
        if before != (self.endpoints(), self.ips()):
            self._changed()

    def remove_conn(self, conn: Any) -> None:
        self._of.pop(conn, None)

    def addrs(self, min_observers: int = 1) -> list[Any]:
        """For the library: what it should announce beside what we announce ourselves."""
        return []

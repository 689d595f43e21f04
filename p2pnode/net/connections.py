"""Who is connected, directly or through relays, and who wants to know when that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.rcmgr import Direction

from p2pnode.callbacks import call_all
from p2pnode.net.transport import Connection

PeerCallback = Callable[[str], None]


def is_relayed(conn: Any) -> bool:
    return bool(conn.get_connection_type() == ConnectionType.RELAYED)


def is_inbound(conn: Any) -> bool:
    return bool(conn.direction == Direction.INBOUND)


class Connections:
    """The books. The library's notifications arrive at `connected` and `disconnected`."""

    def __init__(self) -> None:
        self._since: dict[str, dict[Any, float]] = {}  # peer -> its live connections and when they came up
        self.connect_callbacks: list[PeerCallback] = []
        self.disconnect_callbacks: list[PeerCallback] = []
        self.upgrade_callbacks: list[PeerCallback] = []
        self.new_callbacks: list[Callable[[Any], None]] = []  # of every connection, with the swarm's object

    def of(self, peer: str) -> list[Any]:
        """The live connections to `peer`, direct ones first, and the latest first among them: when a peer comes back
        from another address, its old connection looks alive for as long as nobody misses an answer on it."""
        since = self._since.get(peer, {})
        return sorted(filter(_is_live, since), key=lambda conn: (is_relayed(conn), -since[conn]))

    def known(self, peer: str) -> list[Any]:
        """All connections to `peer`, those too on which nothing new can begin."""
        return list(self._since.get(peer, {}))

    def every(self) -> list[Any]:
        return [conn for conns in self._since.values() for conn in conns if _is_live(conn)]

    def live(self, peer: str) -> bool:
        return bool(self.of(peer))

    def direct(self, peer: str) -> bool:
        return any(not is_relayed(conn) for conn in self.of(peer))

    def relayed(self, peer: str) -> list[Any]:
        return [conn for conn in self.of(peer) if is_relayed(conn)]

    def peers(self) -> list[str]:
        return [peer for peer in self._since if self.live(peer)]

    def describe(self) -> list[Connection]:
        return [_describe(peer, conn, since) for peer, conns in self._since.items() for conn, since in conns.items()]

    def connected(self, conn: Any) -> None:
        if conn.is_closed:  # it ended before it was announced; the end will not be announced either
            return
        peer = str(conn.muxed_conn.peer_id)
        upgraded = not is_relayed(conn) and bool(self.relayed(peer)) and not self.direct(peer)
        conns = self._since.setdefault(peer, {})
        conns[conn] = trio.current_time()
        if len(conns) == 1:
            call_all(self.connect_callbacks, peer)
        if upgraded:
            call_all(self.upgrade_callbacks, peer)
        call_all(self.new_callbacks, conn)

    def disconnected(self, conn: Any) -> None:
        peer = str(conn.muxed_conn.peer_id)
        conns = self._since.get(peer, {})
        if conns.pop(conn, None) is not None and not conns:
            del self._since[peer]
            call_all(self.disconnect_callbacks, peer)


class Notifee:
    """The library's notifications, passed on to the books."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def connected(self, network: Any, conn: Any) -> None:
        self._connections.connected(conn)

    async def disconnected(self, network: Any, conn: Any) -> None:
        self._connections.disconnected(conn)

    async def opened_stream(self, network: Any, stream: Any) -> None: ...

    async def closed_stream(self, network: Any, stream: Any) -> None: ...

    async def listen(self, network: Any, addr: Any) -> None: ...

    async def listen_close(self, network: Any, addr: Any) -> None: ...


def _is_live(conn: Any) -> bool:
    """Whether streams can be opened on it.

    The library learns of its end some turns later, and until then it would stand in the way of another one; so it would
    while old streams go on after the peer has said that it takes no new ones."""
    return not conn.is_closed and not conn.muxed_conn.is_exhausted


def _describe(peer: str, conn: Any, since: float) -> Connection:
    addr = next(iter(conn.get_transport_addresses()), "")
    rtt = getattr(conn.muxed_conn, "rtt", None)
    direction = "in" if is_inbound(conn) else "out"
    return Connection(peer, str(addr), direction, since, rtt if isinstance(rtt, float) else None, is_relayed(conn))

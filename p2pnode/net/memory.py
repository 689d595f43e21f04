"""An in-memory network: the twin of `Network` for tests and simulations. No byte leaves the process.

fabric = MemoryFabric(nursery)
a, b = fabric.node("a"), fabric.node("b")
b.handle("/echo/1", handler)
stream = await a.open_stream("b", "/echo/1")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from p2pnode.callbacks import call_all
from p2pnode.errors import NodeError, PeerUnreachable, StreamClosed
from p2pnode.net.transport import Buffer, Connection, Provider, Stream, StreamHandler

log = logging.getLogger(__name__)

PIPE_LIMIT = 1 << 20  # bytes one direction holds before the writer waits, as a flow-control window would


class _Pipe:
    """One direction: a bounded byte buffer."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.ended = False
        self.broken = False
        self.changed = trio.Condition()

    async def put(self, data: Buffer) -> None:
        view = memoryview(data)
        async with self.changed:
            while len(view):
                if self.broken or self.ended:
                    raise StreamClosed("the stream is closed")
                room = PIPE_LIMIT - len(self.buffer)
                if room <= 0:
                    await self.changed.wait()
                    continue
                self.buffer += view[:room]
                view = view[room:]
                self.changed.notify_all()

    async def get(self, limit: int) -> bytes:
        async with self.changed:
            while not self.buffer:
                if self.broken:
                    raise StreamClosed("the stream was reset")
                if self.ended:
                    return b""
                await self.changed.wait()
            data = bytes(self.buffer[:limit])
            del self.buffer[:limit]
            self.changed.notify_all()
            return data

    async def finish(self, *, broken: bool) -> None:
        with trio.CancelScope(shield=True):
            async with self.changed:
                self.ended = True
                self.broken = self.broken or broken
                self.changed.notify_all()


class MemoryStream:
    """One end of an in-memory stream (`transport.Stream`)."""

    def __init__(self, peer: str, incoming: _Pipe, outgoing: _Pipe, relayed: bool = False) -> None:
        self._peer = peer
        self._relayed = relayed
        self._in = incoming
        self._out = outgoing

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def relayed(self) -> bool:
        return self._relayed

    @property
    def rtt(self) -> float | None:
        return None

    async def send_all(self, data: Buffer) -> None:
        await self._out.put(data)

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        for part in parts:
            await self._out.put(part)

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._in.get(max_bytes)

    async def receive_parts(self, max_bytes: int) -> Sequence[Buffer]:
        data = await self._in.get(max_bytes)
        return [data] if data else []

    async def aclose(self) -> None:
        await self._out.finish(broken=False)

    async def reset(self) -> None:
        await self._out.finish(broken=True)
        await self._in.finish(broken=True)


class MemoryFabric:
    """The wire between the nodes of one test. `stop(a)` and `stop_relay(a, b)` are its faults.

    Nodes that `relay(a, b)` was called for reach each other through a relay, until `upgrade(a, b)`.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.nodes: dict[str, MemoryNetwork] = {}
        self.relayed: set[frozenset[str]] = set()
        self.near: set[frozenset[str]] = set()

    def node(self, peer_id: str) -> MemoryNetwork:
        node = self.nodes[peer_id] = MemoryNetwork(self, peer_id)
        return node

    def relay(self, a: str, b: str) -> None:
        """Whatever streams these two open from now on are relayed."""
        self.relayed.add(frozenset((a, b)))

    def upgrade(self, a: str, b: str) -> None:
        """A direct connection comes up beside the relayed one, whose streams go on."""
        self.relayed.discard(frozenset((a, b)))
        for here, there in ((a, b), (b, a)):
            call_all(self.nodes[here].upgraded, there)

    async def stop_relay(self, a: str, b: str) -> None:
        """The relay dies: its streams break, direct ones go on."""
        for here, there in ((a, b), (b, a)):
            for stream in self.nodes[here].links.get(there, []):
                if stream.relayed:
                    await stream.reset()

    async def stop(self, peer_id: str) -> None:
        """The node dies: everybody loses it and nobody can dial it."""
        node = self.nodes.pop(peer_id)
        for other in list(node.links):
            await node._lost(other)
            if other in self.nodes:
                await self.nodes[other]._lost(peer_id)


class MemoryNetwork:
    """One node of a `MemoryFabric` (`transport.Transport`)."""

    def __init__(self, fabric: MemoryFabric, peer_id: str) -> None:
        self.fabric = fabric
        self._peer_id = peer_id
        self.handlers: dict[str, StreamHandler] = {}
        self.links: dict[str, list[MemoryStream]] = {}
        self._connected: list[Callable[[str], None]] = []
        self._disconnected: list[Callable[[str], None]] = []
        self.upgraded: list[Callable[[str], None]] = []

    @property
    def peer_id(self) -> str:
        return self._peer_id

    def addrs(self) -> list[str]:
        return [f"/memory/{self._peer_id}/p2p/{self._peer_id}"]

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler

    async def connect(self, peer: str, addrs: Sequence[str] = ()) -> None:
        await trio.lowlevel.checkpoint()
        other = self.fabric.nodes.get(peer)
        if other is None or peer == self._peer_id:
            raise PeerUnreachable(f"peer {peer} cannot be reached")
        if peer not in self.links:
            self.links[peer], other.links[self._peer_id] = [], []
            call_all(self._connected, peer)
            call_all(other._connected, self._peer_id)

    async def open_stream(self, peer: str, protocol: str) -> Stream:
        await self.connect(peer)
        other = self.fabric.nodes[peer]
        if protocol not in other.handlers:
            raise StreamClosed(f"peer {peer} does not speak {protocol}")
        there, back = _Pipe(), _Pipe()
        relayed = frozenset((self._peer_id, peer)) in self.fabric.relayed
        ours = MemoryStream(peer, back, there, relayed)
        theirs = MemoryStream(self._peer_id, there, back, relayed)
        self.links[peer].append(ours)
        other.links[self._peer_id].append(theirs)
        self.fabric.nursery.start_soon(self._serve, other.handlers[protocol], theirs)
        return ours

    @staticmethod
    async def _serve(handler: StreamHandler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except NodeError as exc:
            log.info("handler ended: %r", exc)
            await stream.reset()

    def connections(self) -> list[Connection]:
        return [Connection(peer, f"/memory/{peer}", "out", 0.0, None) for peer in self.links]

    def near(self, peer: str) -> bool:
        return frozenset((self._peer_id, peer)) in self.fabric.near

    def on_connect(self, callback: Callable[[str], None]) -> None:
        self._connected.append(callback)

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        self._disconnected.append(callback)

    def on_upgrade(self, callback: Callable[[str], None]) -> None:
        self.upgraded.append(callback)

    async def _lost(self, peer: str) -> None:
        streams = self.links.pop(peer, None)
        if streams is None:
            return
        for stream in streams:
            await stream.reset()
        call_all(self._disconnected, peer)


class MemoryRouter:
    """A provider registry shared by the nodes of one test (`transport.Router`)."""

    def __init__(self, registry: dict[bytes, set[str]], peer_id: str) -> None:
        self._registry = registry
        self._peer_id = peer_id

    def provide(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._registry.setdefault(key, set()).add(self._peer_id)

    def withdraw(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._registry.get(key, set()).discard(self._peer_id)

    async def find(self, keys: Sequence[bytes]) -> dict[bytes, list[Provider]]:
        await trio.lowlevel.checkpoint()
        found = {key: sorted(self._registry.get(key, set()) - {self._peer_id}) for key in keys}
        return {key: [Provider(peer, ()) for peer in peers] for key, peers in found.items() if peers}

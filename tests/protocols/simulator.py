"""A discrete-event simulator around the real `Swarm`, `Uploads` and HAVE logic: virtual clock, seeded randomness.

Links: every node has an uplink and a downlink (bytes per second), every pair a one-way latency (seconds). A block holds
the sender's uplink for size / up and the receiver's downlink for size / down, one after the other in order (what a fair
scheduler of whole blocks would do). Control frames take the latency and no bandwidth. What a peer says at time t
reaches the other at t + latency, never out of order.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from protocols.cid import CID, Codec
from protocols.exchange import events as ev
from protocols.exchange.messages import MAX_IDS, Priority, ranges_of
from protocols.exchange.picker import Order, bit_test
from protocols.exchange.swarm import NEAR_WEIGHT, Swarm
from protocols.exchange.uploads import Uploads

KIB, MIB = 1 << 10, 1 << 20
MBIT = 1_000_000 / 8
HAVE_INTERVAL = 0.1


def make_keys(count: int, start: int = 0) -> list[bytes]:
    """Binary CIDs that name nothing, as the decision core never looks at bytes."""
    return [CID(Codec.RAW, i.to_bytes(32, "big")).to_bytes() for i in range(start, start + count)]


@dataclass(frozen=True)
class Content:
    """An image as the exchange sees it: an id and its distinct chunks."""

    id: bytes
    keys: list[bytes]
    size: int = 256 * KIB

    @classmethod
    def of(cls, count: int, size: int = 256 * KIB, start: int = 0, id: bytes = b"image") -> Content:
        return cls(id, make_keys(count, start), size)

    @property
    def bytes(self) -> int:
        return self.size * len(self.keys)


@dataclass
class Behaviour:
    """What is wrong with a node. The defaults are an honest one."""

    mute: bool = False  # takes wants and never answers
    lies: bool = False  # sends bytes that do not match
    refuses: bool = False  # DONT_HAVE to everything
    boasts: bool = False  # announces everything, has what it has
    busy_first: int = 0  # answers so many WANT frames with BUSY


@dataclass
class Node:
    sim: Simulator
    name: str
    up: float
    down: float
    behaviour: Behaviour
    swarm: Swarm
    uploads: Uploads = field(default_factory=Uploads)
    store: set[bytes] = field(default_factory=set)
    contents: dict[bytes, Content] = field(default_factory=dict)
    peers: set[str] = field(default_factory=set)
    online: bool = True
    sent_bytes: int = 0
    received_bytes: int = 0
    done: dict[bytes, float] = field(default_factory=dict)
    finds: list[tuple[float, ev.FindProviders]] = field(default_factory=list)
    bans: list[ev.Ban] = field(default_factory=list)
    announced: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    requested: dict[bytes, int] = field(default_factory=lambda: defaultdict(int))
    arrived: list[tuple[float, bytes, str]] = field(default_factory=list)
    on_find: Callable[[ev.FindProviders], None] | None = None
    handled: int = 0
    cpu_seconds: float = 0.0  # of `Swarm.handle`
    longest_event: float = 0.0
    _new: list[bytes] = field(default_factory=list)
    _up_free: float = 0.0
    _down_free: float = 0.0
    _pumping: bool = False
    _timer: float = math.inf

    # Downloading

    def handle(self, event: ev.Event) -> None:
        if not self.online:
            return
        self.handled += 1
        now = self.sim.now
        begin = time.process_time()
        actions = self.swarm.handle(event, now=now)
        taken = time.process_time() - begin
        self.cpu_seconds += taken
        self.longest_event = max(self.longest_event, taken)
        if self.sim.after_event is not None:
            self.sim.after_event(self)
        for action in actions:
            self._act(action)
        at = self.swarm.next_timer()
        if at < self._timer:
            self._timer = max(at, now)
            self.sim.at(self._timer, self._tick)

    def _tick(self) -> None:
        if self.sim.now < self._timer or not self.online:
            return
        self._timer = math.inf
        if self.swarm.next_timer() <= self.sim.now:
            self.handle(ev.Tick())
        else:
            self._timer = self.swarm.next_timer()
            if self._timer < math.inf:
                self.sim.at(self._timer, self._tick)

    def _act(self, action: ev.Action) -> None:
        match action:
            case ev.Request(peer=peer, keys=keys, priority=priority):
                assert 0 < len(keys) <= MAX_IDS and len(set(keys)) == len(keys)
                assert peer in self.peers, "asks a peer that is not there"
                for key in keys:
                    assert key in self.announced[peer], "asks for what was not announced"
                    self.requested[key] += 1
                self.sim.send(self.name, peer, lambda node: node.on_want(self.name, keys, priority))
            case ev.CancelRequest(peer=peer, keys=keys):
                self.sim.send(self.name, peer, lambda node: node.uploads.cancel(self.name, keys))
            case ev.Ban(peer=peer):
                self.bans.append(action)
                self.sim.disconnect(self.name, peer)
            case ev.FindProviders():
                self.finds.append((self.sim.now, action))
                if self.on_find is not None:
                    self.on_find(action)
            case ev.DownloadDone(id=id):
                assert all(key in self.store for key in self.contents[id].keys), "done too early"
                self.done[id] = self.sim.now

    def fetch(self, content: Content, order: Order = Order.RAREST, priority: Priority = Priority.NORMAL) -> None:
        self.contents[content.id] = content
        here = bytes(key in self.store for key in content.keys)
        sizes = [content.size] * len(content.keys)
        self.handle(ev.AddDownload(content.id, content.keys, sizes, here, order, priority))
        for peer in sorted(self.peers):
            self.sim.announce(peer, self.name)
            self.sim.announce(self.name, peer)

    def on_block(self, sender: str, key: bytes, size: int, good: bool) -> None:
        if sender not in self.peers or not self.online:
            return
        self.received_bytes += size
        expected = self.swarm.expects(sender, key)
        assert expected is not None, "an honest peer sent what was never asked for"
        if expected and good:
            self.store.add(key)
            self.arrived.append((self.sim.now, key, sender))
            if not self._new:
                self.sim.at(self.sim.now + HAVE_INTERVAL, self._flush_haves)
            self._new.append(key)
        self.handle(ev.BlockChecked(sender, key, size, good or not expected))

    def _flush_haves(self) -> None:
        new, self._new = set(self._new), []
        for content in self.contents.values():
            keys = new & self.sim.index(content).keys()
            ranges = list(ranges_of([self.sim.index(content)[key] for key in keys]))
            if not ranges:
                continue
            for peer in sorted(self.peers):
                self.sim.send(self.name, peer, lambda n, c=content, r=ranges, k=keys: n.on_have(self.name, c, r, k))

    def on_have(self, peer: str, content: Content, ranges: Sequence[tuple[int, int]], keys: Iterable[bytes]) -> None:
        if content.id in self.contents and content.id not in self.done:
            self.announced[peer].update(keys)
            self.handle(ev.PeerGot(peer, content.id, ranges))

    # Serving

    def on_want(self, peer: str, keys: Sequence[bytes], priority: Priority) -> None:
        if self.behaviour.mute or not self.online:
            return
        if self.behaviour.busy_first > 0:
            self.behaviour.busy_first -= 1
            self.sim.send(self.name, peer, lambda node: node.handle(ev.PeerBusy(self.name, 0.5)))
            return
        lacks = tuple(key for key in keys if key not in self.store or self.behaviour.refuses)
        if lacks:
            self.sim.send(self.name, peer, lambda node: node.handle(ev.PeerLacks(self.name, lacks)))
        rest = [key for key in keys if key in self.store and not self.behaviour.refuses]
        if rest:
            assert self.uploads.want(peer, rest, priority)
            self._pump()

    def _pump(self) -> None:
        if self._pumping or not self.online:
            return
        turn = self.uploads.next()
        if turn is None:
            return
        peer, key = turn
        if peer not in self.peers:
            self.uploads.leave(peer)
            self._pump()
            return
        self._pumping = True
        receiver = self.sim.nodes[peer]
        size = next(c.size for c in self.contents.values() if key in self.sim.index(c))
        self.uploads.queued(peer, key, size)
        self.sent_bytes += size
        now, latency = self.sim.now, self.sim.latency(self.name, peer)
        up_done = now + size / self.up
        receiver._down_free = max(now + latency, receiver._down_free) + size / receiver.down
        arrival = max(up_done + latency, receiver._down_free)
        for second in range(1, int(arrival - now)):
            self.sim.at(now + second + latency, lambda: receiver.handle(ev.PeerProgress(self.name)))
        self.sim.at(arrival, lambda: receiver.on_block(self.name, key, size, not self.behaviour.lies))
        self.sim.at(max(up_done, arrival - latency), lambda: self._took(peer, size))
        self.sim.at(up_done, self._uplink_free)

    def _uplink_free(self) -> None:
        self._pumping = False
        self._pump()

    def _took(self, peer: str, size: int) -> None:
        self.uploads.sent(peer, size)
        self._pump()

    def announce_to(self, other: Node, content: Content) -> None:
        bits = bytearray((len(content.keys) + 7) // 8)
        had = [i for i, key in enumerate(content.keys) if key in self.store or self.behaviour.boasts]
        for i in had:
            bits[i >> 3] |= 0x80 >> (i & 7)
        whole = len(had) == len(content.keys)
        event = ev.PeerHas(self.name, content.id, len(content.keys), None if whole else bytes(bits))
        test = bit_test(event.bits)
        keys = {key for i, key in enumerate(content.keys) if test(i)}

        def arrive(node: Node) -> None:
            node.announced[self.name] |= keys
            node.handle(event)

        self.sim.send(self.name, other.name, arrive)


class Simulator:
    def __init__(self, seed: int = 1, latency: float = 0.001) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.nodes: dict[str, Node] = {}
        self.after_event: Callable[[Node], None] | None = None
        self.default_latency = latency
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._indices: dict[bytes, dict[bytes, int]] = {}

    def index(self, content: Content) -> dict[bytes, int]:
        if content.id not in self._indices:
            self._indices[content.id] = {key: i for i, key in enumerate(content.keys)}
        return self._indices[content.id]

    def latency(self, a: str, b: str) -> float:
        return self.default_latency

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (max(when, self.now), self._count, what))

    def send(self, sender: str, to: str, what: Callable[[Node], None]) -> None:
        """A control frame: `what` runs at the receiver after the latency, if the two are still connected."""

        def arrive() -> None:
            node = self.nodes[to]
            if sender in node.peers and node.online:
                what(node)

        self.at(self.now + self.latency(sender, to), arrive)

    def node(
        self,
        name: str,
        up: float = 100 * MBIT,
        down: float = 100 * MBIT,
        has: Content | None = None,
        part: Iterable[int] | None = None,
        **behaviour: bool | int,
    ) -> Node:
        """Add a node that holds all of `has`, or the chunks numbered `part`; it is connected to nobody yet."""
        wrong = Behaviour(**behaviour)  # type: ignore[arg-type]
        node = Node(self, name, up, down, wrong, Swarm(random.Random(self.rng.random()), name))
        if has is not None:
            node.contents[has.id] = has
            node.store |= set(has.keys) if part is None else {has.keys[i] for i in part}
        self.nodes[name] = node
        return node

    def connect(self, a: str, b: str) -> None:
        for one, two in ((a, b), (b, a)):
            self.nodes[one].peers.add(two)
        for one, two in ((a, b), (b, a)):
            self.nodes[one].handle(ev.PeerJoined(two))
            self.announce(one, two)

    def connect_all(self) -> None:
        names = list(self.nodes)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                self.connect(a, b)

    def announce(self, sender: str, to: str) -> None:
        """AVAILABILITY for what the receiver fetches and the sender knows."""
        source, target = self.nodes[sender], self.nodes[to]
        for id, content in target.contents.items():
            if id in source.contents and id not in target.done:
                source.announce_to(target, content)

    def disconnect(self, a: str, b: str) -> None:
        for one, two in ((a, b), (b, a)):
            node = self.nodes[one]
            if two in node.peers:
                node.peers.discard(two)
                node.announced.pop(two, None)
                node.uploads.leave(two)
                node.handle(ev.PeerLeft(two))

    def kill(self, name: str) -> None:
        for peer in sorted(self.nodes[name].peers):
            self.disconnect(name, peer)
        self.nodes[name].online = False

    def run(self, until: Callable[[], bool], limit: float = 600.0) -> float:
        """Run until the condition holds; returns the time. Fails if nothing is left to happen or time is up."""
        while not until():
            assert self._queue, f"nothing more happens at {self.now:.2f} s"
            when, _, what = heapq.heappop(self._queue)
            assert when <= limit, f"not done after {limit} s of virtual time"
            self.now = when
            what()
        return self.now


def check_invariants(swarm: Swarm) -> None:
    """What must hold between any two events. Looks into the swarm's private state on purpose."""
    asked: dict[bytes, set[str]] = defaultdict(set)
    for name, peer in swarm._peers.items():
        assert peer.in_flight_bytes == sum(size for _, size in peer.in_flight.values())
        for key in peer.in_flight:
            asked[key].add(name)
    assert {key: set(names) for key, names in swarm._requests.items()} == asked
    for key, names in swarm._requests.items():
        assert 1 <= len(names) == len(set(names)) <= 2, "at most one duplicate per block"
        assert swarm._needed(key), "asked for and not needed"
    for d in swarm._downloads.values():
        needed = {i for i, here in enumerate(d.here) if not here}
        assert d.remaining == len(needed)
        assert d.remaining_bytes == sum(d.sizes[i] for i in needed)
        listed = list(d.picker)
        assert len(listed) == len(set(listed)) == len(d.picker)
        requested = {i for i in needed if d.keys[i] in swarm._requests}
        assert requested.isdisjoint(listed), "both to be picked and asked for"
        assert requested | set(listed) == needed, "a block nobody will ever ask for"
        levels = [0] * len(d.keys)
        near = [0] * len(d.keys)
        for peer in swarm._peers.values():
            count, bits = peer.has.get(d.id, (0, None))
            if bits is not None and count == len(d.keys):
                for i in range(count):
                    levels[i] += bit_test(bits)(i)
                    near[i] += peer.near and bit_test(bits)(i)
        assert near == list(d.near_copies)
        levels = [level + NEAR_WEIGHT * (copies > 0) for level, copies in zip(levels, near, strict=True)]
        assert levels == [d.picker.availability(i) for i in range(len(d.keys))]

"""Random events in any order, sensible or not: the swarm's books stay balanced and its actions valid."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocols.exchange import events as ev
from protocols.exchange.messages import Priority, ranges_of
from protocols.exchange.picker import Order
from protocols.exchange.swarm import Swarm
from tests.protocols.simulator import check_invariants, make_keys

KEYS = make_keys(16)
CONTENTS = {b"one": KEYS[:12], b"two": KEYS[6:]}
peers = st.sampled_from("abcd")
ids = st.sampled_from(sorted(CONTENTS))
some = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True)
numbers = st.sets(st.integers(0, 11), max_size=12)


class SwarmMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.swarm = Swarm(random.Random(1))
        self.now = 100.0
        self.present: set[str] = set()

    def tell(self, event: ev.Event) -> None:
        for action in self.swarm.handle(event, now=self.now):
            match action:
                case ev.Request(peer=peer, keys=keys):
                    assert peer in self.present and keys and len(set(keys)) == len(keys)
                    state = self.swarm._peers[peer]
                    for key in keys:
                        assert key not in state.lacks
                        assert any(state.can_have(d, i) for d, i in self.swarm._places(key))
                case ev.Ban(peer=peer):
                    self.present.discard(peer)
                case ev.DownloadDone(id=id):
                    assert self.swarm.stats(id).remaining == 0

    @rule(id=ids, here=numbers, order=st.sampled_from(Order), priority=st.sampled_from(Priority))
    def add(self, id: bytes, here: set[int], order: Order, priority: Priority) -> None:
        if id not in self.swarm._downloads:
            keys = CONTENTS[id]
            flags = bytes(i in here for i in range(len(keys)))
            self.tell(ev.AddDownload(id, keys, [1 << 18] * len(keys), flags, order, priority))

    @rule(id=ids)
    def remove(self, id: bytes) -> None:
        self.tell(ev.RemoveDownload(id))

    @rule(peer=peers)
    def join(self, peer: str) -> None:
        self.present.add(peer)
        self.tell(ev.PeerJoined(peer))

    @rule(peer=peers)
    def leave(self, peer: str) -> None:
        self.present.discard(peer)
        self.tell(ev.PeerLeft(peer))

    @rule(peer=peers, id=ids, bits=st.none() | numbers, count=st.sampled_from([0, 0, 0, 1]))
    def has(self, peer: str, id: bytes, bits: set[int] | None, count: int) -> None:
        size = len(CONTENTS[id]) + count
        field = None if bits is None else sum(1 << (15 - i) for i in bits if i < size).to_bytes(2, "big")
        self.tell(ev.PeerHas(peer, id, size, field))

    @rule(peer=peers, id=ids, got=numbers)
    def got(self, peer: str, id: bytes, got: set[int]) -> None:
        self.tell(ev.PeerGot(peer, id, tuple(ranges_of([i for i in got if i < len(CONTENTS[id])]))))

    @rule(peer=peers, near=st.booleans())
    def near(self, peer: str, near: bool) -> None:
        self.tell(ev.PeerNear(peer, near))

    @rule(peer=peers, seconds=st.floats(0, 1))
    def rtt(self, peer: str, seconds: float) -> None:
        self.tell(ev.PeerRtt(peer, seconds))

    @rule(peer=peers, keys=some)
    def holds(self, peer: str, keys: list[bytes]) -> None:
        self.tell(ev.PeerHolds(peer, keys))

    @rule(peer=peers, keys=some)
    def lacks(self, peer: str, keys: list[bytes]) -> None:
        self.tell(ev.PeerLacks(peer, keys))

    @rule(data=st.data(), good=st.sampled_from([True, True, True, False]))
    def block(self, data: st.DataObject, good: bool) -> None:
        owed = [(name, key) for name, peer in self.swarm._peers.items() for key in [*peer.in_flight, *peer.cancelled]]
        if owed:
            name, key = data.draw(st.sampled_from(owed))
            if not good:
                self.present.discard(name)
            self.tell(ev.BlockChecked(name, key, 1 << 18, good))

    @rule(keys=some)
    def here(self, keys: list[bytes]) -> None:
        self.tell(ev.BlocksHere(keys))

    @rule(keys=some)
    def lost(self, keys: list[bytes]) -> None:
        self.tell(ev.BlocksLost(keys))

    @rule(peer=peers)
    def busy(self, peer: str) -> None:
        self.tell(ev.PeerBusy(peer, 1.0))

    @rule(seconds=st.sampled_from([0.0, 0.05, 1.0, 9.0, 70.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.tell(ev.Tick())

    @invariant()
    def balanced(self) -> None:
        check_invariants(self.swarm)


TestSwarm = SwarmMachine.TestCase
TestSwarm.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

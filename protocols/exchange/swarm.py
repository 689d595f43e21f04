"""The decision core of downloading: what to ask of whom, when to give up waiting, whom to ban.

`Swarm.handle(*events, now)` takes events and answers with actions; `next_timer()` says when to send `Tick`. It is a
plain object without I/O, clock or global random: the same one runs in tests, in the simulator and in the node.

All downloads of a node share one `Swarm`, because they share its peers: a peer's window is for everything asked of
it, and a chunk that two downloads need is asked for once. A *key* is a block's binary CID.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from protocols.exchange.events import (
    Action,
    AddDownload,
    Ban,
    BlockChecked,
    BlocksHere,
    BlocksLost,
    CancelRequest,
    DownloadDone,
    Event,
    FindProviders,
    PeerBusy,
    PeerGot,
    PeerHas,
    PeerHolds,
    PeerJoined,
    PeerLacks,
    PeerLeft,
    PeerMisbehaved,
    PeerNear,
    PeerProgress,
    PeerRtt,
    RemoveDownload,
    Request,
    Tick,
)
from protocols.exchange.messages import MAX_IDS, Priority
from protocols.exchange.neighbours import left_to_neighbours
from protocols.exchange.picker import Order, Random, Scattered, bit_test
from protocols.exchange.state import SNUB_FIRST, Download, DownloadStats, Peer

BAN_SCORE = -7  # libtorrent's trust points: -2 for a bad piece, +1 for a good one, banned at -7
GOOD_SCORE_CAP = 8
BAN_SECONDS = 3600.0
QUEUE_BYTES = 16 << 20  # of all peers together, or chunks come too far out of order for whoever verifies them
MAX_PUSH = 2.0  # one that is slow all the same answers after twice the usual time
SNUB_MAX = 64.0
FIND_INTERVAL = 60.0  # Kraken and boxo ask for more providers once a minute
FIND_RETRY = 5.0
FIND_KEYS = 512
ENDGAME_SCAN = 256
ENDGAME_RECHECK = 0.1
# A chunk that a neighbour has is this many peers less rare, so that others are asked for what no neighbour has.
NEAR_WEIGHT = 64
NEAR_RECHECK = 0.25
MAX_ROOTS = 256  # availabilities remembered per peer


class Swarm:
    """See the module's text. `rng` decides ties; `me` is this node's name among the peers'; the clock's zero does not
    matter, it only has to be monotonic."""

    def __init__(self, rng: Random, me: str = "") -> None:
        self._rng = rng
        self._me = me
        self._peers: dict[str, Peer] = {}
        self._downloads: dict[bytes, Download] = {}
        self._requests: dict[bytes, list[str]] = {}  # key -> peers asked, oldest request first
        self._actions: list[Action] = []
        self._idle: dict[str, None] = {}  # peers that may be asked for more, once all events were taken
        self._asks: dict[tuple[str, Priority], list[bytes]] = {}
        self._near_alone: dict[
            bytes, tuple[float, bool]
        ] = {}  # downloads that were left to neighbours, or not, and when
        self._now = 0.0

    def handle(self, *events: Event, now: float) -> list[Action]:
        """Take events that happened at once; `now` in seconds. Returns what to do, in order."""
        self._now = now
        for event in events:
            self._take(event)
        for name in self._idle:
            self._fill(name)
        self._idle.clear()
        return self._flush()

    def _take(self, event: Event) -> None:
        match event:
            case AddDownload():
                self._add(event)
            case RemoveDownload(id=id):
                self._remove(id)
            case PeerJoined(peer=name):
                self._peers.setdefault(name, Peer(name))
            case PeerLeft(peer=name):
                self._leave(name)
            case PeerHas():
                self._peer_has(event)
            case PeerGot(peer=name, id=id, ranges=ranges):
                self._peer_got(name, id, ranges)
            case PeerHolds(peer=name, keys=keys):
                self._peer_holds(name, keys)
            case PeerNear(peer=name, near=near):
                self._peer_near(name, near)
            case PeerRtt(peer=name, seconds=seconds):
                if name in self._peers:
                    self._peers[name].window.rtt = seconds
            case PeerProgress(peer=name):
                if name in self._peers:
                    self._peers[name].heard = self._now
            case BlockChecked():
                self._checked(event)
            case PeerLacks(peer=name, keys=keys):
                self._peer_lacks(name, keys)
            case PeerBusy(peer=name, seconds=seconds):
                self._peer_busy(name, seconds)
            case PeerMisbehaved(peer=name, points=points, reason=reason):
                self._punish(name, points, reason)
            case BlocksHere(keys=keys):
                for key in keys:
                    self._here(key)
                self._fill_all()
            case BlocksLost(keys=keys):
                self._lost(keys)
            case Tick():
                self._tick()

    def expects(self, peer: str, key: bytes) -> bool | None:
        """Whether a block arriving from `peer` is to be checked and kept: True if it is still needed, False if it was
        asked for and is not needed any more, None if it was never asked for."""
        state = self._peers.get(peer)
        if state is None or (key not in state.in_flight and key not in state.cancelled):
            return None
        return self._needed(key)

    def next_timer(self) -> float:
        """When to send `Tick`, on the clock of `now`; infinite if never."""
        times = [peer.deadline() for peer in self._peers.values()]
        times += [at + NEAR_RECHECK for at, alone in self._near_alone.values() if alone]
        if self._downloads:
            times += [peer.resting_until for peer in self._peers.values() if peer.resting_until > self._now]
            times += [d.find_at for d in self._downloads.values() if d.remaining]
            if self._requests and any(not peer.in_flight for peer in self._peers.values()) and not self._pickable():
                times.append(self._now + ENDGAME_RECHECK)
        return min(times, default=float("inf"))

    def stats(self, id: bytes) -> DownloadStats:
        """Where a download stands. Raises KeyError for one that is not there."""
        d = self._downloads[id]
        peers = [p for p in self._peers.values() if id in p.has or p.holds]
        in_flight = sum(1 for key in self._requests if key in d.index)
        return DownloadStats(
            d.remaining,
            d.remaining_bytes,
            dict(d.received),
            d.duplicate_bytes,
            dict(d.banned),
            len(peers),
            in_flight,
            len(self._unavailable(d, len(d.keys))),
        )

    # Downloads

    def _add(self, event: AddDownload) -> None:
        d = self._downloads[event.id] = Download(event, self._rng)
        for key in event.keys:
            if key in self._requests:
                d.picker.drop(d.index[key])  # another download has asked for it
        for peer in list(self._peers.values()):  # a copy: a peer that claimed nonsense may be banned here
            entry = peer.has.get(d.id)
            if entry is not None:
                self._count_bits(peer, d, entry, +1)
            self._look_again(peer, d)
        d.find_at = self._now + FIND_RETRY
        if not d.remaining:
            self._actions.append(DownloadDone(d.id))
            return
        self._fill_all()

    def _remove(self, id: bytes) -> None:
        d = self._downloads.pop(id, None)
        self._near_alone.pop(id, None)
        if d is None:
            return
        for key in [key for key in self._requests if key in d.index and not self._needed(key)]:
            self._forget_requests(key)
        for peer in self._peers.values():
            peer.has.pop(id, None)
            peer.dry.discard(id)
            peer.fresh.pop(id, None)
            peer.holds = {key for key in peer.holds if self._wanted_anywhere(key)}
            peer.lacks = {key for key in peer.lacks if self._wanted_anywhere(key)}
        self._fill_all()

    def _wanted_anywhere(self, key: bytes) -> bool:
        return any(key in d.index for d in self._downloads.values())

    def _needed(self, key: bytes) -> bool:
        return any((i := d.index.get(key)) is not None and not d.here[i] for d in self._downloads.values())

    def _places(self, key: bytes) -> Iterator[tuple[Download, int]]:
        for d in self._downloads.values():
            index = d.index.get(key)
            if index is not None:
                yield d, index

    def _here(self, key: bytes) -> None:
        for d, index in self._places(key):
            if d.here[index]:
                continue
            d.here[index] = 1
            d.picker.drop(index)
            d.remaining -= 1
            d.remaining_bytes -= d.sizes[index]
            if not d.remaining:
                self._actions.append(DownloadDone(d.id))
        self._forget_requests(key)

    def _lost(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            for d, index in self._places(key):
                if d.here[index]:
                    d.here[index] = 0
                    d.remaining += 1
                    d.remaining_bytes += d.sizes[index]
            self._put_back(key)
        self._fill_all()

    # Peers

    def _leave(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        for id, entry in peer.has.items():
            d = self._downloads.get(id)
            if d is not None:
                self._count_bits(peer, d, entry, -1)
        self._give_up(peer)
        self._fill_all()

    def _give_up(self, peer: Peer) -> None:
        """Take back everything asked of a peer, for others to deliver."""
        keys = list(peer.in_flight)
        peer.in_flight.clear()
        peer.in_flight_bytes = 0
        peer.probe = None
        for key in keys:
            asked = self._requests.get(key, [])
            if peer.name in asked:
                asked.remove(peer.name)
            if not asked:
                self._requests.pop(key, None)
                self._put_back(key)

    @staticmethod
    def _look_again(peer: Peer, d: Download) -> None:
        """Forget what was found out about `peer` and the chunks to pick of `d`."""
        peer.dry.discard(d.id)
        if peer.holds:
            peer.fresh[d.id] = deque(i for key in peer.holds if (i := d.index.get(key)) is not None and i in d.picker)
        else:
            peer.fresh.pop(d.id, None)

    def _count_bits(self, peer: Peer, d: Download, entry: tuple[int, bytearray | None], by: int) -> None:
        count, bits = entry
        if bits is None and not count:
            return
        if by > 0 and count != len(d.keys):
            del peer.has[d.id]
            self._punish(peer.name, 2, "says an image has another number of chunks than it has")
            return
        if bits is None or count != len(d.keys):
            d.near_seeds += by if peer.near and count == len(d.keys) else 0
            return  # those who have everything make no chunk rarer than another
        d.partial_peers += by
        d.picker.seeds_only = not d.partial_peers
        if peer.near:
            d.neighbours.add(peer.name) if by > 0 else d.neighbours.discard(peer.name)
            d.sharers = sorted((self._me, *d.neighbours))
        for index in _ones(bits):
            self._count_copy(peer, d, index, by)

    @staticmethod
    def _count_copy(peer: Peer, d: Download, index: int, by: int) -> None:
        """A peer that has a part of `d` has (`by` = 1) or no longer has (-1) this chunk."""
        if peer.near:
            others = d.near_copies[index] - (by < 0)
            d.near_copies[index] += by
            by = by if others else by * (1 + NEAR_WEIGHT)
        d.picker.change(index, by)

    def _peer_near(self, name: str, near: bool) -> None:
        peer = self._peers.get(name)
        if peer is None or peer.near == near:
            return
        entries = [(self._downloads[id], entry) for id, entry in peer.has.items() if id in self._downloads]
        for d, entry in entries:
            self._count_bits(peer, d, entry, -1)
        peer.near = near
        for d, entry in entries:
            self._count_bits(peer, d, entry, +1)

    def _left_to_near(self, d: Download) -> bool:
        """Whether all that is left to ask for is with neighbours, or theirs to get, and they are fast enough to be left
        alone with it."""
        at, alone = self._near_alone.get(d.id, (float("-inf"), False))
        if at != self._now:
            alone = left_to_neighbours(d, self._peers.values(), self._now)
            self._near_alone[d.id] = self._now, alone
        return alone

    def _peer_has(self, event: PeerHas) -> None:
        peer = self._peers.get(event.peer)
        if peer is None or (event.id not in peer.has and len(peer.has) >= MAX_ROOTS):
            return
        d = self._downloads.get(event.id)
        old = peer.has.pop(event.id, None)
        if d is not None and old is not None:
            self._count_bits(peer, d, old, -1)
        peer.has[event.id] = (event.count, None if event.bits is None else bytearray(event.bits))
        if d is not None:
            self._count_bits(peer, d, peer.has[event.id], +1)
            self._look_again(peer, d)
        self._fill(event.peer)

    def _peer_got(self, name: str, id: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        peer = self._peers.get(name)
        if peer is None:
            return
        d = self._downloads.get(id)
        count, bits = peer.has.get(id, (0, None))
        if bits is None:
            if d is not None and id in peer.has and peer.lacks:  # it lost some and has them again
                for key in [k for k in peer.lacks if any(a <= d.index.get(k, -1) < a + n for a, n in ranges)]:
                    peer.lacks.discard(key)
                    if id in peer.dry and d.index[key] in d.picker:
                        peer.fresh.setdefault(id, deque()).append(d.index[key])
                self._fill(name)
            return
        for first, number in ranges:
            if first + number > count:
                self._punish(name, 2, "says it has chunks that an image does not have")
                return
            low, high = (first + 7) // 8, (first + number) // 8
            if high > low and bits.count(0xFF, low, high) == high - low:
                # A cheap frame must not cost a walk over all that was announced before.
                steps = chain(range(first, 8 * low), range(8 * high, first + number))
            else:
                steps = chain(range(first, first + number))
            for index in steps:
                mask = 0x80 >> (index & 7)
                if bits[index >> 3] & mask:
                    continue
                bits[index >> 3] |= mask
                if d is not None:
                    if peer.near:
                        d.near_progress = self._now
                    self._count_copy(peer, d, index, +1)
                    peer.lacks.discard(d.keys[index])
                    if id in peer.dry and index in d.picker:
                        peer.fresh.setdefault(id, deque()).append(index)
        self._fill(name)

    def _peer_holds(self, name: str, keys: Sequence[bytes]) -> None:
        peer = self._peers.get(name)
        if peer is None:
            return
        for key in keys:
            peer.holds.add(key)
            peer.lacks.discard(key)
            for d, index in self._places(key):
                if index in d.picker:
                    peer.dry.add(d.id) if d.id not in peer.has else None
                    peer.fresh.setdefault(d.id, deque()).append(index)
        self._fill(name)

    def _peer_lacks(self, name: str, keys: Sequence[bytes]) -> None:
        peer = self._peers.get(name)
        if peer is None:
            return
        for key in keys:
            if key not in peer.in_flight:
                continue  # crossed with our cancel
            peer.lacks.add(key)
            peer.holds.discard(key)
            self._unannounce(peer, key)
            self._take_from(peer, key)
            if not self._requests.get(key):
                self._requests.pop(key, None)
                self._put_back(key)
        self._fill_all()

    def _unannounce(self, peer: Peer, key: bytes) -> None:
        """The peer does not have what it announced: it must not count as a source when providers are looked for."""
        for d, index in self._places(key):
            bits = peer.has.get(d.id, (0, None))[1]
            mask = 0x80 >> (index & 7)
            if bits is not None and bits[index >> 3] & mask:
                bits[index >> 3] &= ~mask
                self._count_copy(peer, d, index, -1)

    def _peer_busy(self, name: str, seconds: float) -> None:
        peer = self._peers.get(name)
        if peer is not None:
            peer.resting_until = self._now + min(max(seconds, 0.05), SNUB_MAX)
            peer.cancelled.extend(peer.in_flight)  # what it had read already may still come
            self._give_up(peer)
            self._fill_all()

    def _punish(self, name: str, points: int, reason: str) -> None:
        peer = self._peers.get(name)
        if peer is not None:
            peer.score -= points
            if peer.score <= BAN_SCORE:
                self._ban(peer, reason)

    def _ban(self, peer: Peer, reason: str) -> None:
        for d in self._downloads.values():
            if d.id in peer.has or peer.name in d.received or any(key in d.index for key in peer.in_flight):
                d.banned[peer.name] = reason
        self._actions.append(Ban(peer.name, BAN_SECONDS, reason))
        self._leave(peer.name)

    # Blocks

    def _checked(self, event: BlockChecked) -> None:
        peer = self._peers.get(event.peer)
        needed = self._needed(event.key)
        if peer is not None:
            if not event.good:
                # A block comes whole from one peer: it and nobody else made these bytes.
                for d, _ in self._places(event.key):
                    d.banned[peer.name] = "sent a chunk that does not match its hash"
                self._ban(peer, "sent a chunk that does not match its hash")
                return
            self._measure(peer, event)
            if needed:  # others were not hashed, so they prove nothing
                peer.score = min(peer.score + 1, GOOD_SCORE_CAP)
        if event.good:
            for d, _ in self._places(event.key):
                if needed:
                    d.received[event.peer] = d.received.get(event.peer, 0) + event.size
                else:
                    d.duplicate_bytes += event.size
            others = [name for name in self._requests.get(event.key, ()) if name != event.peer]
            self._here(event.key)
            self._idle |= dict.fromkeys(others)  # the losers of a race may have nothing else to do
        if peer is not None:
            self._idle[peer.name] = None

    def _measure(self, peer: Peer, event: BlockChecked) -> None:
        asked = peer.in_flight.get(event.key)
        if asked is None and event.key in peer.cancelled:
            # One copy for each time it was asked for; what was asked for again after a cancel may come twice.
            peer.cancelled.remove(event.key)
        peer.heard = self._now
        peer.snub = SNUB_FIRST
        peer.resting_until = 0.0
        if asked is not None:
            if peer.probe is not None and peer.probe[0] == event.key:
                peer.window.answered(self._now - peer.probe[1])
                peer.probe = None
            peer.window.received(event.size, self._now - max(asked[0], peer.answered), self._now)
            self._take_from(peer, event.key)
        peer.answered = self._now

    def _take_from(self, peer: Peer, key: bytes) -> None:
        """`peer` no longer owes `key`."""
        request = peer.in_flight.pop(key, None)
        if request is None:
            return
        peer.in_flight_bytes -= request[1]
        if peer.probe is not None and peer.probe[0] == key:
            peer.probe = None
        asked = self._requests.get(key, [])
        if peer.name in asked:
            asked.remove(peer.name)

    def _forget_requests(self, key: bytes) -> None:
        """Nobody has to send `key` any more."""
        for name in list(self._requests.get(key, ())):
            peer = self._peers[name]
            self._take_from(peer, key)
            peer.cancelled.append(key)
            self._actions.append(CancelRequest(name, (key,)))
        self._requests.pop(key, None)

    def _put_back(self, key: bytes) -> None:
        for d, index in self._places(key):
            if d.here[index] or key in self._requests:
                continue
            d.picker.put_back(index)
            for peer in self._peers.values():
                if (d.id in peer.dry or key in peer.holds) and peer.can_have(d, index):
                    waiting = peer.fresh.setdefault(d.id, deque())
                    waiting.appendleft(index) if d.order is Order.SEQUENTIAL else waiting.append(index)

    # Choosing

    def _fill_all(self) -> None:
        # The fastest first: what is left over should not wait for the slowest.
        for name in sorted(self._peers, key=lambda n: -self._peers[n].window.rate):
            self._fill(name)

    def _fill(self, name: str) -> None:
        peer = self._peers.get(name)
        if peer is None or not self._downloads or peer.resting_until > self._now:
            return
        downloads = sorted(self._downloads.values(), key=lambda d: d.priority)
        limit = self._limit(peer)
        while peer.in_flight_bytes < limit and len(peer.in_flight) < MAX_IDS:
            for d in downloads:
                index = self._pick(peer, d)
                if index is not None:
                    self._ask(peer, d, index)
                    break
            else:
                break
        if not peer.in_flight:
            self._endgame(peer, downloads)

    def _limit(self, peer: Peer) -> float:
        """The peer's window; more for those slower than the average, as they may be slow only because little is asked
        of them; but near the end no more than its share by rate, so that all finish together."""
        rate = peer.window.rate
        rates = [p.window.rate for p in self._peers.values() if p.window.rate]
        if len(rates) < 2 or not rate:
            return peer.window.size
        total = sum(rates)
        # Where we are the bottleneck, everybody answers after the same time, so rates follow windows and windows
        # rates: without this push whatever they were first would stay.
        push = min(max(total / len(rates) / rate, 1.0), MAX_PUSH)
        left = sum(d.remaining_bytes for d in self._downloads.values())
        size = min(peer.window.size, max(peer.window.pipe, QUEUE_BYTES / len(rates)))
        return min(size * push, left * rate / total + 1)

    def _pick(self, peer: Peer, d: Download) -> int | None:
        if not len(d.picker):
            return None
        if not peer.near and (d.neighbours or d.near_seeds):
            index = self._pick_own(peer, d)
            if index is not None or self._left_to_near(d):
                return index
        if d.id in peer.has and d.id not in peer.dry:
            bits = bit_test(peer.has[d.id][1])
            lacks = peer.lacks
            has = (lambda i: bits(i) and d.keys[i] not in lacks) if lacks else bits
            try:
                return d.picker.pick(has)
            except Scattered:
                peer.dry.add(d.id)
                held = peer.fresh.get(d.id, ())
                peer.fresh[d.id] = deque(chain(d.picker.all_of(has), held))
        fresh = peer.fresh.get(d.id)
        while fresh:
            index = fresh.popleft()
            if index in d.picker and peer.can_have(d, index):
                d.picker.take(index)
                return index
        return None

    def _pick_own(self, peer: Peer, d: Download) -> int | None:
        """A chunk for a peer elsewhere that no neighbour has and that is ours to get.

        Neighbours who fetch the same share it out among themselves by number, each without asking the others.
        """
        if d.near_seeds or d.id not in peer.has:
            return None
        bits = bit_test(peer.has[d.id][1])

        def own(index: int) -> bool:
            sharer = (index * 0x9E3779B1 >> 16) % len(d.sharers)  # Knuth's multiplicative hash: runs are scattered
            return d.sharers[sharer] == self._me and bits(index) and d.keys[index] not in peer.lacks

        index = d.picker.search(own, NEAR_WEIGHT)
        if index is not None:
            d.picker.take(index)
        return index

    def _ask(self, peer: Peer, d: Download, index: int) -> None:
        key = d.keys[index]
        for other, place in self._places(key):
            if other is not d:
                other.picker.drop(place)
        if not peer.in_flight:
            if peer.answered != self._now:  # else it was busy until this very moment
                peer.window.began(self._now)
            peer.heard = self._now
            peer.probe = (key, self._now)
        peer.in_flight[key] = (self._now, d.sizes[index])
        peer.in_flight_bytes += d.sizes[index]
        self._requests.setdefault(key, []).append(peer.name)
        self._asks.setdefault((peer.name, d.priority), []).append(key)

    def _endgame(self, peer: Peer, downloads: Sequence[Download]) -> None:
        """Nothing is left to ask for: ask an idle peer for the oldest block that one other peer still owes."""
        if self._pickable():
            return
        patience = max(2 * peer.window.mean, ENDGAME_RECHECK)
        for key, asked in islice(self._requests.items(), ENDGAME_SCAN):
            if len(asked) != 1 or asked[0] == peer.name:
                continue
            owner = self._peers[asked[0]]
            if self._now - max(owner.in_flight[key][0], owner.answered) < patience:
                continue  # it is about to come; a copy would be wasted
            for d, index in self._places(key):
                if peer.can_have(d, index):
                    self._ask(peer, d, index)
                    return

    def _pickable(self) -> bool:
        """Whether anything can still be asked for. Blocks that nobody has must not keep the endgame from beginning."""
        for d in self._downloads.values():
            rarest = d.picker.rarest_of_all()
            if len(d.picker) > len(rarest):
                return True
            sources = self._sources(d)
            if any(peer.can_have(d, index) for peer in sources for index in islice(rarest, ENDGAME_SCAN)):
                return True
        return False

    def _sources(self, d: Download) -> list[Peer]:
        """Peers that may have blocks of `d` which `Picker.availability` does not count."""
        return [p for p in self._peers.values() if p.holds or (d.id in p.has and p.has[d.id][1] is None)]

    def _flush(self) -> list[Action]:
        actions, self._actions = self._actions, []
        for (name, priority), keys in self._asks.items():
            # A block may have been asked for and taken back within one event.
            peer = self._peers.get(name)
            kept = tuple(key for key in dict.fromkeys(keys) if peer is not None and key in peer.in_flight)
            actions.extend(Request(name, kept[i : i + MAX_IDS], priority) for i in range(0, len(kept), MAX_IDS))
        self._asks.clear()
        return actions

    # Time

    def _tick(self) -> None:
        self._near_alone.clear()
        for peer in list(self._peers.values()):
            if peer.deadline() <= self._now:
                self._stalled(peer)
        for d in self._downloads.values():
            self._find(d)
        self._fill_all()

    def _stalled(self, peer: Peer) -> None:
        keys = tuple(peer.in_flight)
        peer.cancelled.extend(keys)
        self._actions.append(CancelRequest(peer.name, keys))
        peer.window.timed_out()
        peer.resting_until = self._now + peer.snub
        peer.snub = min(2 * peer.snub, SNUB_MAX)
        self._give_up(peer)

    def _find(self, d: Download) -> None:
        if not d.remaining or d.find_at > self._now:
            return
        unavailable = self._unavailable(d, FIND_KEYS)
        if (
            unavailable
            or self._now - d.found_at >= FIND_INTERVAL
            or not any(d.id in p.has for p in self._peers.values())
        ):
            d.found_at = self._now
            self._actions.append(FindProviders(d.id, tuple(d.keys[i] for i in unavailable)))
        d.find_at = self._now + FIND_RETRY

    def _unavailable(self, d: Download, limit: int) -> list[int]:
        """Blocks wanted that no peer here is known to have."""
        sources = self._sources(d)
        suspects: Iterable[int] = d.picker.rarest_of_all()
        whole = [p.lacks for p in sources if d.id in p.has and p.has[d.id][1] is None]
        if whole:  # then only what it turned out to lack can be missing: not worth a walk over everything
            lacks = (d.index.get(key) for key in min(whole, key=len))
            suspects = (i for i in lacks if i is not None and i in d.picker and not d.picker.availability(i))
        missing = (index for index in suspects if not any(peer.can_have(d, index) for peer in sources))
        return list(islice(missing, limit))


def _ones(bits: bytes | bytearray) -> Iterator[int]:
    """Numbers of the bits that are set."""
    for at, byte in enumerate(bits):
        if byte:
            for offset in range(8):
                if byte & (0x80 >> offset):
                    yield at * 8 + offset

"""Finding the peers nearest to a position, and dividing keys among them. Decisions only; the caller asks the peers.

lookup = Lookup(target, table.closest(target, K), me=me)
while not lookup.done:
    for info in lookup.next_queries(): ask it, then lookup.answered(info.peer, closer) or lookup.failed(info.peer)
lookup.closest()
"""

from __future__ import annotations

import enum
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from protocols.announce.kbuckets import BITS, K, peer_position, shared_bits
from protocols.announce.messages import MAX_ADDRS, PeerInfo

# Kademlia's alpha is 3; libp2p's kad-dht uses 10. A dead peer holds a place until its time-out, so more is faster.
ALPHA = 10
MAX_QUERIES = 128  # of one look-up: 20 and some per hop suffice; lying peers could otherwise lead it on for ever
MAX_CANDIDATES = 200  # kept besides those asked; 10 answers' worth


class _State(enum.Enum):
    NEW = enum.auto()
    ASKED = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()


class Lookup:
    """One iterative look-up: ends when the k nearest peers that live have all answered (Kademlia section 2.3)."""

    def __init__(
        self,
        target: int,
        seeds: Iterable[PeerInfo],
        *,
        me: str,
        k: int = K,
        alpha: int = ALPHA,
        limit: int = MAX_QUERIES,
    ) -> None:
        self.target = target
        self._me = me
        self._k = k
        self._alpha = alpha
        self._left = limit
        self._in_flight = 0
        self._order: list[tuple[int, str]] = []  # (distance, peer), of peers that have not failed
        self._infos: dict[str, PeerInfo] = {}
        self._states: dict[str, _State] = {}
        self._learn(seeds)

    def next_queries(self) -> list[PeerInfo]:
        """The peers to ask now; each must later be reported as answered or failed."""
        chosen = []
        for peer in self._nearest():
            if self._in_flight >= self._alpha or self._left == 0:
                break
            if self._states[peer] is _State.NEW:
                self._states[peer] = _State.ASKED
                self._in_flight += 1
                self._left -= 1
                chosen.append(self._infos[peer])
        return chosen

    def answered(self, peer: str, closer: Sequence[PeerInfo]) -> None:
        """`peer` answered and named `closer`."""
        self._settle(peer, _State.ANSWERED)
        self._learn(closer)

    def failed(self, peer: str) -> None:
        """`peer` did not answer."""
        self._settle(peer, _State.FAILED)
        self._order.remove((peer_position(peer) ^ self.target, peer))

    @property
    def done(self) -> bool:
        """Nothing is in flight and nobody is left to ask."""
        if self._in_flight:
            return False
        return self._left == 0 or all(self._states[peer] is _State.ANSWERED for peer in self._nearest())

    def closest(self) -> list[PeerInfo]:
        """The nearest peers that answered, nearest first, at most k."""
        answered = (peer for _, peer in self._order if self._states[peer] is _State.ANSWERED)
        return [self._infos[peer] for peer, _ in zip(answered, range(self._k), strict=False)]

    def _nearest(self) -> list[str]:
        return [peer for _, peer in self._order[: self._k]]

    def _settle(self, peer: str, state: _State) -> None:
        if self._states.get(peer) is not _State.ASKED:
            raise ValueError(f"peer {peer} was not asked")
        self._states[peer] = state
        self._in_flight -= 1

    def _learn(self, infos: Iterable[PeerInfo]) -> None:
        for info in infos:
            if info.peer == self._me or info.peer in self._states:
                continue
            self._states[info.peer] = _State.NEW
            self._infos[info.peer] = info
            insort(self._order, (peer_position(info.peer) ^ self.target, info.peer))
        while len(self._order) > MAX_CANDIDATES and self._states[self._order[-1][1]] is _State.NEW:
            _, peer = self._order.pop()
            del self._states[peer], self._infos[peer]


def region_bits(target: int, closest: Sequence[int], k: int = K) -> int:
    """How many leading bits a position must share with `target` to be served by the same look-up's result.

    `closest` are the positions of the peers found. With fewer than k the network is no larger than what was found, so
    they serve every position (0). Otherwise every peer that shares more bits with the target than the farthest one
    found is among them: a position in that sub-tree has its nearest peers there too.
    """
    if len(closest) < k:
        return 0
    return min(BITS, 1 + min(shared_bits(target, position) for position in closest))


def region_end(positions: Sequence[int], start: int, bits: int) -> int:
    """Where the run of sorted `positions` from `start` on that share `bits` leading bits with the first ends."""
    free = BITS - bits
    return bisect_left(positions, ((positions[start] >> free) + 1) << free, lo=start)


def responsible(position: int, peers: Sequence[tuple[int, str]], count: int) -> list[str]:
    """The `count` of `peers` (position, id) nearest to `position`, nearest first."""
    return [peer for _, peer in sorted(peers, key=lambda item: item[0] ^ position)[:count]]


MAX_FOUND = 64  # providers of one key in a result: more than a fetcher connects to
MAX_HEARD = 256  # providers of one key remembered while asking: lying peers could name any number


class Findings:
    """Merges what several peers say about who has which key."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._heard: dict[bytes, dict[str, _Heard]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._heard

    def add(self, key: bytes, infos: Iterable[PeerInfo]) -> None:
        """One peer says `infos` provide `key`."""
        for info in infos:
            if info.peer == self._me:
                continue
            heard = self._heard.setdefault(key, {})
            known = heard.get(info.peer)
            if known is not None:
                known.votes += 1
                known.addrs = tuple(dict.fromkeys(known.addrs + info.addrs))[:MAX_ADDRS]
            elif len(heard) < MAX_HEARD:
                heard[info.peer] = _Heard(info.addrs)

    def result(self) -> dict[bytes, list[PeerInfo]]:
        """The providers of each key that has any, those named by most peers first: a lone liar's come last."""
        return {
            key: [
                PeerInfo(peer, known.addrs)
                for peer, known in sorted(heard.items(), key=lambda item: -item[1].votes)[:MAX_FOUND]
            ]
            for key, heard in self._heard.items()
        }


class _Heard:
    __slots__ = ("addrs", "votes")

    def __init__(self, addrs: tuple[str, ...]) -> None:
        self.addrs = addrs
        self.votes = 1

"""The peers a node knows, kept so that those near any position are found: Kademlia's k-buckets, bounded.

Bucket i holds up to K peers that share exactly i leading bits with us. A bucket prefers the peers it has known
longest (Kademlia section 2.2: who was up for long stays up, and a flood of new identities cannot push out peers that
answer); newcomers wait in a cache as large and move up when a peer of the bucket fails. Only peers we have exchanged
a message with belong in here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from hashlib import sha256
from heapq import nsmallest

from protocols.announce.messages import PeerInfo

BITS = 256
K = 20  # Kademlia's k
MAX_FAILURES = 2  # in a row before a peer is dropped; one may be a network hiccup


def key_position(key: bytes) -> int:
    """Where a key's records belong."""
    return int.from_bytes(sha256(key).digest(), "big")


def peer_position(peer: str) -> int:
    """Where a peer stands in the key space."""
    return int.from_bytes(sha256(peer.encode()).digest(), "big")


def shared_bits(a: int, b: int) -> int:
    """How many leading bits two positions share (256 for equal ones)."""
    return BITS - (a ^ b).bit_length()


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table knows of one peer. Times are seconds of the caller's clock."""

    info: PeerInfo
    position: int
    seen: float
    failures: int = 0


@dataclass(slots=True)
class _Bucket:
    live: OrderedDict[str, Entry] = field(default_factory=OrderedDict)  # least recently seen first
    waiting: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    refreshed: float = float("-inf")


class RoutingTable:
    """At most 2 x K peers per bucket; a network of N fills about log2(N / K) + 1 buckets."""

    def __init__(self, me: str, k: int = K) -> None:
        self.me = me
        self.position = peer_position(me)
        self.k = k
        self._buckets = [_Bucket() for _ in range(BITS)]

    def __len__(self) -> int:
        return sum(len(bucket.live) for bucket in self._buckets)

    def __contains__(self, peer: str) -> bool:
        return peer != self.me and peer in self._bucket(peer_position(peer)).live

    def get(self, peer: str) -> PeerInfo | None:
        """What is known of `peer`, if it is in the table."""
        if peer == self.me:
            return None
        entry = self._bucket(peer_position(peer)).live.get(peer)
        return None if entry is None else entry.info

    def seen(self, info: PeerInfo, now: float) -> bool:
        """A message was exchanged with this peer. True if it is new to the table."""
        if info.peer == self.me:
            return False
        position = peer_position(info.peer)
        bucket = self._bucket(position)
        entry = Entry(info, position, now)
        if info.peer in bucket.live:
            bucket.live[info.peer] = entry
            bucket.live.move_to_end(info.peer)
            return False
        if len(bucket.live) < self.k:
            bucket.waiting.pop(info.peer, None)
            bucket.live[info.peer] = entry
            return True
        bucket.waiting[info.peer] = entry
        bucket.waiting.move_to_end(info.peer)
        if len(bucket.waiting) > self.k:
            bucket.waiting.popitem(last=False)
        return False

    def failed(self, peer: str) -> None:
        """This peer could not be reached or did not answer."""
        if peer == self.me:
            return
        bucket = self._bucket(peer_position(peer))
        bucket.waiting.pop(peer, None)
        entry = bucket.live.get(peer)
        if entry is None:
            return
        if entry.failures + 1 < MAX_FAILURES and not bucket.waiting:
            bucket.live[peer] = replace(entry, failures=entry.failures + 1)
            return
        del bucket.live[peer]
        if bucket.waiting:
            name, newest = bucket.waiting.popitem()
            bucket.live[name] = newest

    def closest(self, target: int, count: int) -> list[PeerInfo]:
        """The `count` known peers nearest to `target`, nearest first."""
        entries = (entry for bucket in self._buckets for entry in bucket.live.values())
        return [entry.info for entry in nsmallest(count, entries, key=lambda entry: entry.position ^ target)]

    def stale(self, before: float, count: int) -> list[PeerInfo]:
        """Up to `count` peers not heard of since `before`, the longest silent first: to be pinged."""
        entries = (entry for bucket in self._buckets for entry in bucket.live.values() if entry.seen < before)
        return [entry.info for entry in nsmallest(count, entries, key=lambda entry: entry.seen)]

    def refresh_targets(self, before: float, now: float, entropy: int) -> list[int]:
        """Positions to look up so that every bucket in use, not refreshed since `before`, learns of new peers.

        Marks them refreshed. `entropy` is a random 256-bit number: it fills the bits a bucket leaves open.
        """
        used = [index for index, bucket in enumerate(self._buckets) if bucket.live]
        targets = []
        for index in range((used[-1] + 1) if used else 0):
            bucket = self._buckets[index]
            if bucket.refreshed < before:
                bucket.refreshed = now
                free = BITS - 1 - index
                # our own prefix of `index` bits, then the opposite bit, then random ones
                prefix = (self.position >> free) ^ 1
                targets.append((prefix << free) | (entropy & ((1 << free) - 1)))
        return targets

    def _bucket(self, position: int) -> _Bucket:
        # An equal position would be a SHA-256 collision with ourselves; min() only keeps the index legal.
        return self._buckets[min(shared_bits(self.position, position), BITS - 1)]

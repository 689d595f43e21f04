"""The provider records a node keeps for others, and how much each of them may send. Time is an argument."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocols.announce.messages import MAX_PROVIDERS, MAX_TTL, PeerInfo

# A record costs 180 bytes of a CPython process (measured). In a network of 20 with 8 copies of each record, a sender
# with 100 GB of chunks (400,000 of 256 KiB) puts 160,000 on one peer.
MAX_RECORDS_PER_SENDER = 200_000
# 180 MB when full: when the average node announces 125,000 keys, 30 GB of chunks. Beyond that keys have fewer copies.
MAX_RECORDS = 1_000_000
MAX_PROVIDERS_PER_KEY = 64  # a fetcher asks several peers, and the swarm itself tells of more; 20 go into an answer
MAX_SENDERS = 16_384  # at most 2 KiB of addresses each: 32 MiB


class _Sender:
    __slots__ = ("addrs", "earliest", "peer", "records")

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.addrs: tuple[str, ...] = ()
        self.records: dict[bytes, float] = {}  # key -> when it expires; one batch shares one float
        self.earliest = float("inf")  # no record expires before


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """How many records a store takes."""

    per_sender: int = MAX_RECORDS_PER_SENDER
    total: int = MAX_RECORDS
    per_key: int = MAX_PROVIDERS_PER_KEY
    senders: int = MAX_SENDERS


class RecordStore:
    """Who said they have which key, until when.

    A full store makes room for a sender by dropping records of the one that has most, as long as that one has more:
    no sender can keep others out by filling it.
    """

    def __init__(self, limits: RecordLimits | None = None) -> None:
        self._limits = limits or RecordLimits()
        self._senders: dict[str, _Sender] = {}
        # Most keys have one provider: a tuple only from the second on saves a third of the memory.
        self._keys: dict[bytes, _Sender | tuple[_Sender, ...]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def senders(self) -> int:
        return len(self._senders)

    def set_addrs(self, sender: str, addrs: tuple[str, ...]) -> None:
        """The sender is reachable at `addrs` now; kept only while it has records."""
        known = self._senders.get(sender)
        if known is not None:
            known.addrs = addrs

    def add(self, info: PeerInfo, keys: Sequence[bytes], ttl: float, now: float) -> int:
        """Record that `info.peer` provides `keys` until `now + ttl`. How many of them, from the first, were taken."""
        sender = self._senders.get(info.peer)
        if sender is None:
            if len(self._senders) >= self._limits.senders:
                return 0
            sender = self._senders[info.peer] = _Sender(info.peer)
        sender.addrs = info.addrs
        expires = now + min(ttl, MAX_TTL)
        sender.earliest = min(sender.earliest, expires)
        accepted = 0
        for key in keys:
            if key not in sender.records and not self._make_room(sender, key, expected=len(keys) - accepted):
                break
            if key not in sender.records:
                self._link(key, sender)
            sender.records[key] = expires
            accepted += 1
        if not sender.records:
            del self._senders[sender.peer]
        return accepted

    def remove(self, peer: str, keys: Iterable[bytes] | None) -> int:
        """Forget records of `peer`: of `keys`, or all of them. How many there were."""
        sender = self._senders.get(peer)
        if sender is None:
            return 0
        before = self._count
        for key in list(sender.records) if keys is None else keys:
            if key in sender.records:
                self._unlink(key, sender)
        if not sender.records:
            del self._senders[peer]
        return before - self._count

    def providers(self, key: bytes, now: float, *, offset: int = 0, limit: int = MAX_PROVIDERS) -> list[PeerInfo]:
        """Up to `limit` live providers of `key`. Askers with different `offset` see different ones first."""
        held = self._keys.get(key)
        if held is None:
            return []
        senders = (held,) if isinstance(held, _Sender) else held
        start = offset % len(senders)
        result: list[PeerInfo] = []
        for sender in senders[start:] + senders[:start]:
            if len(result) == limit:
                break
            if sender.records[key] > now:
                result.append(PeerInfo(sender.peer, sender.addrs))
        return result

    def expiry(self, key: bytes, peer: str) -> float | None:
        """When the record that `peer` provides `key` expires; None if there is none."""
        sender = self._senders.get(peer)
        return None if sender is None else sender.records.get(key)

    def expire(self, now: float, at_most: int = 20_000) -> int:
        """Drop up to `at_most` records that have expired (20,000 take 10 ms). How many that were.

        Free while nothing can have expired. What is still there is not handed out all the same.
        """
        before = self._count
        for sender in [sender for sender in self._senders.values() if sender.earliest <= now]:
            left = at_most - (before - self._count)
            old = [key for key, expires in sender.records.items() if expires <= now]
            for key in old[:left]:
                self._unlink(key, sender)
            if len(old) > left:
                break
            if sender.records:
                sender.earliest = min(sender.records.values())
            else:
                del self._senders[sender.peer]
        return before - self._count

    def _make_room(self, sender: _Sender, key: bytes, expected: int) -> bool:
        if len(sender.records) >= self._limits.per_sender:
            return False
        held = self._keys.get(key)
        if isinstance(held, tuple) and len(held) >= self._limits.per_key:
            # The newest announcement displaces the one nearest to its end: that one's provider is likeliest gone.
            oldest = min(held, key=lambda other: other.records[key])
            self._unlink(key, oldest)
            self._drop_if_empty(oldest)
        if self._count >= self._limits.total:
            largest = max(self._senders.values(), key=lambda other: len(other.records))
            # Half of the lead, so that both end up equal, and no more than this request can use; finding the
            # largest looks at every sender and is not done once per key.
            for _ in range(min((len(largest.records) - len(sender.records)) // 2, expected)):
                last = next(reversed(largest.records))
                self._unlink(last, largest)
        return self._count < self._limits.total

    def _link(self, key: bytes, sender: _Sender) -> None:
        held = self._keys.get(key)
        if held is None:
            self._keys[key] = sender
        elif isinstance(held, _Sender):
            self._keys[key] = (held, sender)
        else:
            self._keys[key] = (*held, sender)
        self._count += 1

    def _unlink(self, key: bytes, sender: _Sender) -> None:
        del sender.records[key]
        self._count -= 1
        held = self._keys[key]
        if isinstance(held, _Sender):
            del self._keys[key]
            return
        rest = tuple(other for other in held if other is not sender)
        self._keys[key] = rest[0] if len(rest) == 1 else rest

    def _drop_if_empty(self, sender: _Sender) -> None:
        if not sender.records:
            self._senders.pop(sender.peer, None)


class TokenBucket:
    """A rate in bytes per second with a burst; may be overdrawn once, by one message of any size."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def delay(self, now: float) -> float:
        """Seconds until something may be taken; 0 if now."""
        self._refill(now)
        return 0.0 if self._tokens > 0 else (1 - self._tokens) / self._rate

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether or not it is there."""
        self._refill(now)
        self._tokens -= amount

    def full(self, now: float) -> bool:
        """Has nothing been taken for long enough that a new bucket would be the same?"""
        self._refill(now)
        return self._tokens >= self._burst

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now


# Twice what our own nodes send to one peer. 2 MiB/s of announcements take such a node a fifth of a core.
INTAKE_RATE = 2 << 20
INTAKE_BURST = 8 << 20  # a sender's full share of records at once
MIN_CHARGE = 512  # bytes; what a request costs us at least, however small
MAX_STRIKES = 16  # requests sent although told to wait; concurrent streams of an honest peer may collect a few
BAN = 60.0  # seconds


class _Account:
    __slots__ = ("banned_until", "bucket", "strikes")

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket = bucket
        self.strikes = 0
        self.banned_until = float("-inf")


class Intake:
    """What each peer may ask of us, in bytes of requests and answers together, over all its streams."""

    def __init__(self, rate: float = INTAKE_RATE, burst: float = INTAKE_BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._accounts: dict[str, _Account] = {}

    def admit(self, peer: str, size: int, now: float) -> float:
        """A request of `size` bytes came: 0 if it is to be served, else seconds until the peer should come back."""
        account = self._account(peer, now)
        delay = account.bucket.delay(now)
        if delay == 0:
            account.strikes = 0
            account.bucket.take(max(size, MIN_CHARGE), now)
            return 0.0
        account.strikes += 1
        if account.strikes >= MAX_STRIKES:
            account.strikes = 0
            account.banned_until = now + BAN
        return delay

    def charge(self, peer: str, size: int, now: float) -> None:
        """Answering cost `size` bytes."""
        self._account(peer, now).bucket.take(size, now)

    def banned(self, peer: str, now: float) -> bool:
        """Has this peer kept sending although told to wait?"""
        account = self._accounts.get(peer)
        return account is not None and now < account.banned_until

    def prune(self, now: float) -> None:
        """Forget peers about whom there is nothing to remember."""
        for peer, account in list(self._accounts.items()):
            if account.bucket.full(now) and now >= account.banned_until:
                del self._accounts[peer]

    def _account(self, peer: str, now: float) -> _Account:
        account = self._accounts.get(peer)
        if account is None:
            account = self._accounts[peer] = _Account(TokenBucket(self._rate, self._burst, now))
        return account

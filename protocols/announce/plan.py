"""What a node announces: which of its keys are due, who acknowledged them, when to try again. Time is an argument.

A key waits as fresh, is taken into a round, and then belongs to the batch the round became: due again at half its
records' life, or sooner if too few peers acknowledged it or the network was still small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MAX_ROUND = 20_000  # keys; hashing and sorting them blocks for some 30 ms
BACKOFF_MIN = 2.0  # seconds until the first retry, doubled for each further one
BACKOFF_MAX = 300.0
JOIN_DELAY = 1.0  # until a new peer is told of keys that too few keep: peers arrive in groups when a network starts
SPREAD_DELAY = 10.0  # and of keys that all others keep already: whoever comes to fetch has better things to do at first


@dataclass(eq=False, slots=True)
class Round:
    """Keys being announced together."""

    keys: list[bytes]
    renew: bool  # tell every responsible peer; else only those that do not have the record yet
    started: float
    renew_at: float
    attempt: int
    wanted: dict[bytes, int] = field(default_factory=dict)  # responsible peers of each key
    have: dict[bytes, tuple[str, ...]] = field(default_factory=dict)  # those that are known to keep its record


@dataclass(eq=False, slots=True)
class _Batch:
    keys: list[bytes]
    renew_at: float
    retry_at: float
    attempt: int  # rounds in a row after which too few peers had acknowledged it
    thin: bool  # the network had fewer peers than a key should have copies

    @property
    def due(self) -> float:
        return min(self.renew_at, self.retry_at)


@dataclass(eq=False, slots=True)
class _Own:
    holders: tuple[str, ...] = ()
    owner: Round | _Batch | None = None  # what will announce the key next; None while fresh


class Plan:
    """Every key we announce, and what is next."""

    def __init__(self, replication: int, ttl: float) -> None:
        self._replication = replication
        self._half = ttl / 2
        self._merge = ttl / 30  # renewals so near to each other share a round
        self._keys: dict[bytes, _Own] = {}
        self._fresh: dict[bytes, None] = {}
        self._batches: list[_Batch] = []
        self._unheld = 0
        self._joined = float("-inf")

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    @property
    def pending(self) -> int:
        """Keys nobody acknowledged yet."""
        return self._unheld

    @property
    def fresh(self) -> int:
        """Keys that were never in a round."""
        return len(self._fresh)

    def provide(self, keys: Iterable[bytes]) -> None:
        """Announce `keys` from now on."""
        for key in keys:
            if key not in self._keys:
                self._keys[key] = _Own()
                self._fresh[key] = None
                self._unheld += 1

    def withdraw(self, keys: Iterable[bytes]) -> dict[str, list[bytes]]:
        """Stop announcing `keys`. Which of them each peer keeps a record of."""
        held: dict[str, list[bytes]] = {}
        for key in keys:
            own = self._keys.pop(key, None)
            if own is None:
                continue
            self._fresh.pop(key, None)
            self._unheld -= not own.holders
            for peer in own.holders:
                held.setdefault(peer, []).append(key)
        return held

    def clear(self) -> set[str]:
        """Stop announcing everything. The peers that keep records of ours."""
        holders = {peer for own in self._keys.values() for peer in own.holders}
        self._keys.clear()
        self._fresh.clear()
        self._batches.clear()
        self._unheld = 0
        return holders

    def next_due(self) -> float:
        """When `take` has something: -inf for now, inf for not before something changes."""
        if self._fresh:
            return -math.inf
        return min((batch.due for batch in self._batches), default=math.inf)

    def take(self, now: float) -> Round | None:
        """The next round, which must be given back with `finish`; None if nothing is due."""
        if self._fresh:
            keys = [key for key, _ in zip(self._fresh, range(MAX_ROUND), strict=False)]
            for key in keys:
                del self._fresh[key]
            return self._begin(Round(keys, True, now, now + self._half, 0))
        renewals = sorted(
            (batch for batch in self._batches if batch.renew_at <= now + self._merge), key=lambda batch: batch.renew_at
        )
        if renewals and renewals[0].renew_at <= now:
            return self._begin(Round(self._collect(renewals), True, now, now + self._half, 0))
        retries = [batch for batch in self._batches if batch.retry_at <= now]
        if not retries:
            return None
        renew_at = min(batch.renew_at for batch in retries)
        attempt = max(batch.attempt for batch in retries)
        return self._begin(Round(self._collect(retries), False, now, renew_at, attempt))

    def assign(self, round_: Round, keys: Iterable[bytes], chosen: Sequence[str]) -> dict[str, list[bytes]]:
        """`chosen` are responsible for each of `keys`: of which each of them is to be told. Peers may share a list."""
        live = [key for key in keys if key in self._keys]
        round_.wanted.update(dict.fromkeys(live, len(chosen)))
        if round_.renew:
            return dict.fromkeys(chosen, live)
        told: dict[str, list[bytes]] = {}
        for holders, its in self._by_holders(live).items():
            round_.have.update(dict.fromkeys(its, tuple(peer for peer in chosen if peer in holders)))
            for peer in chosen:
                if peer not in holders:
                    told.setdefault(peer, []).extend(its)
        return told

    def acknowledged(self, round_: Round, peer: str, keys: Iterable[bytes]) -> list[bytes]:
        """`peer` keeps records of `keys` now. Those withdrawn meanwhile: to be withdrawn there, too."""
        late = []
        grown: dict[tuple[str, ...], tuple[str, ...]] = {}  # most keys have the same holders: one tuple for them all

        def grow(holders: tuple[str, ...]) -> tuple[str, ...]:
            if holders not in grown:
                grown[holders] = holders if peer in holders else (*holders, peer)
            return grown[holders]

        for key in keys:
            own = self._keys.get(key)
            if own is None:
                late.append(key)
                continue
            round_.have[key] = grow(round_.have.get(key, ()))
            self._unheld -= not own.holders
            own.holders = grow(own.holders)
        return late

    def finish(self, round_: Round, now: float, jitter: float) -> None:
        """Schedule what comes next for the round's keys. `jitter` (around 1) spreads retries of many nodes."""
        backoff = min(BACKOFF_MAX, BACKOFF_MIN * 2.0 ** min(round_.attempt, 16)) * jitter
        shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        good = _Batch([], round_.renew_at, math.inf, 0, False)
        thin = _Batch([], round_.renew_at, math.inf, 0, True)
        bad = _Batch([], round_.renew_at, now + backoff, round_.attempt + 1, True)
        for key in round_.keys:
            own = self._keys.get(key)
            if own is None or own.owner is not round_:
                continue
            have, wanted = round_.have.get(key, ()), round_.wanted.get(key, 0)
            if round_.renew:
                # Who did not answer a renewal is probably gone, and forgets us before the next one anyway.
                self._unheld += bool(own.holders) - bool(have)
                own.holders = have
            # Neighbouring keys have the same holders: one tuple serves them all.
            own.holders = shared.setdefault(own.holders, own.holders)
            settled = thin if wanted < self._replication else good
            batch = settled if have and len(have) * 2 >= wanted else bad
            batch.keys.append(key)
            own.owner = batch
        if self._joined >= round_.started:
            thin.retry_at = now + SPREAD_DELAY
        self._batches += [batch for batch in (good, thin, bad) if batch.keys]

    def peer_joined(self, now: float) -> bool:
        """A peer is new in the routing table. True if that moved something forward."""
        self._joined = now
        moved = False
        for batch in self._batches:
            delay = JOIN_DELAY if batch.attempt else SPREAD_DELAY
            if batch.thin and batch.retry_at > now + delay:
                batch.retry_at = now + delay
                moved = True
        return moved

    def _by_holders(self, keys: Iterable[bytes]) -> dict[tuple[str, ...], list[bytes]]:
        groups: dict[tuple[str, ...], list[bytes]] = {}
        for key in keys:
            groups.setdefault(self._keys[key].holders, []).append(key)
        return groups

    def _begin(self, round_: Round) -> Round:
        for key in round_.keys:
            self._keys[key].owner = round_
        return round_

    def _collect(self, batches: Iterable[_Batch]) -> list[bytes]:
        """Take the keys of as many of `batches` as fit one round; at least one of them."""
        keys: list[bytes] = []
        taken = set()
        for batch in batches:
            live = [key for key in batch.keys if key in self._keys and self._keys[key].owner is batch]
            if keys and len(keys) + len(live) > MAX_ROUND:
                break
            keys += live
            taken.add(id(batch))
        self._batches = [batch for batch in self._batches if id(batch) not in taken]
        return keys

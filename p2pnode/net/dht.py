"""The DHT: announces what this node has, finds who has what, and keeps other nodes' records.

Kademlia over any `Transport`, with its own protocol (protocols/announce). Two things differ from the textbook: keys
are announced in sweeps over the key space, so that neighbouring keys share one look-up and every responsible peer
gets all its keys over one stream; and every announcement is acknowledged, or made again.
What is not urgent, such as copies for a peer that has just come, gives way to chunks that move (`busy_until`).
"""

from __future__ import annotations

import logging
import math
import random
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from p2pnode.errors import NetworkTimeout, RemoteError
from p2pnode.net.dht_rpc import IDLE_CALLER, Caller, Refused, Server
from p2pnode.net.transport import Provider, Stream, Transport
from protocols.announce import PROTOCOL
from protocols.announce.kbuckets import K, RoutingTable, key_position, peer_position
from protocols.announce.lookup import Findings, Lookup, region_bits, region_end, responsible
from protocols.announce.messages import (
    HEADER,
    MAX_FIND_KEYS,
    MAX_TTL,
    Ack,
    Announce,
    Find,
    Found,
    Hello,
    Message,
    PeerInfo,
    Refusal,
    Withdraw,
    batches,
    clean_addrs,
    fit,
)
from protocols.announce.plan import Plan, Round
from protocols.announce.records import Intake, RecordLimits, RecordStore, TokenBucket
from protocols.errors import FrameError

log = logging.getLogger(__name__)

ASK_TIME = 3.0  # seconds for a HELLO or FIND, dialling included: ten slow round trips
TELL_TIME = 20.0  # for an ANNOUNCE: 160 KB to each of 8 peers over a 1 Mbit/s uplink take 10 s
SHARE_TIME = 60.0  # for all ANNOUNCEs of one pass to one peer, besides four times what they take at our rate
KEY_SIZE = 40  # bytes of a key in a frame, about
MUTE_TIME = 5.0  # seconds for which a peer that let a FIND time out is not asked; twice that the next time, ...
MAX_MUTE_TIME = 60.0  # ... and so on. Other peers name it in every answer, and each look-up would wait for it anew
MAX_MUTE = 1024
FIND_TIME = 9.0  # of one `find`, which promises 10 s
FIND_WIDTH = 10  # peers asked per key: the 8 that should have it and two in case they left or came
COALESCE = 0.2  # wait for more keys: an import hands them over in many small pieces
SWEEPERS = 8  # parts of the key space swept at once in large networks
QUERIES = 64  # requests in flight, all look-ups together
TELLERS = 8  # peers announced to at once by one pass
MAX_TOLD = 64  # peers that hear of new addresses at once; the others with the next frame they get
PASSES = 4  # at once: a slow peer must not hold up the next keys
REFRESH = 600.0  # seconds; libp2p's kad-dht refreshes as often
STALE = 300.0  # a peer not heard of for so long is pinged
TICK = 30.0
PATIENCE = 30.0  # for which look-ups and announcements that can wait give way to chunks that move through this node
REFUSALS = 5  # how often one peer may put off one frame
CLOSE_TIME = 2.0
SLICE = 512  # keys divided among peers between two checkpoints: some 3 ms


@dataclass(frozen=True, slots=True)
class DHTConfig:
    """Settings; the defaults are meant for clusters of 2 to 10,000 nodes."""

    # Kademlia's 20 copies survive an hour of Gnutella's churn. Records here are renewed every quarter of an hour: if
    # even half of the peers left in between, 2^-8 = 0.4 % of the keys would be lost, until the next renewal.
    replication: int = 8
    ttl: int = MAX_TTL  # seconds; renewed at half
    rate: float = 1 << 20  # bytes per second announced to one peer; 27,000 keys
    records: RecordLimits = field(default_factory=RecordLimits)


@dataclass(frozen=True, slots=True)
class DHTStats:
    """A snapshot of a `DHTRouter`."""

    peers: int  # in the routing table
    records: int  # kept for others
    senders: int  # whose records they are
    announced: int  # keys of ours that at least one peer acknowledged
    pending: int  # keys of ours nobody acknowledged yet
    last_error: str | None


class DHTRouter:
    """A node's place in the DHT (`transport.Router`). Works once `run` was started in a nursery."""

    def __init__(self, transport: Transport, config: DHTConfig | None = None) -> None:
        self._transport = transport
        self._config = config or DHTConfig()
        self._me = transport.peer_id
        self.table = RoutingTable(self._me)
        self.records = RecordStore(self._config.records)
        self._intake = Intake()
        self._caller = Caller(transport, self._on_alive, self.table.failed)
        self._server = Server(transport, self._intake, self._answer)
        self._plan = Plan(self._config.replication, self._config.ttl)
        self._withdrawals: dict[str, set[bytes]] = {}
        self._greet: dict[str, None] = {}
        self._locks: dict[str, trio.Lock] = {}  # what is announced and withdrawn at one peer keeps its order
        self._paces: dict[str, TokenBucket] = {}
        self._queries = trio.CapacityLimiter(QUERIES)
        self._mute: OrderedDict[str, tuple[float, float]] = OrderedDict()  # until when, and for how long
        self._changed = trio.Event()  # the plan has something to announce earlier than thought
        self._withdrawn = trio.Event()
        self._arrived = trio.Event()  # somebody to greet
        self._grown = trio.Event()  # somebody new in the table
        self._scope: trio.CancelScope | None = None
        self._last_error: str | None = None
        self.busy_until: Callable[[], float] = lambda: -math.inf  # when the node will be quiet if nothing more moves
        transport.handle(PROTOCOL, self._serve)
        transport.on_connect(self.add_peer)

    def provide(self, keys: Sequence[bytes]) -> None:
        self._plan.provide(keys)
        for waiting in self._withdrawals.values():
            waiting.difference_update(keys)
        self._changed.set()

    def withdraw(self, keys: Sequence[bytes]) -> None:
        self._forget(self._plan.withdraw(keys))

    async def find(self, keys: Sequence[bytes]) -> dict[bytes, list[Provider]]:
        now = trio.current_time()
        findings = Findings(self._me)
        wanted = list(dict.fromkeys(keys))
        for key in wanted:
            findings.add(key, self.records.providers(key, now))
        with trio.move_on_after(FIND_TIME):
            await self._sweep(wanted, lambda region, peers: self._ask_region(region, peers, findings), findings)
        found = findings.result()
        return {key: [Provider(info.peer, info.addrs) for info in infos] for key, infos in found.items()}

    async def ask(self, info: PeerInfo, message: Find) -> Found:
        """One step of a look-up, for those who watch it. Raises `RemoteError`."""
        async with self._queries:
            return await self._caller.find(info, message, ASK_TIME)

    def add_peer(self, peer: str) -> None:
        """`peer` is connected: greet it, and know it from then on if it speaks our protocol."""
        if peer != self._me and peer not in self.table:
            self._greet[peer] = None
            self._arrived.set()

    def moved(self) -> None:
        """We are reachable at other addresses: tell those who are nearest now, others with the next frame."""
        self._greet.update((info.peer, None) for info in self.table.closest(self.table.position, MAX_TOLD))
        self._arrived.set()

    async def bootstrap(self) -> None:
        """Fill the routing table from whom we are connected to."""
        for connection in self._transport.connections():
            self.add_peer(connection.peer)
        await self._greet_all()
        await self._refresh()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce, renew, withdraw, refresh and expire until cancelled or `close`d."""
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                for task in (self._greeting, self._looking, self._announcing, self._withdrawing, self._upkeep):
                    nursery.start_soon(task)
                task_status.started()

    async def close(self) -> None:
        """Stop, and tell every peer that keeps records of ours to forget them; takes at most two seconds."""
        if self._scope is not None:
            self._scope.cancel()
        holders = self._plan.clear() | set(self._withdrawals)
        self._withdrawals.clear()
        limiter = trio.CapacityLimiter(32)

        async def leave(peer: str) -> None:
            async with limiter:
                try:
                    await self._caller.tell(self._info(peer), Withdraw(None), CLOSE_TIME)
                except RemoteError as exc:
                    log.debug("peer %s keeps our records until they expire: %s", peer, exc)

        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIME, shield=True):
            async with trio.open_nursery() as nursery:
                for peer in holders:
                    nursery.start_soon(leave, peer)
            await self._caller.close_idle()

    def stats(self) -> DHTStats:
        return DHTStats(
            peers=len(self.table),
            records=len(self.records),
            senders=self.records.senders,
            announced=len(self._plan) - self._plan.pending,
            pending=self._plan.pending,
            last_error=self._last_error,
        )

    async def _serve(self, stream: Stream) -> None:
        await self._server.serve(stream)

    def _answer(self, sender: PeerInfo, message: Message) -> Message:
        now = trio.current_time()
        match message:
            case Hello():
                self._on_alive(sender)
                self.records.set_addrs(sender.peer, sender.addrs)
                return Hello(clean_addrs(self._transport.addrs()))
            case Announce():
                accepted = self.records.add(sender, message.keys, message.ttl, now)
                if accepted == len(message.keys):
                    return Ack(accepted)
                return Ack(accepted, Refusal.FULL, int(self._config.ttl * 500))
            case Withdraw():
                self.records.remove(sender.peer, message.keys)
                return Ack(len(message.keys or ()))
            case Find():
                return self._answer_find(sender, message, now)
        raise FrameError(f"a {type(message).__name__} is no request")

    def _answer_find(self, sender: PeerInfo, message: Find, now: float) -> Found:
        offset = peer_position(sender.peer)  # different askers see different providers of a popular key
        me = PeerInfo(self._me, clean_addrs(self._transport.addrs()))
        providers = []
        for key in message.keys:
            others = [info for info in self.records.providers(key, now, offset=offset) if info.peer != sender.peer]
            providers.append([me, *others[:-1]] if key in self._plan else others)
        closer: list[PeerInfo] = []
        if message.target is not None:
            near = self.table.closest(int.from_bytes(message.target, "big"), K + 1)
            # Whoever told us no address can be reached by nobody else.
            closer = [info for info in near if info.peer != sender.peer and info.addrs][:K]
        return fit(providers, closer)

    def _on_alive(self, info: PeerInfo) -> None:
        self._greet.pop(info.peer, None)
        self._mute.pop(info.peer, None)
        if self.table.seen(info, trio.current_time()):
            self._grown.set()
            if self._plan.peer_joined(trio.current_time()):
                self._changed.set()

    def _info(self, peer: str) -> PeerInfo:
        return self.table.get(peer) or PeerInfo(peer)

    def _note(self, what: str, exc: RemoteError) -> None:
        self._last_error = f"{what}: {exc}"
        log.info("%s: %s", what, exc)

    # Look-ups

    async def _lookup(self, target: int, keys: Sequence[bytes], findings: Findings | None) -> list[PeerInfo]:
        """The peers nearest to `target`; asks each one passed for `keys`, too."""
        lookup = Lookup(target, self.table.closest(target, K), me=self._me)
        message = Find(tuple(keys), target.to_bytes(32, "big"))

        async def ask(info: PeerInfo) -> None:
            try:
                found = await self._find_at(info, message, findings)
            except RemoteError as exc:
                log.debug("look-up: %s", exc)
                lookup.failed(info.peer)
            else:
                lookup.answered(info.peer, found.closer)
            start()

        def start() -> None:
            for info in lookup.next_queries():
                nursery.start_soon(ask, info)

        async with trio.open_nursery() as nursery:
            start()
        return lookup.closest()

    async def _find_at(self, info: PeerInfo, message: Find, findings: Findings | None) -> Found:
        if self._is_mute(info.peer):
            raise NetworkTimeout(f"peer {info.peer} did not answer lately")
        async with self._queries:
            try:
                found = await self._caller.find(info, message, ASK_TIME)
            except NetworkTimeout:
                self._timed_out(info.peer)
                raise
        self._mute.pop(info.peer, None)
        if findings is not None:
            for key, infos in zip(message.keys, found.providers, strict=True):
                findings.add(key, infos)
        return found

    def _is_mute(self, peer: str) -> bool:
        return peer in self._mute and trio.current_time() < self._mute[peer][0]

    def _timed_out(self, peer: str) -> None:
        if self._is_mute(peer):
            return  # several look-ups were waiting for it at once
        _, before = self._mute.pop(peer, (0.0, MUTE_TIME / 2))
        seconds = min(2 * before, MAX_MUTE_TIME)
        self._mute[peer] = trio.current_time() + seconds, seconds
        while len(self._mute) > MAX_MUTE:
            self._mute.popitem(last=False)

    async def _sweep(
        self,
        keys: Iterable[bytes],
        visit: Callable[[list[bytes], list[PeerInfo]], Awaitable[None]],
        findings: Findings | None = None,
    ) -> None:
        """Call `visit(keys, peers)` for each region of the key space with the K peers nearest to those keys."""
        keys = list(keys)
        if findings is None and keys and len(self.table) < K:
            peers = await self._lookup(self.table.position, (), None)
            if len(peers) < K:  # that was the whole network: it is one region
                await visit(keys, peers)
                return
        entries = sorted((key_position(key), key) for key in keys)
        positions = [position for position, _ in entries]

        async def step(start: int, stop: int) -> int:
            probe = (
                [key for _, key in entries[start : min(stop, start + MAX_FIND_KEYS)]] if findings is not None else []
            )
            peers = await self._lookup(positions[start], probe, findings)
            bits = region_bits(positions[start], [peer_position(info.peer) for info in peers])
            end = min(stop, region_end(positions, start, bits))
            # What was asked along the way was asked of every peer there is for it.
            await visit([key for _, key in entries[start + len(probe) : end]], peers)
            return end

        async def walk(start: int, stop: int) -> None:
            while start < stop:
                start = await step(start, stop)

        if not entries:
            return
        # Up to K nodes, the first step covers everything. Beyond, the rest is cut up and swept side by side.
        first = await step(0, len(entries))
        share = -(-(len(entries) - first) // SWEEPERS)
        async with trio.open_nursery() as nursery:
            for start in range(first, len(entries), share or 1):
                nursery.start_soon(walk, start, min(start + share, len(entries)))

    async def _ask_region(self, keys: list[bytes], peers: list[PeerInfo], findings: Findings) -> None:
        placed = [(peer_position(info.peer), info.peer) for info in peers]
        infos = {info.peer: info for info in peers}
        order: dict[bytes, list[str]] = {}
        for index, key in enumerate(keys):
            if index % SLICE == 0:
                await trio.lowlevel.checkpoint()
            order[key] = responsible(key_position(key), placed, K)

        async def wave(wanted: dict[str, list[bytes]]) -> None:
            async with trio.open_nursery() as nursery:
                for peer, its in wanted.items():
                    for start in range(0, len(its), MAX_FIND_KEYS):
                        nursery.start_soon(ask, infos[peer], tuple(its[start : start + MAX_FIND_KEYS]))

        async def ask(info: PeerInfo, its: tuple[bytes, ...]) -> None:
            try:
                await self._find_at(info, Find(its, None), findings)
            except RemoteError as exc:
                log.debug("look-up: %s", exc)

        wanted: dict[str, list[bytes]] = {}
        for key in keys:
            for peer in order[key][:FIND_WIDTH]:
                wanted.setdefault(peer, []).append(key)
        await wave(wanted)
        # Who announced may have seen another network than we do: ask the rest about what was not found.
        wanted = {}
        for key in keys:
            if key not in findings:
                for peer in order[key][FIND_WIDTH:]:
                    wanted.setdefault(peer, []).append(key)
        await wave(wanted)

    # Announcing

    async def _announcing(self) -> None:
        limiter = trio.CapacityLimiter(PASSES)
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                with trio.move_on_at(self._next_round()):
                    await self._changed.wait()
                if self._plan.fresh:
                    await trio.sleep(COALESCE)
                elif trio.current_time() < self._next_round():
                    continue
                round_ = self._plan.take(trio.current_time())
                if round_ is not None:
                    await limiter.acquire_on_behalf_of(round_)
                    nursery.start_soon(self._pass, round_, limiter)

    def _next_round(self) -> float:
        """When to announce next: new keys at once, whatever moves."""
        due = self._plan.next_due()
        return due if self._plan.fresh else self._when_quiet(due)

    def _when_quiet(self, due: float) -> float:
        """When to do what is due at `due` and can wait."""
        return max(due, min(self.busy_until(), due + PATIENCE))

    async def _pass(self, round_: Round, limiter: trio.CapacityLimiter) -> None:
        try:
            await self._announce(round_)
        finally:
            limiter.release_on_behalf_of(round_)
            self._plan.finish(round_, trio.current_time(), random.uniform(0.8, 1.2))
            self._changed.set()

    async def _announce(self, round_: Round) -> None:
        share: dict[str, list[bytes]] = {}
        infos: dict[str, PeerInfo] = {}

        async def divide(keys: list[bytes], peers: list[PeerInfo]) -> None:
            placed = [(peer_position(info.peer), info.peer) for info in peers]
            infos.update((info.peer, info) for info in peers)
            replication = self._config.replication
            everybody = tuple(info.peer for info in peers) if len(peers) <= replication else None
            for start in range(0, len(keys), SLICE):
                await trio.lowlevel.checkpoint()
                chosen: dict[tuple[str, ...], list[bytes]] = {}
                if everybody is not None:
                    chosen[everybody] = keys[start : start + SLICE]
                else:
                    for key in keys[start : start + SLICE]:
                        nearest = tuple(responsible(key_position(key), placed, replication))
                        chosen.setdefault(nearest, []).append(key)
                for nearest, its in chosen.items():
                    for peer, told in self._plan.assign(round_, its, nearest).items():
                        share.setdefault(peer, []).extend(told)

        await self._sweep(round_.keys, divide)
        limiter = trio.CapacityLimiter(TELLERS)
        async with trio.open_nursery() as nursery:
            for peer, keys in share.items():
                nursery.start_soon(self._announce_to, infos[peer], keys, round_, limiter)

    async def _announce_to(
        self, info: PeerInfo, keys: list[bytes], round_: Round, limiter: trio.CapacityLimiter
    ) -> None:
        async with limiter:
            with trio.move_on_after(SHARE_TIME + 4 * KEY_SIZE * len(keys) / self._config.rate) as scope:
                try:
                    for batch in batches(keys):
                        async with self._lock(info.peer):
                            current = tuple(key for key in batch if key in self._plan)
                            ack = await self._announce_batch(info, current)
                            late = self._plan.acknowledged(round_, info.peer, current[: ack.accepted])
                        if late:
                            self._forget({info.peer: late})
                        if ack.refusal is not None:
                            raise Refused(info.peer, ack.retry_after / 1000)
                except RemoteError as exc:
                    self._note("announcing", exc)
            if scope.cancelled_caught:
                self._note("announcing", NetworkTimeout(f"peer {info.peer} takes our records too slowly"))

    async def _announce_batch(self, info: PeerInfo, keys: tuple[bytes, ...]) -> Ack:
        if not keys:
            return Ack(0)
        for _ in range(REFUSALS):
            await self._pace(info.peer, HEADER + sum(len(key) + 2 for key in keys))
            try:
                return await self._caller.tell(info, Announce(keys, self._config.ttl), TELL_TIME)
            except Refused as exc:
                if exc.retry_after > TELL_TIME:
                    raise
                await trio.sleep(exc.retry_after)
        raise RemoteError(f"peer {info.peer} put us off {REFUSALS} times")

    async def _pace(self, peer: str, size: int) -> None:
        """Wait until `size` bytes to `peer` are within our rate."""
        now = trio.current_time()
        # A second's worth at once: what is sent in the next seconds evens it out.
        bucket = self._paces.setdefault(peer, TokenBucket(self._config.rate, self._config.rate, now))
        delay = bucket.delay(now)
        bucket.take(size, now)
        await trio.sleep(delay)

    # Withdrawing

    def _forget(self, holders: dict[str, list[bytes]]) -> None:
        """Have `holders` told that we no longer have those keys."""
        for peer, keys in holders.items():
            self._withdrawals.setdefault(peer, set()).update(keys)
        if holders:
            self._withdrawn.set()

    async def _withdrawing(self) -> None:
        while True:
            await self._withdrawn.wait()
            self._withdrawn = trio.Event()
            await trio.sleep(COALESCE)
            limiter = trio.CapacityLimiter(TELLERS)
            async with trio.open_nursery() as nursery:
                for peer in list(self._withdrawals):
                    nursery.start_soon(self._withdraw_at, peer, limiter)

    async def _withdraw_at(self, peer: str, limiter: trio.CapacityLimiter) -> None:
        async with limiter, self._lock(peer):
            keys = [key for key in self._withdrawals.pop(peer, ()) if key not in self._plan]
            try:
                for batch in batches(keys):
                    await self._pace(peer, HEADER + sum(len(key) + 2 for key in batch))
                    await self._caller.tell(self._info(peer), Withdraw(batch), TELL_TIME)
            except RemoteError as exc:
                # Once is enough: what it does not hear of expires.
                self._note("withdrawing", exc)

    def _lock(self, peer: str) -> trio.Lock:
        return self._locks.setdefault(peer, trio.Lock())

    # Keeping the table and the records

    async def _greeting(self) -> None:
        while True:
            await self._arrived.wait()
            await trio.sleep(COALESCE)
            self._arrived = trio.Event()
            await self._greet_all()

    async def _looking(self) -> None:
        """Learn the whole of a small network as it grows; in a large one the refreshes suffice."""
        while True:
            await self._grown.wait()
            await trio.sleep(COALESCE)
            due = trio.current_time()
            while (at := self._when_quiet(due)) > trio.current_time():
                await trio.sleep_until(at)
            self._grown = trio.Event()
            if len(self.table) <= K:
                await self._lookup(self.table.position, (), None)

    async def _greet_all(self) -> None:
        """Greet everybody who was not yet."""
        peers, self._greet = self._greet, {}
        await self._ping([PeerInfo(peer) for peer in peers])

    async def _ping(self, infos: Iterable[PeerInfo]) -> None:
        async def ping(info: PeerInfo) -> None:
            try:
                async with self._queries:
                    await self._caller.hello(info, ASK_TIME)
            except RemoteError as exc:
                log.debug("peer %s: %s", info.peer, exc)

        async with trio.open_nursery() as nursery:
            for info in infos:
                nursery.start_soon(ping, info)

    async def _refresh(self) -> None:
        """Look up ourselves, and something in each bucket not looked at for long."""
        now = trio.current_time()
        if len(await self._lookup(self.table.position, (), None)) < K:
            return  # that was the whole network
        for target in self.table.refresh_targets(now - REFRESH, now, secrets.randbits(256)):
            await self._lookup(target, (), None)

    async def _upkeep(self) -> None:
        refreshed = trio.current_time()
        while True:
            await trio.sleep(TICK)
            now = trio.current_time()
            while self.records.expire(now):
                await trio.lowlevel.checkpoint()
            self._intake.prune(now)
            self._paces = {peer: bucket for peer, bucket in self._paces.items() if not bucket.full(now)}
            self._locks = {peer: lock for peer, lock in self._locks.items() if lock.locked()}
            await self._caller.close_idle(now - IDLE_CALLER)
            await self._ping(self.table.stale(now - STALE, K))
            if now - refreshed >= REFRESH:
                refreshed = now
                await self._refresh()

"""All exchange sessions of a node: feeds what peers send to the decision cores and does what they decide.

`protocols.exchange.swarm.Swarm` decides what to ask of whom, `Uploads` what to send to whom. Here are the tasks: two
per session, one timer, one that spreads HAVEs, and a few that read chunks for peers. Decisions are made synchronously;
no await stands between reading and changing shared state.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import trio

from p2pnode.callbacks import call_all
from p2pnode.errors import NodeError, PeerUnreachable, RemoteError, StoreError, UsageError
from p2pnode.net.transport import Buffer, Stream, Transport
from p2pnode.nix.trust import TrustedKeys
from p2pnode.store import Store
from p2pnode.swarm.download import Download
from p2pnode.swarm.holdings import Holdings
from p2pnode.swarm.intake import Intake, Sink
from p2pnode.swarm.records import RecordBook
from p2pnode.swarm.session import PeerSession
from p2pnode.swarm.traffic import PeerTraffic, Traffic
from protocols.cid import CID, Codec
from protocols.exchange import PROTOCOL_ID
from protocols.exchange import events as ev
from protocols.exchange import messages as m
from protocols.exchange.picker import Order
from protocols.exchange.state import DownloadStats
from protocols.exchange.swarm import Swarm
from protocols.exchange.uploads import Uploads
from protocols.manifest import MAX_BLOCK

log = logging.getLogger(__name__)

HAVE_INTERVAL = 0.1  # DESIGN 4: HAVEs are batched, or a swarm of N pays N frames per chunk
UPLOAD_WORKERS = 2
READ_BATCH = 4  # chunks per worker-thread call
READ_AT_HAND = 4  # and per look into the catalog
MAX_TO_READ = 2 * UPLOAD_WORKERS * READ_BATCH
RETRY_BUSY_MS = 1000
MAX_SESSIONS = 500
REJOIN_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0)  # s; whoever stays away longer is found again by the next search
MAX_AVAILABILITIES = 64  # per image and session; it is sent once, and again when the provider loses something

Finder = Callable[[CID, Sequence[bytes]], Awaitable[dict[str, list[bytes]]]]


def manifest_id(root: CID) -> bytes:
    """The download of an image's manifest blocks, beside that of its chunks (whose id is the root's binary CID)."""
    return b"manifest:" + root.to_bytes()


class Exchange:
    """See the module's text. Run `run` in a nursery; everything else may be called while it runs.

    `finder(root, keys)` is asked for providers: it returns peers to join, with those of `keys` each is recorded for.
    """

    def __init__(
        self, transport: Transport, store: Store, finder: Finder, *, agent: str, keys: TrustedKeys | None = None
    ) -> None:
        self._transport = transport
        self._store = store
        self._finder = finder
        self._agent = agent
        self._swarm = Swarm(random.Random(), transport.peer_id)
        self._uploads = Uploads()
        self._holdings = Holdings(store)
        self.records = RecordBook(store, keys or TrustedKeys())
        self._sessions: dict[str, PeerSession] = {}
        self._retired: set[PeerSession] = set()  # relayed ones that a direct one has taken over from
        self._joining: dict[str, trio.Event] = {}
        self._downloads: dict[bytes, Download] = {}
        self._bans: dict[str, float] = {}
        self._answers: dict[tuple[CID, str], bool] = {}
        self.availability_callbacks: list[Callable[[str, m.Availability], None]] = []
        self._repeats: dict[tuple[CID, str], int] = {}
        self._traffic = Traffic()
        self.busy_until = self._traffic.busy_until
        self._timer_changed = trio.Event()
        self._to_read: deque[tuple[PeerSession, bytes]] = deque()  # what to send to whom, once the disk has given it
        self._some_to_read = trio.Event()
        self._haves = trio.Event()
        self._answered = trio.Event()
        self._left = trio.Event()
        self._progressed = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve peers and downloads until cancelled."""
        token = trio.lowlevel.current_trio_token()
        self._store.on_lost(lambda digests: token.run_sync_soon(self._lost, list(digests)))
        self._transport.handle(PROTOCOL_ID, self._inbound)
        self._transport.on_connect(self._connected)
        self._transport.on_upgrade(self._upgraded)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._timer)
            nursery.start_soon(self._spread_haves)
            for _ in range(UPLOAD_WORKERS):
                nursery.start_soon(self._upload)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def close(self) -> None:
        """Take no more sessions and say goodbye to everybody; returns when they are told."""
        self._nursery = None
        for session in list(self._sessions.values()):
            session.close("shutting down")
        for session in self._retired:
            session.close("shutting down")
        while self._sessions:
            await self.left()

    # Sessions

    async def join(self, peer: str, addrs: Sequence[str] = ()) -> None:
        """Have a session with a peer. Raises `RemoteError` if it cannot be had."""
        if self._banned(peer):
            raise RemoteError(f"peer {peer} is banned")
        while peer in self._joining:
            await self._joining[peer].wait()
        if peer in self._sessions or self._nursery is None:
            return
        self._joining[peer] = trio.Event()
        try:
            try:
                await self._transport.connect(peer, addrs)
            except UsageError as exc:  # an id that some other peer made up
                raise PeerUnreachable(str(exc)) from exc
            if peer in self._sessions:
                return
            stream = await self._transport.open_stream(peer, PROTOCOL_ID)
            session = PeerSession(stream, agent=self._agent, dialled=True)
            if self._nursery is None:
                await stream.reset()
                return
            self._nursery.start_soon(self._serve_dialled, session)
            with trio.move_on_after(10):
                await session.open.wait()
        finally:
            self._joining.pop(peer).set()

    def follow(self, peer: str, root: CID, active: bool = True) -> bool:
        """Ask a peer what it has of an image (or no longer), though nothing is fetched. False without a session."""
        session = self._sessions.get(peer)
        if session is not None and (active or not any(each.root == root for each in self._downloads.values())):
            session.send(m.Interest(root, active))
        return session is not None

    def _connected(self, peer: str) -> None:
        if self._downloads and self._nursery is not None:
            self._nursery.start_soon(self._try_join, peer)

    def _upgraded(self, peer: str) -> None:
        """A direct connection stands beside a relayed one: the side that dialled the session moves it there."""
        session = self._sessions.get(peer)
        if session is not None and session.relayed and session.dialled and self._nursery is not None:
            self._nursery.start_soon(self._move, session)

    async def _move(self, old: PeerSession) -> None:
        try:
            stream = await self._transport.open_stream(old.peer, PROTOCOL_ID)
        except RemoteError as exc:
            log.info("the exchange with %s stays on its relay: %s", old.peer, exc)
            return
        if stream.relayed or self._nursery is None or self._sessions.get(old.peer) is not old:
            await stream.reset()
            return
        await self._serve_dialled(PeerSession(stream, agent=self._agent, dialled=True))

    async def _try_join(self, peer: str, addrs: Sequence[str] = ()) -> None:
        try:
            await self.join(peer, addrs)
        except RemoteError as exc:
            log.info("no exchange with %s: %s", peer, exc)

    def _banned(self, peer: str) -> bool:
        until = self._bans.get(peer)
        if until is not None and until <= trio.current_time():
            del self._bans[peer]
            return False
        return until is not None

    async def _inbound(self, stream: Stream) -> None:
        if self._nursery is None or self._banned(stream.peer) or len(self._sessions) >= MAX_SESSIONS:
            await stream.reset()
            return
        await self._serve(PeerSession(stream, agent=self._agent, dialled=False))

    def _supersedes(self, session: PeerSession) -> bool:
        """Two peers that open sessions to each other at once must both keep the same one: that of the lower id."""
        old = self._sessions.get(session.peer)
        if old is None:
            return True
        if old.relayed != session.relayed:
            return old.relayed
        if old.dialled == session.dialled:
            return True
        return session.dialled == (self._transport.peer_id < session.peer)

    async def _serve_dialled(self, session: PeerSession) -> None:
        """The top of a session's task (the transport guards those of inbound streams)."""
        try:
            await self._serve(session)
        except Exception:
            log.exception("the session with %s failed", session.peer)

    async def _serve(self, session: PeerSession) -> None:
        peer = session.peer
        if not self._supersedes(session):
            session.open.set()  # the other one is: whoever waits for this one has what they want
            await session.stream.reset()
            return
        old = self._sessions.get(peer)
        if old is not None and old.relayed and not session.relayed:
            self._take_over(old, session)
        else:
            if old is not None:
                self._leave(old)
                old.close("superseded")
            self._sessions[peer] = session
            self._handle(ev.PeerJoined(peer), ev.PeerNear(peer, self._transport.near(peer)))
        for root in {download.root for download in self._downloads.values()}:
            session.send(m.Interest(root))
        try:
            await session.run(self._on_messages, self._on_sent)
        finally:
            if self._sessions.get(peer) is session:
                self._return_to(session)
                self._leave(session)
            elif session in self._retired:
                self._forget_retired(session)

    def _return_to(self, session: PeerSession) -> None:
        """A source was lost in the middle of a download, without a goodbye: its relay's limit, or a line that broke."""
        source = any(known for (_, peer), known in self._answers.items() if peer == session.peer)
        if source and not session.finished and not session.left and self._nursery is not None:
            self._nursery.start_soon(self._rejoin, session.peer)

    async def _rejoin(self, peer: str) -> None:
        for delay in REJOIN_DELAYS:
            await trio.sleep(delay)
            if not self._downloads or self._banned(peer) or self._nursery is None:
                return
            try:
                await self.join(peer)
                return
            except RemoteError as exc:
                log.info("peer %s did not come back yet: %s", peer, exc)

    def _take_over(self, old: PeerSession, new: PeerSession) -> None:
        """From now on everything goes through `new`; what was asked for before comes through `old`.

        What is owed to whom belongs to the peer, not to a session, so nothing is lost and nothing is asked for twice.
        """
        log.info("the exchange with %s moved from its relay to a direct connection", old.peer)
        self._sessions[old.peer] = new
        self._retired.add(old)
        new.following, old.following = old.following, {}
        self._handle(ev.PeerNear(old.peer, self._transport.near(old.peer)))
        for download in self._downloads.values():
            download.moved.setdefault(old.peer, trio.current_time())
        assert self._nursery is not None
        self._nursery.start_soon(self._retire, old, new)

    async def _retire(self, old: PeerSession, new: PeerSession) -> None:
        await new.open.wait()  # before, the peer does not know yet that `old` is not all there is
        old.retire()

    def _forget_retired(self, session: PeerSession) -> None:
        self._retired.discard(session)
        self._uploads.sent(session.peer, session.unsent)
        self._fill_uploads()
        if not session.finished:  # the relay went first: what it still carried is asked for again
            self._handle(ev.PeerBusy(session.peer, 0.0))

    def _unfollow(self, session: PeerSession) -> None:
        roots, session.following = session.following, {}
        for root in roots:
            self._release(root)

    def _release(self, root: CID) -> None:
        """Keep no bit field that nobody follows."""
        if not any(root in session.following for session in self._sessions.values()):
            self._holdings.forget(root)

    def _leave(self, session: PeerSession) -> None:
        del self._sessions[session.peer]
        for old in [each for each in self._retired if each.peer == session.peer]:
            self._retired.discard(old)  # what it had yet to send is of the account that is closed here
            old.close("the session that took over has ended")
        self._unfollow(session)
        self._uploads.leave(session.peer)
        self._fill_uploads()  # what it had queued made others wait
        self._answers = {key: known for key, known in self._answers.items() if key[1] != session.peer}
        self._repeats = {key: times for key, times in self._repeats.items() if key[1] != session.peer}
        self.records.left(session.peer)
        self._handle(ev.PeerLeft(session.peer))
        self._left.set()
        self._left = trio.Event()

    # What peers send

    async def _on_messages(self, session: PeerSession, received: list[m.Message]) -> None:
        blocks: list[m.Block] = []
        through = session
        for message in received:
            current = self._sessions.get(through.peer)
            if current is None or (current is not through and through not in self._retired):
                return  # banned or superseded by what came before
            session = current  # answers to what came through a retired session go through the one that took over
            match message:
                case m.Block():
                    blocks.append(message)
                case m.Availability():
                    self._on_availability(session.peer, message)
                case m.Have(root=root, ranges=ranges):
                    self._handle(ev.PeerGot(session.peer, root.to_bytes(), ranges))
                case m.Interest(root=root, active=active):
                    await self._on_interest(session, root, active)
                case m.Want(ids=ids, priority=priority):
                    if not self._uploads.want(session.peer, ids, priority):
                        session.send(m.Busy(RETRY_BUSY_MS))
                    self._fill_uploads()
                case m.Cancel(ids=ids):
                    self._uploads.cancel(session.peer, ids)
                case m.DontHave(ids=ids):
                    self._handle(ev.PeerLacks(session.peer, ids))
                case m.Busy(retry_after=retry_after):
                    self._handle(ev.PeerBusy(session.peer, retry_after / 1000))
                case m.Records():
                    await self._on_records(session.peer, message)
                case m.Hello() | m.Goodbye():
                    pass
        if blocks:
            await self._on_blocks(through, blocks)
        elif through.receiving_block:
            self._handle(ev.PeerProgress(through.peer))

    def _on_availability(self, peer: str, message: m.Availability) -> None:
        root = message.root
        call_all(self.availability_callbacks, peer, message)
        if not any(download.root == root for download in self._downloads.values()):
            return  # crossed with our loss of interest
        repeated = self._repeats.get((root, peer), 0)
        self._repeats[root, peer] = repeated + 1
        if repeated >= MAX_AVAILABILITIES:  # each costs a walk over its bits
            self._handle(ev.PeerMisbehaved(peer, 2, "repeats what it has over and over"))
            return
        known = message.count > 0 or message.bits is not None
        self._answers[root, peer] = known
        self._answered.set()
        self._answered = trio.Event()
        if known:
            self._handle(ev.PeerHas(peer, manifest_id(root), 0, None))
            self._handle(ev.PeerHas(peer, root.to_bytes(), message.count, message.bits))

    async def _on_interest(self, session: PeerSession, root: CID, active: bool) -> None:
        if not active:
            session.following.pop(root, None)
            self._release(root)
            return
        session.following[root] = None
        self._traffic.expected()
        if not await self._tell(session, root):
            self._unfollow(session)

    async def _tell(self, session: PeerSession, root: CID) -> bool:
        """Send what is here of an image and what is known beside it; False if the session ended meanwhile."""
        availability = await self._holdings.availability(root)
        answer: list[m.Message] = [availability]
        if availability.count > 0:
            answer += await self.records.frames(root)
        for message in answer:
            await session.room()
            if self._sessions.get(session.peer) is not session:
                return False
            session.send(message)
        return True

    async def _on_records(self, peer: str, message: m.Records) -> None:
        if not any(download.root == message.root for download in self._downloads.values()):
            return  # crossed with our loss of interest
        learnt = await self.records.learn(peer, message)
        if learnt.fault is not None:
            self._handle(ev.PeerMisbehaved(peer, 2, learnt.fault))
        for session in self._sessions.values():
            if session.peer != peer and message.root in session.following:
                for news in learnt.news:
                    session.send(news)

    async def _on_blocks(self, session: PeerSession, blocks: list[m.Block]) -> None:
        """Check and keep blocks; each goes to the download it belongs to."""
        peer = session.peer
        batches: dict[bytes, list[m.Block]] = {}
        seen: set[bytes] = set()
        for block in blocks:
            expected = self._swarm.expects(peer, block.id)
            if expected is None or block.id in seen:
                self._handle(ev.PeerMisbehaved(peer, 2, "sent a block nobody asked it for"))
            elif not expected:
                self._handle(ev.BlockChecked(peer, block.id, block.size, True))
            else:
                owner = next((d.id for d in self._downloads.values() if block.id in d.keys), None)
                if owner is not None:
                    seen.add(block.id)
                    batches.setdefault(owner, []).append(block)
        for id, batch in batches.items():
            download = self._downloads.get(id)
            if download is None:
                continue
            try:
                verdicts = await download.intake.accept(batch)
            except NodeError as exc:
                if self._downloads.get(id) is download:
                    self._fail(download, exc)
                continue
            size = sum(block.size for block in batch)
            self._traffic.received(peer, size)
            if session.relayed:
                download.relayed[peer] = download.relayed.get(peer, 0) + size
            good = [block.id for block, verdict in zip(batch, verdicts, strict=True) if verdict]
            self._arrived(good)
            checked = zip(batch, verdicts, strict=True)
            events: list[ev.Event] = [ev.BlockChecked(peer, block.id, block.size, good) for block, good in checked]
            if (rtt := session.stream.rtt) is not None:
                events.append(ev.PeerRtt(peer, rtt))
            self._handle(*events)

    def _arrived(self, keys: list[bytes]) -> None:
        self._progressed.set()
        self._progressed = trio.Event()
        if self._holdings.arrived(keys):
            self._haves.set()
        for download in self._downloads.values():
            here = [key for key in keys if key in download.keys]
            if here:
                download.on_arrival(here)

    def _lost(self, digests: Iterable[bytes]) -> None:
        """The store found chunks damaged or gone."""
        keys = [CID(Codec.RAW, digest).to_bytes() for digest in digests]
        self._holdings.lost(keys)
        self._handle(ev.BlocksLost(keys))

    def here(self, keys: list[bytes]) -> None:
        """Chunks came into the store by another way than a download (an import)."""
        self._arrived(keys)
        self._handle(ev.BlocksHere(keys))

    def want(self, keys: Sequence[bytes]) -> None:
        """Blocks that running downloads were begun without are wanted after all; they must not be here."""
        self._handle(ev.BlocksLost(keys))

    # What the cores decide

    def _handle(self, *events: ev.Event) -> None:
        for action in self._swarm.handle(*events, now=trio.current_time()):
            self._act(action)
        self._timer_changed.set()

    def _act(self, action: ev.Action) -> None:
        match action:
            case ev.Request(peer=peer, keys=keys, priority=priority):
                if peer in self._sessions:
                    self._sessions[peer].send(m.Want(keys, priority))
            case ev.CancelRequest(peer=peer, keys=keys):
                if peer in self._sessions:
                    self._sessions[peer].send(m.Cancel(keys))
            case ev.Ban(peer=peer, seconds=seconds, reason=reason):
                log.warning("peer %s is banned for %.0f s: it %s", peer, seconds, reason)
                self._bans[peer] = trio.current_time() + seconds
                session = self._sessions.get(peer)
                if session is not None:
                    self._leave(session)
                    session.close("banned: " + reason)
            case ev.FindProviders(id=id, keys=keys):
                download = self._downloads.get(id)
                if download is not None and self._nursery is not None:
                    self._nursery.start_soon(self._find, download.root, keys)
            case ev.DownloadDone(id=id):
                if id in self._downloads:
                    self._downloads[id].done.set()

    async def _find(self, root: CID, keys: Sequence[bytes]) -> None:
        found = await self._finder(root, keys)
        async with trio.open_nursery() as nursery:
            for peer in found:
                nursery.start_soon(self._try_join, peer)
        for peer, held in found.items():
            if held:
                self._handle(ev.PeerHolds(peer, held))

    async def _timer(self) -> None:
        while True:
            self._timer_changed = trio.Event()
            with trio.move_on_at(self._swarm.next_timer()):
                await self._timer_changed.wait()
                continue
            self._handle(ev.Tick())

    async def _spread_haves(self) -> None:
        while True:
            await self._haves.wait()
            await trio.sleep(HAVE_INTERVAL)
            self._haves = trio.Event()
            for root, numbers in self._holdings.take_new().items():
                ranges = list(m.ranges_of(numbers))
                for session in self._sessions.values():
                    if root in session.following:
                        for i in range(0, len(ranges), m.MAX_RANGES):
                            session.send(m.Have(root, tuple(ranges[i : i + m.MAX_RANGES])))

    # Downloads

    @asynccontextmanager
    async def download(
        self,
        id: bytes,
        root: CID,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        here: Sequence[int],
        sink: Sink,
        on_arrival: Callable[[list[bytes]], None],
        order: Order = Order.RAREST,
    ) -> AsyncIterator[Download]:
        """Download blocks while the context is open; `Download.wait` returns when all are here."""
        limits = dict(zip(keys, sizes, strict=True)) if id != manifest_id(root) else dict.fromkeys(keys, MAX_BLOCK)
        download = Download(id, root, limits, Intake(sink, limits), on_arrival)
        if id in self._downloads:
            raise RuntimeError("this download runs already")
        self._downloads[id] = download
        self._traffic.expected()
        try:
            for session in self._sessions.values():
                session.send(m.Interest(root))
            for connection in self._transport.connections():
                if connection.peer not in self._sessions and self._nursery is not None:
                    self._nursery.start_soon(self._try_join, connection.peer)
            for peer, known in self.answers(root).items():
                if known and id == manifest_id(root):
                    self._handle(ev.PeerHas(peer, id, 0, None))
            self._handle(ev.AddDownload(id, keys, sizes, here, order))
            yield download
        finally:
            del self._downloads[id]
            self._handle(ev.RemoveDownload(id))
            if not any(other.root == root for other in self._downloads.values()):
                self._answers = {key: known for key, known in self._answers.items() if key[0] != root}
                self._repeats = {key: times for key, times in self._repeats.items() if key[0] != root}
                self.records.ended(root)
                for session in self._sessions.values():
                    session.send(m.Interest(root, active=False))

    def _fail(self, download: Download, error: NodeError) -> None:
        if download.failure is None:
            download.failure = error
            download.last = self._swarm.stats(download.id)
            download.done.set()
            download.failed.set()
            self._handle(ev.RemoveDownload(download.id))

    async def tell(self, root: CID) -> None:
        """An image is known here now: peers that asked for it before were told that it is not."""
        self.records.changed()
        for session in list(self._sessions.values()):
            if root in session.following:
                await self._tell(session, root)

    def forget(self, root: CID) -> None:
        """An image was removed: peers that follow it are told that it is gone."""
        self._holdings.forget(root)
        self.records.changed()
        for session in self._sessions.values():
            if root in session.following:
                session.send(m.Availability(root, 0))

    def stats(self, id: bytes) -> DownloadStats:
        """Where a running download stands, or stood when it failed."""
        return self._downloads[id].last or self._swarm.stats(id)

    def answers(self, root: CID) -> dict[str, bool]:
        """Peers that answered our interest in an image, and whether they know it."""
        return {peer: known for (of, peer), known in self._answers.items() if of == root}

    @property
    def sessions(self) -> list[str]:
        """Peers with a session."""
        return list(self._sessions)

    async def next_answer(self) -> None:
        """Until some peer answers an interest."""
        await self._answered.wait()

    async def left(self) -> None:
        """Until some session ends."""
        await self._left.wait()

    async def progress(self) -> None:
        """Until some block comes."""
        await self._progressed.wait()

    def traffic(self, peer: str) -> PeerTraffic:
        return self._traffic.of(peer, self._uploads.waiting(peer))

    @property
    def bans(self) -> dict[str, float]:
        """Banned peers and the seconds left."""
        now = trio.current_time()
        return {peer: until - now for peer, until in self._bans.items() if until > now}

    # Uploads

    def _on_sent(self, session: PeerSession, size: int) -> None:
        self._traffic.sent(session.peer, size)
        if self._sessions.get(session.peer) is session or session in self._retired:
            self._uploads.sent(session.peer, size)  # an earlier session's account was closed with it
            self._fill_uploads()

    def _fill_uploads(self) -> None:
        """Queue what is to be sent next and is in memory; what the disk has to be waited for goes to the tasks."""
        while len(self._to_read) < MAX_TO_READ:
            turns = self._next_turns(READ_AT_HAND)
            if not turns:
                return
            for (peer, key), payload in zip(turns, self._at_hand([key for _, key in turns]), strict=True):
                session = self._sessions.get(peer)
                if session is None:
                    continue
                if payload is None:
                    self._to_read.append((session, key))
                    self._some_to_read.set()
                else:
                    self._send_block(session, key, payload)

    def _at_hand(self, keys: Sequence[bytes]) -> Sequence[Buffer | None]:
        cids = [CID.from_bytes(key) for key in keys]
        if any(cid.codec is Codec.DAG_CBOR for cid in cids):
            return [None] * len(cids)
        return self._store.read_at_hand([cid.digest for cid in cids])

    def _next_turns(self, number: int) -> list[tuple[str, bytes]]:
        turns: list[tuple[str, bytes]] = []
        while len(turns) < number and (turn := self._uploads.next()) is not None:
            turns.append(turn)
        return turns

    def _send_block(self, session: PeerSession, key: bytes, payload: Buffer) -> None:
        self._uploads.queued(session.peer, key, len(payload))
        session.send_block(m.Block(key, m.Encoding.RAW, len(payload), (payload,)))

    async def _upload(self) -> None:
        while True:
            if not self._to_read:
                if self._some_to_read.is_set():  # else another of these tasks waits for it already
                    self._some_to_read = trio.Event()
                await self._some_to_read.wait()
                continue
            turns = [self._to_read.popleft() for _ in range(min(READ_BATCH, len(self._to_read)))]
            payloads = await trio.to_thread.run_sync(self._read_blocks, [key for _, key in turns])
            for (session, key), payload in zip(turns, payloads, strict=True):
                current = self._sessions.get(session.peer)
                if current is None or (current is not session and session not in self._retired):
                    continue  # a later session of the peer has not asked for it
                if payload is None:
                    current.send(m.DontHave((key,)))
                else:
                    self._send_block(current, key, payload)
            self._fill_uploads()

    def _read_blocks(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        return [self._read_block(key) for key in keys]

    def _read_block(self, key: bytes) -> Buffer | None:
        cid = CID.from_bytes(key)
        try:
            if cid.codec is Codec.DAG_CBOR:
                return self._store.block(cid)
            return self._store.read(cid.digest)
        except StoreError as exc:
            log.info("not served: %s", exc)
            return None

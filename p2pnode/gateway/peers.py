"""Asking peers for narinfos, and answering them (`protocols.narinfo`).

A stream to a peer is kept while it is used: the 25 look-ups that Nix makes at once then cost one round trip, not a
stream each. What peers answer is parsed here and judged by the caller.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from p2pnode.errors import NodeError, RemoteError, StreamClosed
from p2pnode.gateway.records import PathRecords, narinfo_of
from p2pnode.net.frames import receive_frame
from p2pnode.net.transport import Stream, Transport
from protocols.errors import ProtocolError
from protocols.narinfo import (
    MAX_ANSWER,
    MAX_KEYS,
    MAX_REQUEST,
    MAX_TEXT,
    PART_SIZE,
    PROTOCOL,
    Found,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
IDLE_SECONDS = 60.0  # a stream of ours waits so long for its next use ...
SERVE_IDLE_SECONDS = 120.0  # ... and one of a peer's longer
FRAME_SECONDS = 20.0
MUTE_SECONDS = 60.0  # a peer that does not speak the protocol, or answers nonsense, is left alone for this time
MAX_STREAMS_PER_PEER = 4
MAX_STREAMS = 512
MAX_MUTE = 1024


class NarinfoServer:
    """Answers peers out of the records of this node."""

    def __init__(self, transport: Transport, records: PathRecords) -> None:
        self._records = records
        self._streams: Counter[str] = Counter()
        transport.handle(PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        peer = stream.peer
        if self._streams[peer] >= MAX_STREAMS_PER_PEER or self._streams.total() >= MAX_STREAMS:
            await stream.reset()
            return
        self._streams[peer] += 1
        try:
            while True:
                with trio.move_on_after(SERVE_IDLE_SECONDS) as scope:
                    body = await receive_frame(stream, MAX_REQUEST)
                if scope.cancelled_caught or body is None:
                    break
                keys = decode_request(body)
                answer = encode_answer(await trio.to_thread.run_sync(self._found, keys))
                with trio.fail_after(FRAME_SECONDS):
                    await stream.send_all(answer)
            await stream.aclose()
        except (ProtocolError, RemoteError, trio.TooSlowError) as error:
            log.info("narinfos for %s: %s", peer, error)
            await stream.reset()
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    def _found(self, keys: Sequence[bytes]) -> list[Found | None]:
        found: list[Found | None] = []
        for key in keys:
            records = self._records.of_part(key) if len(key) == PART_SIZE else self._records.of_nar(key)
            answer = None
            if records:
                records.sort(key=lambda record: len(record.signed.signatures), reverse=True)
                text = narinfo_of(records[0].signed).format()
                answer = Found(text, records[0].image, records[0].number) if len(text) <= MAX_TEXT else None
            found.append(answer)
        return found


@dataclass(eq=False)
class _Asked:
    done: trio.Event = field(default_factory=trio.Event)
    found: Found | None = None
    failure: RemoteError | None = None


@dataclass(eq=False)
class _Line:
    """The stream to one peer, and what it is to be asked next."""

    waiting: dict[bytes, _Asked] = field(default_factory=dict)
    more: trio.Event = field(default_factory=trio.Event)


class NarinfoClient:
    """Asks peers. Works while `run` does."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lines: dict[str, _Line] = {}
        self._mute: dict[str, float] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def neighbours(self, limit: int) -> list[str]:
        """Connected peers that may be asked, those that answered before first."""
        peers = dict.fromkeys(c.peer for c in self._transport.connections() if not self._is_mute(c.peer))
        return sorted(peers, key=lambda peer: peer not in self._lines)[:limit]

    async def ask(self, peer: str, key: bytes) -> Found | None:
        """What `peer` says about a hash part or a NAR hash. Raises RemoteError."""
        if self._nursery is None or self._is_mute(peer):
            raise RemoteError(f"peer {peer} is not asked for narinfos")
        line = self._lines.get(peer)
        if line is None:
            line = self._lines[peer] = _Line()
            self._nursery.start_soon(self._pump, peer, line)
        asked = line.waiting.setdefault(key, _Asked())
        line.more.set()
        await asked.done.wait()
        if asked.failure is not None:
            raise asked.failure
        return asked.found

    def silence(self, peer: str) -> None:
        """Leave a peer alone for a while."""
        while len(self._mute) >= MAX_MUTE:
            del self._mute[next(iter(self._mute))]
        self._mute[peer] = trio.current_time() + MUTE_SECONDS

    def _is_mute(self, peer: str) -> bool:
        until = self._mute.get(peer)
        if until is not None and until <= trio.current_time():
            del self._mute[peer]
            return False
        return until is not None

    async def _pump(self, peer: str, line: _Line) -> None:
        """The top of a task: ask what is waiting, as much at once as there is."""
        failure: RemoteError = StreamClosed(f"peer {peer} closed its stream")
        stream: Stream | None = None
        batch: dict[bytes, _Asked] = {}
        try:
            with trio.fail_after(ANSWER_SECONDS):
                stream = await self._transport.open_stream(peer, PROTOCOL)
            while True:
                with trio.move_on_after(IDLE_SECONDS):
                    await line.more.wait()
                line.more = trio.Event()
                if not line.waiting:
                    break
                while line.waiting:
                    keys = list(line.waiting)[:MAX_KEYS]
                    batch = {key: line.waiting.pop(key) for key in keys}
                    with trio.fail_after(ANSWER_SECONDS):
                        await stream.send_all(encode_request(keys))
                        body = await receive_frame(stream, MAX_ANSWER)
                    if body is None:
                        raise StreamClosed(f"peer {peer} closed its stream")
                    for asked, found in zip(batch.values(), decode_answer(body, len(keys)), strict=True):
                        asked.found = found
                        asked.done.set()
                    batch = {}
        except ProtocolError as error:
            failure = RemoteError(f"peer {peer} answers what it must not: {error}")
            log.warning("narinfos: %s", failure)
            self.silence(peer)
        except trio.TooSlowError:
            failure = RemoteError(f"peer {peer} does not answer within {ANSWER_SECONDS:.0f} s")
            self.silence(peer)
        except NodeError as error:
            failure = error if isinstance(error, RemoteError) else RemoteError(str(error))
            if stream is None:  # it does not speak the protocol, or is gone
                self.silence(peer)
        finally:
            if self._lines.get(peer) is line:
                del self._lines[peer]
            for asked in (*batch.values(), *line.waiting.values()):
                asked.failure = failure
                asked.done.set()
            if stream is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await stream.reset()

"""What a node publishes, told to whoever asks, and asked of others (`protocols.catalog`).

A node tells nobody which images it has unless its owner lets it publish; an image whose id is known is served all the
same. Only what the node provides itself is listed, not what it fetched: that is other people's.
"""

from __future__ import annotations

import logging
from collections import Counter

import trio

from p2pnode import link
from p2pnode.errors import NetworkTimeout, NotPublishing, RemoteError, StreamClosed
from p2pnode.net.frames import receive_frame
from p2pnode.net.transport import Stream, Transport
from p2pnode.store import Store
from protocols.catalog import (
    MAX_ANSWER,
    MAX_ENTRIES,
    MAX_NAME,
    MAX_REQUEST,
    PROTOCOL,
    Entry,
    Page,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from protocols.cid import CID
from protocols.errors import ProtocolError

log = logging.getLogger(__name__)

MAX_IMAGES = 16_384  # of one publisher that are taken notice of
PAGE_SECONDS = 20.0
LIST_SECONDS = 120.0
SERVE_IDLE_SECONDS = 60.0
PAGE_INTERVAL = 0.05  # s that a stream waits between two pages: a whole list of ours takes a peer 3 s at most
MAX_STREAMS_PER_PEER = 4
MAX_STREAMS = 64


class CatalogServer:
    """Answers peers out of the store, or that this node does not publish."""

    def __init__(self, transport: Transport, store: Store, *, publish: bool) -> None:
        self._store = store
        self._publish = publish
        self._streams: Counter[str] = Counter()
        self._idle: dict[Stream, trio.CancelScope] = {}  # those that wait for a request, the longest first
        self._reading = trio.Lock()  # a storm of requests may not take all worker threads
        transport.handle(PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        peer = stream.peer
        if self._streams[peer] >= MAX_STREAMS_PER_PEER or not self._room():
            await stream.reset()
            return
        self._streams[peer] += 1
        earliest = trio.current_time()
        try:
            while True:
                with trio.move_on_after(SERVE_IDLE_SECONDS) as scope:
                    self._idle[stream] = scope
                    body = await receive_frame(stream, MAX_REQUEST)
                self._idle.pop(stream, None)
                if scope.cancelled_caught or body is None:
                    break
                after = decode_request(body)
                await trio.sleep_until(earliest)
                earliest = trio.current_time() + PAGE_INTERVAL
                answer = await self._answer(after)
                with trio.fail_after(PAGE_SECONDS):
                    await stream.send_all(encode_answer(answer))
            await stream.aclose()
        except (ProtocolError, RemoteError, trio.TooSlowError) as error:
            log.info("the catalog for %s: %s", peer, error)
            await stream.reset()
        finally:
            self._idle.pop(stream, None)
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    def _room(self) -> bool:
        """Whether there is room for another stream, made if need be: a few peers that sit on theirs must not keep all
        others out."""
        if self._streams.total() < MAX_STREAMS:
            return True
        for stream, scope in self._idle.items():
            del self._idle[stream]
            scope.cancel()
            return True
        return False

    async def _answer(self, after: CID | None) -> Page | None:
        if not self._publish:
            return None
        async with self._reading:
            records = await trio.to_thread.run_sync(self._store.provided, after, MAX_ENTRIES + 1)
        entries = tuple(Entry(each.id, _bounded(each.name), each.size) for each in records[:MAX_ENTRIES])
        return Page(entries, more=len(records) > MAX_ENTRIES)


def _bounded(name: str) -> str:
    """A file's name may have bytes that are no UTF-8, which Python keeps as surrogates."""
    return name.encode(errors="replace")[:MAX_NAME].decode(errors="ignore")


async def published(transport: Transport, peer: str) -> list[Entry]:
    """All images that a peer publishes, with names that are fit to be shown (empty: none that is).

    Raises NotPublishing, NetworkTimeout, RemoteError (also for more than `MAX_IMAGES`).
    """
    found: list[Entry] = []
    stream: Stream | None = None
    try:
        with trio.fail_after(LIST_SECONDS):
            stream = await transport.open_stream(peer, PROTOCOL)
            more = True
            while more:
                page = await _page(stream, found[-1].image if found else None)
                found += [Entry(each.image, link.clean_name(each.name) or "", each.size) for each in page.entries]
                more = page.more
                if len(found) + more > MAX_IMAGES:
                    raise RemoteError(f"peer {peer} lists more than {MAX_IMAGES} images, which no mirror takes")
    except ProtocolError as error:
        raise RemoteError(f"peer {peer} answers what it must not: {error}") from error
    except trio.TooSlowError:
        raise NetworkTimeout(f"peer {peer} does not tell in time which images it publishes") from None
    finally:
        if stream is not None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.reset()
    return found


async def _page(stream: Stream, after: CID | None) -> Page:
    with trio.fail_after(PAGE_SECONDS):
        await stream.send_all(encode_request(after))
        body = await receive_frame(stream, MAX_ANSWER)
    if body is None:
        raise StreamClosed(f"peer {stream.peer} closed its stream")
    page = decode_answer(body, after)
    if page is None:
        raise NotPublishing(
            f"peer {stream.peer} does not publish a list of its images; its owner can let it, with `p2pnode run "
            "--publish`, or name the images"
        )
    return page

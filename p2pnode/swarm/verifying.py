"""What comes in on its way to the verifier: checked and written by worker threads, and hashed for the object it belongs
to in the same call, while it is in the processor's caches, if it comes in about the order of the object."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence

from p2pnode.errors import NodeError, VerificationFailed
from p2pnode.images.exporter import Exporter
from p2pnode.store.landing import Landing
from protocols.cid import CID, CID_SIZE, DIGEST_SIZE
from protocols.exchange.messages import Buffer, Payload
from protocols.manifest import Image

RECENT_BYTES = 32 << 20  # what the picker lets the verifier lag behind, twice
RECENT_COST = 256  # bytes that keeping a chunk takes besides its own
PIN_FACTOR = 4  # what is kept of a chunk keeps alive at most so many times its size, as in `protocols.yamux.session`


class Recent:
    """Chunks that were checked and written a moment ago, for the verifier: it follows the downloads closely, and need
    neither read nor check them again. Thread-safe.

    Bounded: those go first that the verifier comes to last, by their `offset` in the image. (If the oldest went, a
    verifier that has fallen behind once would find none again.)

    They are slices of what a connection decrypted in one piece, which may be a hundred times as long: a peer could send
    one small chunk in each, and have us keep all the rest of them too. Such are copied."""

    def __init__(self, offset: Callable[[bytes], int]) -> None:
        self._offset = offset
        self._chunks: dict[bytes, Payload] = {}
        self._last: list[tuple[int, bytes]] = []  # heap of minus offset, digest; also of some that are gone
        self._size = 0
        self._lock = threading.Lock()

    def put(self, digest: bytes, pieces: Payload) -> None:
        kept = [_unpinned(piece) for piece in pieces]
        with self._lock:
            self._drop(digest)
            self._chunks[digest] = kept
            self._size += _cost(kept)
            heapq.heappush(self._last, (-self._offset(digest), digest))
            while self._size > RECENT_BYTES:
                self._drop(heapq.heappop(self._last)[1])
            if len(self._last) > 2 * len(self._chunks) + 16:
                self._last = [entry for entry in set(self._last) if entry[1] in self._chunks]
                heapq.heapify(self._last)

    def take(self, digests: Sequence[bytes]) -> list[Payload]:
        """As many of the first `digests` as are there."""
        taken: list[Payload] = []
        with self._lock:
            for digest in digests:
                if (pieces := self._drop(digest)) is None:
                    break
                taken.append(pieces)
        return taken

    def has(self, digest: bytes) -> bool:
        return digest in self._chunks

    def _drop(self, digest: bytes) -> Payload | None:
        pieces = self._chunks.pop(digest, None)
        if pieces is not None:
            self._size -= _cost(pieces)
        return pieces


def _cost(pieces: Payload) -> int:
    return sum(map(len, pieces)) + RECENT_COST


def _unpinned(piece: Buffer) -> Buffer:
    """A piece, without a buffer behind it that is much longer than itself."""
    whole = memoryview(piece.obj).nbytes if isinstance(piece, memoryview) else len(piece)
    return piece if len(piece) * PIN_FACTOR >= whole else bytes(piece)


class Follower:
    """Feeds the chunks of one object, in their order, to what hashes it. Thread-safe; one thread at a time feeds.

    `at`: how many of `digests` were fed."""

    def __init__(self, export: Exporter, digests: Sequence[bytes], recent: Recent) -> None:
        self._export = export
        self._digests = digests
        self._recent = recent
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._stopped = False
        self.at = 0

    @property
    def next(self) -> bytes | None:
        """The digest that is waited for; None at the end, after an error, and when it was stopped."""
        return self._digests[self.at] if self.at < len(self._digests) and not self._stopped else None

    def check(self) -> None:
        """Raise what the export said of the bytes."""
        if self._failure is not None:
            raise self._failure

    def offer(self, digest: bytes, pieces: Payload) -> bool:
        """A good chunk has come; whether it was the next one, and was fed."""
        if digest != self.next or not self._lock.acquire(blocking=False):
            return False
        try:
            if digest != self.next:
                return False
            self._feed(pieces)
            return True
        finally:
            self._lock.release()

    def go_on(self) -> None:
        """Feed those that follow, as many as have come of late. Returns at once if another thread does so."""
        while (digest := self.next) is not None and self._recent.has(digest) and self._lock.acquire(blocking=False):
            try:
                while (digest := self.next) is not None and (taken := self._recent.take([digest])):
                    self._feed(taken[0])
            finally:
                self._lock.release()
            # Once more: a chunk that came before the lock was free is nobody else's.

    def catch_up(self, number: int, read: Callable[[bytes], Payload]) -> None:
        """Feed until `number` of the chunks were; what did not come of late is read. Raises what `read` raises."""
        with self._lock:
            while self.at < number and (digest := self.next) is not None:
                taken = self._recent.take([digest])
                self._feed(taken[0] if taken else read(digest))

    def stop(self) -> None:
        """Returns when nothing is fed any more, and nothing will be."""
        with self._lock:
            self._stopped = True

    def _feed(self, pieces: Payload) -> None:
        try:
            for piece in pieces:
                self._export.feed(piece)
            self.at += 1
        except NodeError as error:  # of the fetch, not of the peer whose chunk this thread has
            self._fail(error)
        except BaseException as error:  # a bug: no piece may be fed twice after it
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._stopped = True


class ChunkSink:
    """Hands chunks to the landing, and those that are good to the verifier."""

    def __init__(self, image: Image, landing: Landing, recent: Recent) -> None:
        self.follower: Follower | None = None
        self._image = image
        self._landing = landing
        self._recent = recent

    def accept_many(self, blocks: Sequence[tuple[bytes, Payload]]) -> list[bool]:
        for key, pieces in blocks:
            expected = self._image.chunks[key[CID_SIZE - DIGEST_SIZE :]]
            size = sum(map(len, pieces))
            if size != expected and CID.from_bytes(key).matches(b"".join(pieces)):
                # Whoever made the image is to blame, not the peer that sent what was asked for.
                raise VerificationFailed(
                    f"image {self._image.id} is not valid: it says that a chunk of {size} bytes has {expected}"
                )
        chunks = [(key[CID_SIZE - DIGEST_SIZE :], pieces) for key, pieces in blocks]
        good = self._landing.accept_many(chunks)
        follower = self.follower
        for ok, (digest, pieces) in zip(good, chunks, strict=True):
            if ok and (follower is None or not follower.offer(digest, pieces)):
                self._recent.put(digest, pieces)
        if follower is not None:
            follower.go_on()
        return good

"""What to send to whom next: the serving half of the exchange.

Peers are served in deficit round robin (Shreedhar and Varghese 1996), so that each gets the same bytes whatever the
size of its chunks, within priority classes. Among what one peer wants, the chunk this node has sent out least often
goes first: in a flash crowd the seed then hands out every chunk once before any chunk twice (super-seeding, BEP 16),
and the crowd exchanges the rest among itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from protocols.exchange.messages import MAX_IDS, Priority

QUANTUM = 1 << 20  # one chunk of the largest usual size per turn
MAX_QUEUED = 2 << 20  # bytes read for one peer and not yet taken by its connection: 160 ms at 100 Mbit/s
MAX_QUEUED_TOTAL = 64 << 20  # the same over all peers, and one block each more
LOOK_AHEAD = 64  # chunks compared for the least-sent one; bounds the work per choice
SENT_MEMORY = 1 << 20


@dataclass(slots=True)
class _Client:
    wants: dict[Priority, dict[bytes, None]] = field(default_factory=lambda: {p: {} for p in Priority})
    deficit: int = 0
    queued: int = 0

    def waiting(self) -> int:
        return sum(len(queue) for queue in self.wants.values())


class Uploads:
    """All peers' wants. A *key* is a block's binary CID; sizes are in bytes."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._turns: list[str] = []
        self._queued = 0
        self._sent: dict[bytes, int] = {}

    def want(self, peer: str, keys: Sequence[bytes], priority: Priority) -> bool:
        """Queue `keys` for a peer. False if more than `2 * MAX_IDS` would wait, and all were dropped: answer BUSY."""
        client = self._clients.get(peer)
        if client is None:
            client = self._clients[peer] = _Client()
            self._turns.append(peer)
        if client.waiting() + len(keys) > 2 * MAX_IDS:
            for queue in client.wants.values():
                queue.clear()
            return False
        for key in keys:
            for queue in client.wants.values():  # asked again at another priority: it moves
                queue.pop(key, None)
            client.wants[priority][key] = None
        return True

    def cancel(self, peer: str, keys: Sequence[bytes]) -> None:
        client = self._clients.get(peer)
        if client is not None:
            for key in keys:
                for queue in client.wants.values():
                    queue.pop(key, None)

    def leave(self, peer: str) -> None:
        client = self._clients.pop(peer, None)
        if client is not None:
            self._turns.remove(peer)
            self._queued -= client.queued

    def next(self) -> tuple[str, bytes] | None:
        """Whose turn it is and what to send; None when nobody waits or has room. Call `queued` with its size."""
        # Peers that do not read must not keep the others waiting: past the total everybody gets one block at a time.
        limit = MAX_QUEUED if self._queued < MAX_QUEUED_TOTAL else 1
        for priority in Priority:
            ready = [
                peer
                for peer in self._turns
                if (client := self._clients[peer]).wants[priority] and client.queued < limit
            ]
            if not ready:
                continue
            peer = next((peer for peer in ready if self._clients[peer].deficit > 0), None)
            if peer is None:
                # As many rounds as it takes, or chunks larger than the quantum would pile up a debt that lasts.
                rounds = -max(self._clients[other].deficit for other in ready) // QUANTUM + 1
                for other in ready:
                    self._clients[other].deficit += rounds * QUANTUM
                peer = next(peer for peer in ready if self._clients[peer].deficit > 0)
            wants = self._clients[peer].wants[priority]
            # Somebody who waits for this very chunk waits for them in order.
            key = next(iter(wants)) if priority is Priority.INTERACTIVE else self._least_sent(wants)
            del self._clients[peer].wants[priority][key]
            return peer, key
        return None

    def _least_sent(self, queue: dict[bytes, None]) -> bytes:
        best, fewest = b"", -1
        for looked, key in enumerate(queue):
            sent = self._sent.get(key, 0)
            if fewest < 0 or sent < fewest:
                best, fewest = key, sent
            if not sent or looked >= LOOK_AHEAD:
                break
        return best

    def queued(self, peer: str, key: bytes, size: int) -> None:
        """`size` bytes were read for a peer and wait for its connection."""
        if len(self._sent) >= SENT_MEMORY:
            self._sent.clear()
        self._sent[key] = self._sent.get(key, 0) + 1
        client = self._clients.get(peer)
        if client is None:
            return
        client.queued += size
        self._queued += size
        client.deficit -= size
        if client.deficit <= 0:
            self._turns.remove(peer)
            self._turns.append(peer)

    def sent(self, peer: str, size: int) -> None:
        """The connection took `size` bytes."""
        client = self._clients.get(peer)
        if client is not None:
            client.queued -= size
            self._queued -= size

    def waiting(self, peer: str) -> int:
        """Blocks a peer still waits for."""
        client = self._clients.get(peer)
        return client.waiting() if client is not None else 0

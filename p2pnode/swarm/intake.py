"""What comes in, on its way from all peers to where a download keeps it: unpacked, and handed over by one worker thread
at a time.

One thread checks and writes faster than the event loop receives. More of them would only take turns with it, and with
each other: every call costs two switches, and finds the processor's caches full of something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import trio
import zstandard

from protocols.exchange import messages as m

CALL_BYTES = 8 << 20  # of blocks; a whole read of one peer (`session.READ_SIZE`) is never divided


class Sink(Protocol):
    """Where the blocks of a download go. Called in worker threads, by one at a time."""

    def accept_many(self, blocks: Sequence[tuple[bytes, m.Payload]]) -> list[bool]:
        """Check blocks against their keys and keep the good ones; False for each that does not match its key.

        Raises a `NodeError`, which ends the download, if they cannot be kept."""


@dataclass(slots=True)
class _Batch:
    blocks: Sequence[m.Block]
    verdicts: list[bool] | None = None
    error: Exception | None = None


class Intake:
    """The way of one download's blocks to its sink. `limits`: the most bytes each may have, by key."""

    def __init__(self, sink: Sink, limits: dict[bytes, int]) -> None:
        self._sink = sink
        self._limits = limits
        self._waiting: deque[_Batch] = deque()
        self._turn = trio.Lock()

    async def accept(self, blocks: Sequence[m.Block]) -> list[bool]:
        """Whether each of the blocks is good, once it is kept. Raises what the sink does.

        What comes while a call is under way goes together into the next one. Whoever is cancelled leaves nothing."""
        batch = _Batch(blocks)
        self._waiting.append(batch)
        try:
            async with self._turn:
                if batch.verdicts is None and batch.error is None:  # else somebody before us took it along
                    await trio.to_thread.run_sync(self._take)
        finally:
            batch.blocks = ()
        if batch.error is not None:
            raise batch.error
        assert batch.verdicts is not None
        return batch.verdicts

    def _take(self) -> None:
        batches: list[tuple[_Batch, Sequence[m.Block]]] = []
        size = 0
        while self._waiting and size < CALL_BYTES:
            batch = self._waiting.popleft()
            batches.append((batch, batch.blocks))
            size += sum(len(piece) for block in batches[-1][1] for piece in block.payload)  # not what it says it has
        try:
            verdicts = iter(self._hand_over([block for _, blocks in batches for block in blocks]))
        except Exception as error:  # noqa: BLE001 (a bug, too, is raised again by everybody whose blocks these are)
            for batch, _ in batches:
                batch.error = error
        else:
            for batch, blocks in batches:
                batch.verdicts = [next(verdicts) for _ in blocks]

    def _hand_over(self, blocks: Sequence[m.Block]) -> list[bool]:
        """Those that are packed one after the other: what is unpacked at a time is one block's worth."""
        plain = [block for block in blocks if block.encoding is m.Encoding.RAW]
        verdicts = iter(self._sink.accept_many([(block.id, block.payload) for block in plain]))
        return [next(verdicts) if block.encoding is m.Encoding.RAW else self._unpack(block) for block in blocks]

    def _unpack(self, block: m.Block) -> bool:
        return self._sink.accept_many([(block.id, _unpacked(block, self._limits[block.id]))])[0]


def _unpacked(block: m.Block, limit: int) -> m.Payload:
    """The plain bytes of a packed block; empty, which no hash matches, if it does not unpack to what it says, or to
    more than `limit` bytes: 200 bytes of zstd can claim 4 MiB."""
    if block.size > limit:
        return ()
    data = b"".join(block.payload)
    try:
        # zstandard allocates and fills what the frame says of itself, whatever `max_output_size` is.
        if zstandard.frame_content_size(data) not in (-1, block.size):
            return ()
        # Neither the frame's own size nor its window is trusted, and nothing past `size` is decoded.
        plain = zstandard.ZstdDecompressor(max_window_size=1 << 23).decompress(
            data, max_output_size=block.size, allow_extra_data=False
        )
    except zstandard.ZstdError:
        return ()
    return (plain,) if len(plain) == block.size else ()

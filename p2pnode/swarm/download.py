"""One running download: where its blocks go, and how they are unpacked on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio
import zstandard

from p2pnode.errors import NodeError
from protocols.cid import CID
from protocols.exchange import messages as m
from protocols.exchange.state import DownloadStats


class Sink(Protocol):
    """Where the blocks of a download go. Called in worker threads."""

    def accept_many(self, blocks: Sequence[tuple[bytes, m.Payload]]) -> list[bool]:
        """Check blocks against their keys and keep the good ones; False for each that does not match its key.

        Raises a `NodeError`, which ends the download, if they cannot be kept."""


@dataclass
class Download:
    """A running download, as its fetcher sees it."""

    id: bytes
    root: CID
    keys: dict[bytes, int]  # with the most bytes each may have
    sink: Sink
    on_arrival: Callable[[list[bytes]], None]
    done: trio.Event = field(default_factory=trio.Event)
    failed: trio.Event = field(default_factory=trio.Event)
    failure: NodeError | None = None
    last: DownloadStats | None = None
    relayed: dict[str, int] = field(default_factory=dict)  # bytes that came through a relay, by peer
    moved: dict[str, float] = field(default_factory=dict)  # peers that a direct connection was made to, and when

    async def fails(self) -> None:
        """Raises the error that stops the download, also when all was here once; never returns."""
        await self.failed.wait()
        await self.wait()

    async def wait(self) -> None:
        """Until every block is here. Raises the error that stopped it."""
        await self.done.wait()
        if self.failure is not None:
            raise self.failure

    def accept(self, blocks: Sequence[m.Block]) -> list[bool]:
        """Decode blocks and hand them to the sink. Runs in a worker thread."""
        accept = self.sink.accept_many
        if all(block.encoding is m.Encoding.RAW for block in blocks):
            return accept([(block.id, block.payload) for block in blocks])
        # One after the other: what is unpacked at a time is one block's worth.
        return [accept([(block.id, _decoded(block, self.keys[block.id]))])[0] for block in blocks]


def _decoded(block: m.Block, limit: int) -> m.Payload:
    """The plain bytes of a block; empty, which no hash matches, if it does not decode to what it says, or to more than
    `limit` bytes: 200 bytes of zstd can claim 4 MiB."""
    if block.encoding is m.Encoding.RAW:
        return block.payload
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

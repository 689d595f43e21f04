"""One running download."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

import trio

from p2pnode.errors import NodeError
from p2pnode.swarm.intake import Intake
from protocols.cid import CID
from protocols.exchange.state import DownloadStats


@dataclass
class Download:
    """A running download, as its fetcher sees it."""

    id: bytes
    root: CID
    keys: Container[bytes]
    intake: Intake
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

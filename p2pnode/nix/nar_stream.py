"""NARs as async streams: what imports and caches take their contents from."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import trio

from p2pnode.nix.cli import PathInfo
from p2pnode.nix.nar_reader import Buffer
from p2pnode.nix.narmap import dump
from p2pnode.nix.storepath import StorePath

T = TypeVar("T")


async def from_thread(make: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """The items of a blocking iterator, each computed in a worker thread. The iterator is closed when this is."""
    iterator = await trio.to_thread.run_sync(make)
    end = object()
    try:
        while (item := await trio.to_thread.run_sync(next, iterator, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def nars_of_trees(place: Callable[[StorePath], Path]) -> Callable[[PathInfo], AsyncGenerator[Buffer, None]]:
    """An `OpenNar` of paths whose contents lie on this machine; `place` tells where, as `NixStore.real_path` does."""

    def open_nar(info: PathInfo) -> AsyncGenerator[Buffer, None]:
        return from_thread(lambda: dump(place(info.path)))

    return open_nar

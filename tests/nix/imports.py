"""Imports of paths into a Nix store, as deliveries do them, but with all that is to be imported at hand."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from p2pnode.nix.cli import topological_order
from p2pnode.nix.daemon import OpenNar
from p2pnode.nix.into_store import StoreSession, open_session
from p2pnode.nix.signatures import SignedInfo
from p2pnode.nix.storepath import StorePath


async def add(session: StoreSession, paths: Iterable[SignedInfo], open_nar: OpenNar) -> list[StorePath]:
    """What a delivery does, path by path: references first, what is there is left alone. The paths that were not."""
    signed = {each.info.path: each for each in paths}
    missing = await session.missing(info.path for info in topological_order(each.info for each in signed.values()))
    for path in missing:
        await session.connection.add_path(signed[path], open_nar)
    return missing


async def into_store(
    paths: Iterable[SignedInfo],
    open_nar: OpenNar,
    *,
    top: StorePath | None = None,
    add_root: Path | None = None,
    socket: Path | None = None,
    store_root: Path | None = None,
) -> list[StorePath]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session(socket=socket, store_root=store_root))
        if add_root is not None and top is not None:
            assert await stack.enter_async_context(session.root(add_root, top)) == add_root
        return await add(session, paths, open_nar)

"""Verified store paths straight into a Nix store, through its daemon, kept from the garbage collector on the way.

One session is one connection, and what is added or asked for over it is a temporary root until it ends. So the order
is: open, make the lasting root (it may point to a path that is not valid yet), ask what is missing, fetch and add that,
close. Whoever may write to the store can do without a daemon that listens: `nix-daemon --stdio` then does its work.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from p2pnode.errors import DaemonUnavailable, NixError, NixMissing, OutputExists
from p2pnode.nix.daemon import DaemonConnection, connect_process, connect_socket
from p2pnode.nix.nar_format import write_error
from p2pnode.nix.signatures import SignedInfo
from p2pnode.nix.storepath import STORE_DIR, StorePath


class StoreSession:
    """An open way into a store. Made by `open_session`."""

    def __init__(self, connection: DaemonConnection) -> None:
        self.connection = connection

    async def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Those of `paths` that are not valid, in the order given.

        All of them are made temporary roots first: what is valid now stays so until the session ends.
        """
        wanted = list(dict.fromkeys(paths))
        for path in wanted:
            await self.connection.add_temp_root(path)
        valid = await self.connection.query_valid_paths(wanted)
        return [path for path in wanted if path not in valid]

    async def path_info(self, paths: Iterable[StorePath]) -> list[SignedInfo]:
        """What the store knows of `paths`, in their order: with signatures and `ca`, which `nix-store` does not tell.

        Raises NixError if one of them is not valid.
        """
        found: list[SignedInfo] = []
        for path in paths:
            signed = await self.connection.query_path_info(path)
            if signed is None:
                raise NixError(f"{path} is not a valid path of this Nix store")
            found.append(signed)
        return found

    @asynccontextmanager
    async def root(self, link: Path, target: StorePath) -> AsyncIterator[Path]:
        """Make the symlink `link` a garbage collector root of `target` and its closure, which may not be valid yet.

        If the block raises, the link is what it was before. Gives the link as an absolute path. Raises OutputExists
        if something else than a link into the store is there, OutputUnwritable, DiskFull.
        """
        absolute = Path(os.path.abspath(link))
        with _link(absolute, str(target)):
            await self.connection.add_indirect_root(absolute)
            yield absolute


@asynccontextmanager
async def open_session(*, socket: Path | None = None, store_root: Path | None = None) -> AsyncIterator[StoreSession]:
    """A way into a store: the daemon on `socket`; else, with `store_root`, the chroot store there; else the machine's.

    For the machine's own store the daemon's usual socket is tried first, then a daemon of our own. Raises
    DaemonUnavailable, saying why neither works.
    """
    async with AsyncExitStack() as stack:
        if store_root is not None and socket is None:
            connection = await stack.enter_async_context(connect_process(store_root))
        else:
            try:
                connection = await stack.enter_async_context(connect_socket(socket))
            except DaemonUnavailable as error:
                if socket is not None or not may_write(Path(STORE_DIR)):
                    raise
                try:
                    connection = await stack.enter_async_context(connect_process())
                except (DaemonUnavailable, NixMissing) as other:
                    raise DaemonUnavailable(f"{error}; and without it: {other}") from other
        yield StoreSession(connection)


def may_write(directory: Path) -> bool:
    """Whether this user may write there, or may make it: a Nix that was just installed has no store yet."""
    there = next(each for each in (directory, *directory.parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK)


@contextmanager
def _link(link: Path, target: str) -> Iterator[None]:
    """`link` points to `target`; if the block raises, to where it pointed before, or it is gone."""
    previous = _target(link)
    try:
        _point(link, target)
        yield
    except BaseException:
        if previous is not None:
            _point(link, previous)
        else:
            link.unlink(missing_ok=True)
        raise


def _target(link: Path) -> str | None:
    """Where an existing root points; None if nothing is there. Raises OutputExists for all that is not ours."""
    try:
        target = os.readlink(link)
    except FileNotFoundError:
        return None
    except OSError:  # no symlink, or not to be read
        target = ""
    if not target.startswith(STORE_DIR + "/"):
        raise OutputExists(f"{link} exists already and is no link into {STORE_DIR}; choose another place for the root")
    return target


def _point(link: Path, target: str) -> None:
    """Make or change a symlink in one step: at no time is there no root."""
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    try:
        temporary.symlink_to(target)
        try:
            temporary.rename(link)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise write_error(os.fsencode(link), error) from error

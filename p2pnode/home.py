"""The home directory of a node: what lies where in it, and the lock that keeps it to one process."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from p2pnode.errors import ConfigError, DiskFull, HomeLocked, StoreError

MODE = 0o700  # the identity's key and the control socket are for the owner only


@dataclass(frozen=True, slots=True)
class Home:
    """The paths in a home."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def control_socket(self) -> Path:
        return self.root / "control.sock"

    @property
    def address_book(self) -> Path:
        return self.root / "peers.json"

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"


def address_book(root: Path) -> Path:
    """Where the node at `root` keeps the addresses of peers it met."""
    return Home(root).address_book


def create(root: Path) -> Home:
    """The home at `root`, made if it is not there. Raises `ConfigError` or `StoreError`."""
    try:
        root.mkdir(mode=MODE, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"the home {root} cannot be used: it is not a directory") from None
    except OSError as exc:
        raise _unusable(root, exc) from exc
    return Home(root)


@contextmanager
def lock(root: Path) -> Iterator[Home]:
    """Hold the home at `root` (made if needed) for this process. Raises `HomeLocked` naming who has it.

    The lock is the kernel's (flock), so it ends with the process however that dies; the pid in the file is only for
    the message. Not re-entrant: a second `lock` of the same home in one process is refused too.
    """
    home = create(root)
    try:
        fd = os.open(home.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise _unusable(root, exc) from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            holder = f"process {pid}" if pid.isdigit() else "another process"
            raise HomeLocked(
                f"the home {root} is in use by {holder}; wait for it to end or stop it, or give another --home "
                f"(with `p2pnode run` on this home, commands go through its control socket {home.control_socket.name})"
            ) from None
        except OSError as exc:
            raise _unusable(root, exc) from exc
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        except OSError as exc:
            raise _unusable(root, exc) from exc
        yield home
    finally:
        os.close(fd)  # the file stays: removing it would let two processes lock two different files


def _unusable(root: Path, exc: OSError) -> StoreError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"the home {root} cannot be used: the disk is full; make space, or give another --home")
    return StoreError(f"the home {root} cannot be used: {exc.strerror}; give another with --home or P2PNODE_HOME")

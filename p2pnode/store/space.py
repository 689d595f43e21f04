"""Free space, and errors of the disk in words a user can act on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from p2pnode.errors import DiskFull, OutputUnwritable, StoreError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def readable_size(size: int) -> str:
    """`size` bytes for people: "1.5 MiB"."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk of `path` (or of its nearest parent that exists)."""
    status = os.statvfs(_existing(path))
    return status.f_bavail * status.f_frsize


def check_space(path: Path, needed: int) -> None:
    """Raises DiskFull unless the disk that `path` is or would be on has `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise DiskFull(
            f"{readable_size(needed)} are needed on the disk of {path}, but only {readable_size(free)} are free; "
            "make room and run the same command again"
        )


def write_failure(path: Path, error: OSError) -> StoreError:
    """What to raise when writing, creating, renaming or removing `path` failed with `error`."""
    if error.errno == errno.EFBIG:
        return DiskFull(f"{path} would be larger than the file system or a limit allows")
    if error.errno in _FULL:
        return DiskFull(
            f"the disk of {path} is full ({readable_size(free_bytes(path))} free); "
            "make room and run the same command again: what was received is kept"
        )
    reason = os.strerror(error.errno or 0)
    if error.errno in _DENIED:
        return OutputUnwritable(f"{path} cannot be written: {reason}")
    return StoreError(f"{path} could not be written: {reason}")


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path

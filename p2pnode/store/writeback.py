"""Write-behind: the kernel is told to begin writing what has arrived, so that the sync at the end finds little left.

Else a fetch of 1 GiB is followed by a second in which nothing moves but the disk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

BEHIND = 16 << 20  # bytes between calls: long runs are cheap to write
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: begin writing dirty pages, wait for nothing

_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)  # Linux only
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class WriteBehind:
    """Of one file that grows in about ascending order. Not thread-safe."""

    def __init__(self) -> None:
        self._size = 0
        self._first = self._end = -1

    def wrote(self, fd: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Pages were written at these (offset, length)s. Only advice: errors show up in the sync."""
        for offset, length in ranges:
            self._first = offset if self._first < 0 else min(self._first, offset)
            self._end = max(self._end, offset + length)
            self._size += length
        if self._size >= BEHIND and _sync_file_range is not None:
            _sync_file_range(fd, self._first, self._end - self._first, SYNC_FILE_RANGE_WRITE)
            self._size, self._first, self._end = 0, -1, -1

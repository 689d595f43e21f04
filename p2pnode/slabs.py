"""Large buffers that are used again and again.

A buffer of a megabyte that comes from the operating system costs 256 page faults before anything is in it, and one that
was used a moment ago is still in the processor's caches.
"""

from __future__ import annotations

import mmap
import sys
import threading

SLAB_SIZE = (1 << 20) + (64 << 10) + 1  # one read of a connection, behind the longest beginning of a Noise record
KEPT = 32  # slabs, for good: what a fetch has under way, not what it keeps for later
LEAST = -(-SLAB_SIZE // 4)  # whatever is smaller would keep a slab for a slice of it

_slabs: list[mmap.mmap] = []
_lock = threading.Lock()


def _references(slabs: list[mmap.mmap], index: int) -> int:
    return sys.getrefcount(slabs[index])


# Every slice of a slab has a reference to it. How many are not those of slices depends on the interpreter.
_UNUSED = _references([mmap.mmap(-1, 1)], 0)


def take(size: int) -> memoryview:
    """A buffer of `size` bytes, whatever stands in it. Of the caller alone, until the last slice of it is gone.

    Thread-safe. It is a slice of a slab of at most four times its size, or a buffer of its own."""
    if not LEAST <= size <= SLAB_SIZE:
        return memoryview(bytearray(size))
    with _lock:
        for index in range(len(_slabs) - 1, -1, -1):  # the last is in the caches
            if _references(_slabs, index) == _UNUSED:
                return memoryview(_slabs[index])[:size]
        slab = mmap.mmap(-1, SLAB_SIZE)  # pages that nothing is written to cost nothing; a bytearray is filled first
        if len(_slabs) < KEPT:
            _slabs.append(slab)
        return memoryview(slab)[:size]

#!/usr/bin/env python3
"""A cable with a delay: carries Ethernet frames between two TAP devices that it makes in two namespaces.

    wire.py NAMESPACE DEVICE NAMESPACE DEVICE SECONDS

tc's netem would do the same in the kernel, but many small kernels are built without it. Good for some 10,000 frames a
second: for round-trip times that matter, not for measuring throughput. Prints a line once both ends exist; they go when
it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x0002 | 0x1000
_FRAME = 65536
_QUEUE = 4096  # frames under way, each direction; what comes on top is dropped, as by a full router


def main() -> None:
    a_space, a_device, b_space, b_device, delay = sys.argv[1:]
    ends = tap(a_space, a_device), tap(b_space, b_device)
    print("up", flush=True)
    carry(ends, float(delay))


def tap(namespace: str, device: str) -> int:
    space = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(space, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"entering {namespace}")
    os.close(space)
    made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(made, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TAP_NO_PI))
    return made


def carry(ends: tuple[int, int], delay: float) -> None:
    # The delay is the same for every frame, so each direction stays in order and needs no heap.
    under_way: deque[tuple[float, int, bytes]] = deque()
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        wait = None if not under_way else max(0.0, under_way[0][0] - time.monotonic()) * 1000
        for end, _ in poll.poll(wait):
            while len(under_way) < 2 * _QUEUE:
                try:
                    frame = os.read(end, _FRAME)
                except BlockingIOError:
                    break
                except OSError:  # this end is down
                    time.sleep(0.001)
                    break
                under_way.append((time.monotonic() + delay, other[end], frame))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, end, frame = under_way.popleft()
            with suppress(OSError):  # the other end is down or full: the frame is lost, as on any cable
                os.write(end, frame)


if __name__ == "__main__":
    main()

"""Bytes that lie in an open file, on their way to a socket without passing through our memory."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

from p2pnode.errors import StoreError

_POLL_MS = 100  # how soon a cancelled thread notices
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # not from every file system


@dataclass(frozen=True, slots=True)
class FileRange:
    """`length` bytes of the file `fd` from `offset` on. Whoever gets it must be done with it before `fd` is closed."""

    fd: int
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        """Raises StoreError if the file is shorter. Blocks."""
        parts = []
        at, end = self.offset, self.offset + self.length
        while at < end:
            data = os.pread(self.fd, end - at, at)
            if not data:
                raise _shorter(end)
            parts.append(data)
            at += len(data)
        return b"".join(parts)

    def cut(self, size: int) -> list[FileRange]:
        """The same bytes in ranges of at most `size`."""
        starts = range(0, self.length, size)
        return [FileRange(self.fd, self.offset + at, min(size, self.length - at)) for at in starts]


def send_all(sock: socket.socket, parts: list[bytes | FileRange], check_cancelled: Callable[[], None]) -> None:
    """Send parts one after the other through a socket that does not block.

    Blocks; `check_cancelled` is called now and then meanwhile and may raise. Raises OSError of the socket, StoreError.
    """
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    for part in parts:
        sent = 0
        while sent < len(part):
            try:
                sent += _send(sock, part, sent)
            except BlockingIOError:
                if not writable.poll(_POLL_MS):
                    check_cancelled()


def _send(sock: socket.socket, part: bytes | FileRange, sent: int) -> int:
    """Send some of what is left of a part."""
    if isinstance(part, bytes):
        return sock.send(part[sent:])
    at, left = part.offset + sent, part.length - sent
    try:
        count = os.sendfile(sock.fileno(), part.fd, at, left)
    except OSError as error:
        if error.errno not in _NO_SENDFILE:
            raise
        data = os.pread(part.fd, min(left, 1 << 16), at)
        count = sock.send(data) if data else 0
    if not count:
        raise _shorter(part.offset + part.length)
    return count


def _shorter(end: int) -> StoreError:
    return StoreError(f"a file of this node ends before byte {end}, which was written there: is somebody changing it?")

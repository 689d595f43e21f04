"""The command's side of the control socket (p2pnode/control.py). Blocking sockets: trio costs 0.15 s to import."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from p2pnode.errors import StoreError, StreamClosed
from p2pnode.failures import CommandFailed, Failure
from p2pnode.progress import Progress, Report

MAX_ANSWER = 256 << 20  # bytes in a line; `show` of the largest closure has 60 MiB
CONNECT_TIMEOUT = 10.0  # s for a daemon to accept: it may be hashing, but it is never silent so long


class Daemon:
    """A connection to the daemon of a home, for one operation."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    def connect(cls, path: Path) -> Daemon | None:
        """The daemon behind the socket at `path`; None if there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT)
        try:
            connection.connect(os.fspath(path))
        except OSError as exc:
            connection.close()
            if exc.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR, errno.ENOTSOCK, None):
                # No socket, a dead node's socket; without errno: too long a path for any daemon to listen on.
                return None
            raise StoreError(f"the daemon's control socket {path} cannot be used: {exc.strerror or exc}") from exc
        connection.settimeout(None)
        return cls(connection)

    def call(self, operation: str, args: Mapping[str, Any], report: Report) -> Iterator[dict[str, Any]]:
        """The results of one operation as they come. Raises `CommandFailed` with what the daemon said."""
        with self._connection, self._connection.makefile("rb") as answers:
            try:
                self._connection.sendall(json.dumps({"op": operation, "args": dict(args)}).encode() + b"\n")
                while line := answers.readline(MAX_ANSWER):
                    answer = _decode(line)
                    if "progress" in answer:
                        report(Progress(**answer["progress"]))
                    elif "result" in answer:
                        yield answer["result"]
                    elif "error" in answer:
                        raise CommandFailed(Failure(**answer["error"]))
                    elif "done" in answer:
                        return
            except ConnectionError:
                pass
        raise StreamClosed("the daemon ended before the command was done; see its log, and run the command again")


def _decode(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise StreamClosed("the daemon broke off in the middle of an answer; see its log, and run the command again")
    return answer

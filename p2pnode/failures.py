"""From any exception to the three things that a user or a script is told: error class, one sentence, exit code."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from p2pnode.errors import (
    EXIT_NETWORK,
    EXIT_STORE,
    LocalError,
    NodeError,
    NotFound,
    RemoteError,
    StoreError,
    TrustError,
)
from protocols.errors import ProtocolError

EXIT_INTERNAL = 1
_PRECEDENCE = (TrustError, StoreError, LocalError, NotFound, RemoteError, NodeError, OSError, ProtocolError)
"""Of several errors at once, the first of these is told: network errors are most often the echo of another one."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a command failed. `internal`: a fault in this program, whose traceback belongs into the log."""

    error: str
    message: str
    exit_code: int
    internal: bool = False

    def to_dict(self) -> dict[str, object]:
        return {"error": self.error, "message": self.message, "exit_code": self.exit_code}


class CommandFailed(Exception):
    """A failure that was described elsewhere, such as by the daemon that ran the command."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def describe(exc: BaseException) -> Failure:
    """What to tell about `exc`; of an exception group, what its most telling member says."""
    exc = most_telling(exc)
    name = type(exc).__name__
    if isinstance(exc, CommandFailed):
        return exc.failure
    if isinstance(exc, NodeError):
        general = (type(exc).__doc__ or name).strip().splitlines()[0].rstrip(".")
        return Failure(name, one_line(str(exc)) or general, exc.exit_code)
    if isinstance(exc, OSError) and exc.strerror:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            name = "DiskFull"
        where = f"{exc.filename}: " if exc.filename is not None else ""
        return Failure(name, one_line(f"{where}{exc.strerror}"), EXIT_STORE)
    if isinstance(exc, ProtocolError):
        return Failure(name, one_line(f"a peer sent what it must not send: {exc}"), EXIT_NETWORK)
    detail = f"{name}: {exc}" if str(exc) else name
    return Failure(
        "InternalError", one_line(f"internal error, please report it: {detail}"), EXIT_INTERNAL, internal=True
    )


def most_telling(exc: BaseException) -> BaseException:
    """The leaf of an exception group that the user should hear of; any other exception itself."""
    leaves: list[BaseException] = []
    pending = [exc]
    while pending:
        each = pending.pop(0)
        if isinstance(each, BaseExceptionGroup):
            pending.extend(each.exceptions)
        else:
            leaves.append(each)
    for family in (CommandFailed, *_PRECEDENCE):
        for leaf in leaves:
            if isinstance(leaf, family):
                return leaf
    return leaves[0]


def one_line(text: str, limit: int = 2000) -> str:
    """`text` fit for one line of a terminal: no control characters (a peer's or a path's may hide escapes), bounded."""
    line = "".join(char if char.isprintable() else " " for char in text).strip()
    return line if len(line) <= limit else line[: limit - 3] + "..."

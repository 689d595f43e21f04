"""The entry point of `p2pnode` and `python -m p2pnode`: imports next to nothing before Ctrl-C is taken care of."""

from __future__ import annotations

import sys
from contextlib import suppress

from p2pnode.cli import interrupts


def main() -> None:
    interrupts.install()
    from p2pnode.cli.commands import execute

    code = execute(sys.argv[1:])
    # Not sys.exit: a thread of a library that is still at work must not keep the user who has their answer.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    interrupts.leave(code)

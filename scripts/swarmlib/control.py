"""Ask a daemon through its control socket: thousands of times cheaper than starting the command line for it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

_SECONDS = 10.0


def ask(home: Path, operation: str) -> list[dict[str, Any]] | None:
    """The results of an operation without arguments (`status`, `images`, `peers`); None if the daemon is gone."""
    received = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(str(home / "control.sock"))
            connection.sendall(json.dumps({"op": operation, "args": {}}).encode() + b"\n")
            while data := connection.recv(1 << 20):
                received += data
    except OSError:
        return None
    answers = [json.loads(line) for line in received.splitlines()]
    if not answers or not answers[-1].get("done"):
        return None
    return [answer["result"] for answer in answers if "result" in answer]

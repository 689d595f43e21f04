"""The test's end of a peer process (see peers/control.py)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT = 30.0  # s


class PeerFailed(Exception):
    """The peer's answer to a command was an error."""


class Remote:
    """One peer process. After a command that was cancelled, it is replaced before the next test."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.peer = ""
        self.addr = ""
        self.version = ""
        self._command = command
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `stop`)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._dirty = False

    async def ensure(self) -> None:
        """Have a process that answers. It runs in an empty directory."""
        if self._process is not None and self._process.poll() is None and not self._dirty:
            return
        self.kill()
        self._dirty = False
        self._folder = tempfile.TemporaryDirectory(prefix="p2pnode-interop-")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=self._folder.name,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        try:
            with trio.fail_after(START_TIMEOUT):
                hello = json.loads(await self._line())
        except BaseException:
            self.kill()
            raise
        self.peer, self.addr, self.version = hello["peer"], hello["addr"], hello["version"]

    async def _line(self) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        line = await trio.to_thread.run_sync(self._process.stdout.readline, abandon_on_cancel=True)
        if not line:
            raise PeerFailed(f"the {self.name} peer ended: {self.log()}")
        return line

    async def call(self, do: str, **args: Any) -> Any:
        """One command at a time. Raises `PeerFailed`."""
        assert self._process is not None and self._process.stdin is not None and not self._dirty
        self._number += 1
        request = {"id": self._number, "do": do, **args}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self._dirty = True
        answer = json.loads(await self._line())
        self._dirty = False
        assert answer["id"] == self._number
        if "error" in answer:
            raise PeerFailed(f"{self.name}: {answer['error']}")
        return answer["result"]

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # of what the process did not read
                        pipe.close()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def stop(self) -> None:
        self.kill()
        self._log.close()

"""How a test drives a peer process: one JSON object per line, commands on its stdin, answers on its stdout.

First line out: {"peer", "addr", "version"}. Then {"id", "do", ...} in, {"id", "result"} or {"id", "error"} out. The
peer ends with its stdin, so none outlives the test run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

Command = Callable[..., Awaitable[Any]]


async def serve(hello: Mapping[str, Any], commands: Mapping[str, Command]) -> None:
    say(hello)
    async with trio.open_nursery() as nursery:
        stdin = trio.lowlevel.FdStream(0)
        buffer = b""
        while data := await stdin.receive_some():
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                nursery.start_soon(_run, json.loads(line), commands)
        nursery.cancel_scope.cancel()


async def _run(request: dict[str, Any], commands: Mapping[str, Command]) -> None:
    number = request.pop("id")
    try:
        result = await commands[request.pop("do")](**request)
    except Exception as exc:  # noqa: BLE001 (the top of a command: the test gets it as its answer)
        say({"id": number, "error": f"{type(exc).__name__}: {_deepest(exc)}"})
    else:
        say({"id": number, "result": result})


def _deepest(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def say(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Counter:
    """Counts events; commands wait for them."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = trio.Event()

    def add(self) -> None:
        self.count += 1
        self._changed.set()
        self._changed = trio.Event()

    async def beyond(self, seen: int) -> int:
        while self.count <= seen:
            await self._changed.wait()
        return self.count

"""The control socket with a real server and real clients; the node behind it is a small real object of this file."""

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pnode import control
from p2pnode.cli.client import Daemon
from p2pnode.errors import ConfigError, HomeLocked, NotFound, PeerUnreachable, StreamClosed, UsageError
from p2pnode.failures import CommandFailed
from p2pnode.home import lock
from p2pnode.progress import Progress, Report, silent


class SmallNode:
    """Answers from memory; `fetch` waits until it is told or cancelled."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.reported = trio.Event()
        self.fetching = trio.Event()
        self.cancelled = trio.Event()

    async def provide(
        self, path: str, *, kind: str | None, name: str | None, report: Report, sign_keys: Sequence[str] = ()
    ) -> dict[str, Any]:
        report(Progress("reading", 1, 2, note="half"))
        await self.reported.wait()
        self.rows[path] = {"image": path, "kind": kind, "name": name}
        return self.rows[path]

    async def publish(
        self,
        cache: str,
        *,
        paths: Sequence[str],
        name: str | None,
        report: Report,
        tell: control.Tell,
        sign_keys: Sequence[str] = (),
        require_signatures: str | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(tell, {"number": number, "cache": cache, "paths": paths})
        await self.reported.wait()
        if name == "bad":
            raise NotFound("no such cache")

    async def fetch(
        self,
        spec: str,
        *,
        out: str | None,
        force: bool,
        keep_chunks: bool,
        timeout: float,
        peers: Sequence[str],
        report: Report,
        into_store: bool = False,
        add_root: str | None = None,
        to_cache: str | None = None,
        sign_keys: Sequence[str] = (),
        require_signatures: str | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> dict[str, Any]:
        self.fetching.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()
        raise AssertionError

    async def images(self) -> list[dict[str, Any]]:
        return list(self.rows.values())

    async def show(self, spec: str) -> dict[str, Any]:
        if spec == "bug":
            raise ZeroDivisionError("a bug")
        if spec == "two":
            raise ExceptionGroup("x", [PeerUnreachable("echo"), ExceptionGroup("y", [NotFound("the cause")])])
        if spec not in self.rows:
            raise NotFound(f"no image {spec!r}")
        return self.rows[spec]

    async def verify(self, spec: str, report: Report) -> dict[str, Any]:
        return await self.show(spec)

    async def remove(self, spec: str) -> dict[str, Any]:
        return self.rows.pop(spec)

    async def status(self) -> dict[str, Any]:
        return {"text": "x" * 3_000_000}

    async def peers(self) -> list[dict[str, Any]]:
        return []

    async def doctor(self, target: str | None, report: Report) -> dict[str, Any]:
        return {"target": target or "self"}


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[SmallNode]:
    node = SmallNode()
    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve, path, node)
        yield node
        nursery.cancel_scope.cancel()


def call(socket_path: Path, operation: str, report: Report = silent, /, **args: Any) -> list[dict[str, Any]]:
    daemon = Daemon.connect(socket_path)
    assert daemon is not None
    return list(daemon.call(operation, args, report))


def raw(path: Path, data: bytes) -> list[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.settimeout(20)
        try:
            connection.sendall(data)
            with connection.makefile("rb") as answers:
                return [json.loads(line) for line in answers]
        except (BrokenPipeError, ConnectionResetError):
            return []


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "control.sock"


async def test_results_and_progress(path: Path) -> None:
    reports: list[Progress] = []
    async with serving(path) as node:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

        def report(progress: Progress) -> None:
            reports.append(progress)
            trio.from_thread.run_sync(node.reported.set)

        result = await trio.to_thread.run_sync(lambda: call(path, "provide", report, path="/a", kind="file", name=None))
        assert result == [{"image": "/a", "kind": "file", "name": None}]
        assert reports == [Progress("reading", 1, 2, note="half")]
        await trio.to_thread.run_sync(lambda: call(path, "provide", path="/b"))
        assert len(await trio.to_thread.run_sync(lambda: call(path, "images"))) == 2
        assert (await trio.to_thread.run_sync(lambda: call(path, "rm", spec="/b")))[0]["image"] == "/b"
        assert list(node.rows) == ["/a"]
        assert await trio.to_thread.run_sync(lambda: call(path, "peers")) == []
        assert len((await trio.to_thread.run_sync(lambda: call(path, "status")))[0]["text"]) == 3_000_000
    assert not path.exists()


async def test_results_that_come_while_the_operation_goes_on(path: Path) -> None:
    def first_and_rest(node: SmallNode, name: str | None) -> list[dict[str, Any]]:
        daemon = Daemon.connect(path)
        assert daemon is not None
        answers = daemon.call("publish", {"cache": "/srv/cache", "paths": ["x"], "name": name}, silent)
        found = [next(answers) for _ in range(100)]
        trio.from_thread.run_sync(node.reported.set)  # only now may it end
        return found + list(answers)

    async with serving(path) as node:
        with trio.fail_after(10):
            found = await trio.to_thread.run_sync(first_and_rest, node, None)
        assert sorted(each["number"] for each in found) == list(range(100))
        assert found[0]["cache"] == "/srv/cache" and found[0]["paths"] == ["x"]
        with pytest.raises(CommandFailed, match="no such cache"):
            await trio.to_thread.run_sync(first_and_rest, node, "bad")


@pytest.mark.parametrize(
    ("spec", "error", "exit_code", "words"),
    [
        ("gone", "NotFound", 3, "no image 'gone'"),
        ("two", "NotFound", 3, "the cause"),
        ("bug", "InternalError", 1, "a bug"),
    ],
)
async def test_errors_reach_the_client(path: Path, spec: str, error: str, exit_code: int, words: str) -> None:
    async with serving(path):
        for _ in range(2):  # the second shows that the daemon lives on
            with pytest.raises(CommandFailed) as caught:
                await trio.to_thread.run_sync(lambda: call(path, "show", spec=spec))
            failure = caught.value.failure
            assert (failure.error, failure.exit_code) == (error, exit_code)
            assert words in failure.message


@pytest.mark.parametrize("half", [True, False])
async def test_a_client_that_leaves_cancels(path: Path, half: bool) -> None:
    async with serving(path) as node:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b'{"op":"fetch","args":{"spec":"x"}}\n')
            with trio.fail_after(5):
                await node.fetching.wait()
            assert not node.cancelled.is_set()
            if half:
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.close()
            with trio.fail_after(5):
                await node.cancelled.wait()
        assert await trio.to_thread.run_sync(lambda: call(path, "images")) == []


async def test_a_daemon_that_ends_is_told(path: Path) -> None:
    async def ask() -> None:
        with pytest.raises(StreamClosed, match="daemon ended"):
            await trio.to_thread.run_sync(lambda: call(path, "fetch", spec="x"))

    async with trio.open_nursery() as nursery, serving(path) as node:
        nursery.start_soon(ask)
        await node.fetching.wait()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"nonsense\n",
        b"[]\n",
        b'{"op":3}\n',
        b'{"op":"explode"}\n',
        b'{"op":"images","args":[]}\n',
        b'{"op":"images","args":{"x":1}}\n',
        b'{"op":"show"}\n',
        b'{"op":"show","args":{"spec":""}}\n',
        b'{"op":"show","args":{"spec":7}}\n',
        b'{"op":"provide","args":{"path":"relative"}}\n',
        b'{"op":"provide","args":{"path":"/a\\u0000b"}}\n',
        b'{"op":"publish","args":{"cache":"relative"}}\n',
        b'{"op":"publish","args":{"cache":"/a","paths":[""]}}\n',
        b'{"op":"publish","args":{"cache":"/a","tell":1}}\n',
        b'{"op":"fetch","args":{"spec":"x","timeout":true}}\n',
        b'{"op":"fetch","args":{"spec":"x","timeout":NaN}}\n',
        b'{"op":"fetch","args":{"spec":"x","peers":"/ip4"}}\n',
        b'{"op":"images"}\n{"op":"images"}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
    ],
)
async def test_malformed_requests(path: Path, line: bytes) -> None:
    async with serving(path):
        answers = await trio.to_thread.run_sync(raw, path, line)
        assert [answer["error"]["exit_code"] for answer in answers] == [2]
        assert await trio.to_thread.run_sync(lambda: call(path, "images")) == []


async def test_endless_request(path: Path) -> None:
    async with serving(path):
        await trio.to_thread.run_sync(raw, path, b"x" * (control.MAX_REQUEST * 4))
        assert await trio.to_thread.run_sync(lambda: call(path, "images")) == []


async def test_silent_client_is_dropped(path: Path, autojump_clock: trio.abc.Clock) -> None:
    async with serving(path):
        stream = await trio.open_unix_socket(path)
        with trio.fail_after(control.REQUEST_TIMEOUT + 1):
            answer = json.loads(await stream.receive_some(1000))
        assert answer["error"]["error"] == "UsageError"


@given(st.binary(max_size=200))
def test_parse_never_raises_anything_else(line: bytes) -> None:
    with suppress(UsageError):
        control.parse_request(line)


async def test_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert Daemon.connect(path) is None
    async with serving(path):
        assert await trio.to_thread.run_sync(lambda: call(path, "images")) == []


async def test_path_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120) / "control.sock"
    with pytest.raises(ConfigError, match="too long"):
        await control.serve(long, SmallNode())
    assert Daemon.connect(long) is None


def test_home_lock(tmp_path: Path) -> None:
    root = tmp_path / "home"
    with lock(root) as home:
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        with pytest.raises(HomeLocked, match=f"process {os.getpid()}"), lock(root):
            raise AssertionError
        assert home.store.parent == root
    with lock(root):
        pass


def test_home_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="not a directory"), lock(root):
            raise AssertionError

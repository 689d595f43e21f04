"""A node in a process of its own: started, asked and ended through the command line, as a user would.

with Daemon(Home(tmp / "a", listen=("/ip4/127.0.0.1/tcp/0",))) as node:
    result = node.run("provide", "/srv/web.img")
    print(result.json["link"])
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPOSITORY = Path(__file__).resolve().parents[2]
NODE = (sys.executable, "-m", "p2pnode")
FAULTY = (sys.executable, str(REPOSITORY / "scripts" / "faulty.py"))
LOOPBACK = "/ip4/127.0.0.1/tcp/0"

START_SECONDS = 30.0  # importing libp2p takes 1.6 s of CPU, and ten nodes may start at once on two cores
STOP_SECONDS = 10.0
COMMAND_SECONDS = 600.0
_PR_SET_PDEATHSIG = 1


class SwarmError(Exception):
    """A node did not do what it must; one sentence."""


@dataclass(frozen=True, slots=True)
class Home:
    """A node's home directory and the settings written into its config.toml."""

    path: Path
    listen: Sequence[str] = (LOOPBACK,)
    bootstrap: Sequence[str] = ()
    mdns: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        settings = {"listen": list(self.listen), "bootstrap": list(self.bootstrap), "mdns": self.mdns, **self.extra}
        # For strings, numbers, booleans and lists of them JSON and TOML are spelled alike.
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        (self.path / "config.toml").write_text("".join(lines))


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ended. `seconds` is its wall time."""

    args: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json(self) -> dict[str, Any]:
        """The last JSON object on stdout."""
        lines = [line for line in self.stdout.splitlines() if line.strip()]
        if not lines:
            raise SwarmError(f"{' '.join(self.args)} printed no result (exit code {self.code}): {self.stderr.strip()}")
        result = json.loads(lines[-1])
        assert isinstance(result, dict)
        return result

    def check(self) -> Self:
        """Itself if it ended well, else SwarmError."""
        if self.code:
            said = self.stderr.strip().splitlines() or self.stdout.strip().splitlines() or ["nothing said"]
            raise SwarmError(f"{' '.join(self.args)} ended with exit code {self.code}: {said[-1]}")
        return self


class Command:
    """A command of ours that is running: its output goes to files, so that nobody has to read it meanwhile."""

    def __init__(self, args: Sequence[str], log: Path, *, prefix: Sequence[str] = (), cwd: Path | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.args = tuple(args)
        self._stdout, self._stderr = log.with_suffix(".out"), log.with_suffix(".err")
        self._began = time.monotonic()
        self._ended: float | None = None
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(),
                cwd=cwd,
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle, once
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None and self._ended is None:
            self._ended = time.monotonic()
        return code

    def finished(self) -> Finished:
        """The outcome of a command that has ended."""
        code = self.poll()
        assert code is not None and self._ended is not None
        return Finished(self.args, code, self.stdout, self.stderr, self._ended - self._began)

    def wait(self, timeout: float = COMMAND_SECONDS) -> Finished:
        """Wait for the end; a command that takes longer is killed. Raises SwarmError."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SwarmError(
                f"{' '.join(self.args)} did not end within {timeout:.0f} s: {self.stderr[-2000:]}"
            ) from None
        return self.finished()

    def signal(self, number: int) -> None:
        if self.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.poll()

    def stop(self, timeout: float = STOP_SECONDS) -> float:
        """Ask it to end (SIGTERM), kill it when it does not; returns the seconds it took."""
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        self.poll()
        return time.monotonic() - began


class Daemon:
    """`p2pnode run` on a home. As a context manager it is up inside and ended after."""

    def __init__(
        self, home: Home, *, program: Sequence[str] = NODE, prefix: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        """`program`: the command line of the node (FAULTY with its options, say); `prefix` stands before it, and
        `options` are those of `run`.
        """
        self.home = home
        self._options = tuple(options)
        self._program = tuple(program)
        self._prefix = tuple(prefix)
        self._runs = 0
        self.command: Command | None = None
        self.peer_id = ""
        self.addrs: list[str] = []

    def start(self) -> None:
        """Start the process; `ready` waits for it."""
        self.home.write()
        self._runs += 1
        log = self.home.path.with_name(f"{self.home.path.name}-daemon-{self._runs}")
        args = [*self._program, "--home", str(self.home.path), "--json", "run", *self._options]
        self.command = Command(args, log, prefix=self._prefix)

    def ready(self, timeout: float = START_SECONDS) -> None:
        """Wait until it listens. Raises SwarmError."""
        assert self.command is not None
        deadline = time.monotonic() + timeout
        while True:
            line, newline, _ = self.command.stdout.partition("\n")
            if newline:
                said = json.loads(line)
                if "error" in said:
                    raise SwarmError(f"a daemon did not start: {said['message']}")
                self.peer_id, self.addrs = said["peer_id"], said["addrs"]
                return
            if self.command.poll() is not None:
                self.command.finished().check()
                raise SwarmError(f"the daemon on {self.home.path} ended before it listened")
            if time.monotonic() > deadline:
                raise SwarmError(f"the daemon on {self.home.path} did not listen within {timeout:.0f} s")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        assert self.command is not None
        return self.command.pid

    @property
    def running(self) -> bool:
        return self.command is not None and self.command.poll() is None

    @property
    def log(self) -> str:
        return self.command.stderr if self.command is not None else ""

    def begin(self, *args: str, json_output: bool = True) -> Command:
        """Start a command on this home, which the daemon will carry out."""
        self._runs += 1
        log = self.home.path.with_name(f"{self.home.path.name}-{args[0]}-{self._runs}")
        return Command([*NODE, "--home", str(self.home.path), *(["--json"] if json_output else []), *args], log)

    def run(self, *args: str, timeout: float = COMMAND_SECONDS) -> Finished:
        """Run a command on this home to its end, whatever its exit code."""
        return self.begin(*args).wait(timeout)

    def usage(self) -> Usage:
        """What the process has used so far."""
        return Usage.of(self.pid)

    def kill(self) -> None:
        if self.command is not None:
            self.command.kill()

    def stop(self) -> float:
        return self.command.stop() if self.command is not None else 0.0

    def __enter__(self) -> Self:
        try:
            self.start()
            self.ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds (user and system) and peak resident memory in bytes of a process."""

    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Read from /proc; zeros for a process that is gone."""
        cpu, peak = 0.0, 0
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak = int(line.split()[1]) << 10
        return cls(cpu, peak)


def run(*args: str, log: Path, timeout: float = COMMAND_SECONDS) -> Finished:
    """Run `p2pnode ARGS` to its end, whatever its exit code. `log`: path of its output files, less the suffix."""
    return Command([*NODE, *args], log).wait(timeout)


def environment() -> dict[str, str]:
    """Ours, with the checkout importable and no settings of the user's own node."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("P2PNODE_", "NIX_IMAGE_"))}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Runs in the child: the kernel kills it when we die, however we die, so that no node is ever left behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

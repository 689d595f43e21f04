"""Real nodes in processes of their own, on loopback, with homes below tmp_path; all ended by pid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from swarmlib import namespaces
from swarmlib.process import FAULTY, NODE, Command, Daemon, Home


class Nodes:
    """Makes homes, daemons and commands; ends them all."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._commands = 0

    def home(self, name: str, **settings: Any) -> Home:
        """A home with its configuration; nothing runs on it."""
        home = Home(self.directory / name, **settings)
        home.write()
        return home

    def daemon(self, name: str, *, via: Daemon | None = None, faults: Sequence[str] = (), **settings: Any) -> Daemon:
        """A running daemon that knows nothing but the first address of `via`."""
        if via is not None:
            settings["bootstrap"] = via.addrs[:1]
        program = (*FAULTY, *faults, "--") if faults else NODE
        return self._stack.enter_context(Daemon(Home(self.directory / name, **settings), program=program))

    def begin(self, *args: str | Path, home: Home | None = None, prefix: Sequence[str] = ()) -> Command:
        """Start `p2pnode --json ARGS` on a home, with no daemon in between unless one runs there."""
        self._commands += 1
        where = [] if home is None else ["--home", str(home.path)]
        log = self.directory / "log" / f"{self._commands}"
        command = Command([*NODE, *where, "--json", *map(str, args)], log, prefix=prefix)
        self._stack.callback(command.kill)
        return command


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(tmp_path, stack)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes small file systems of their own: `tmpfs("64M")`. Skips where that needs a right we lack."""
    mounted: list[Path] = []

    def mount(size: str, name: str = "disk") -> Path:
        if os.geteuid() != 0:
            pytest.skip("needs root to mount a tmpfs")
        path = tmp_path / name
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(scope="session")
def network_namespaces() -> None:
    reason = namespaces.available()
    if reason is not None:
        pytest.skip(f"network namespaces: {reason}")


@pytest.fixture(scope="session")
def nix_store_command() -> str:
    found = shutil.which("nix-store")
    if found is None:
        pytest.skip("needs nix-store (Debian package nix-bin)")
    return found

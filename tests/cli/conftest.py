"""Real processes of `python -m p2pnode`, each with a home of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


class CLI:
    """Runs commands on one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running: list[subprocess.Popen[str]] = []
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("P2PNODE_", "NIX_IMAGE_"))}
        self.environ = inherited | {"P2PNODE_HOME": str(home), "P2PNODE_MDNS": "0", "PYTHONPATH": str(ROOT)}

    def command(self, *args: object) -> list[str]:
        return [sys.executable, "-m", "p2pnode", *map(str, args)]

    def __call__(self, *args: object, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            env=self.environ | environ,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def json(self, *args: object) -> Any:
        """The only JSON object a command printed."""
        done = self("--json", *args)
        lines = done.stdout.splitlines()
        assert len(lines) == 1, done
        return json.loads(lines[0])

    def start(self, *args: object, preexec_fn: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.command(*args),
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            preexec_fn=preexec_fn,
        )
        self.running.append(process)
        return process

    def started(self, *args: object) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A process that goes on running, and the first JSON object it printed."""
        process = self.start("--json", *args)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        return process, json.loads(line)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CLI]:
    made = CLI(tmp_path / "home")
    yield made
    for process in made.running:
        process.kill()
        process.communicate()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(n.to_bytes(4, "big") for n in range(500_000)))
    return path

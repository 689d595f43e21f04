"""Real Nix stores for tests: chroot stores below a temporary directory, so the machine's own is left alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from p2pnode.nix.cli import PathInfo
from p2pnode.nix.hashes import parse_sha256
from p2pnode.nix.nar_reader import Buffer
from p2pnode.nix.narmap import dump
from p2pnode.nix.signatures import Signature, SignedInfo
from p2pnode.nix.storepath import StorePath

NIX = ["nix", "--extra-experimental-features", "nix-command"]

Contents = bytes | Mapping[str, bytes | str]
"""Of a store path: a file, or a directory of files and (text) symbolic links by their path; executable below bin/."""


class ChrootStore:
    """A store in `base/root`. Its configuration and its client's caches lie in `base` too.

    `settings`: lines of its nix.conf.
    """

    def __init__(self, base: Path, *settings: str) -> None:
        base.mkdir(exist_ok=True)
        self.base = base
        self.root = base / "root"
        # Nothing is built here; but as root Nix wants its builders' group, which Debian has in a package of its own.
        (base / "nix.conf").write_text("".join(f"{line}\n" for line in ("build-users-group =", *settings)))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("NIX_", "XDG_"))}
        self.environ = inherited | {"HOME": str(base), "NIX_CONF_DIR": str(base), "NIX_USER_CONF_FILES": ""}

    def nix_store(self, *arguments: object) -> str:
        return self.run("nix-store", "--store", str(self.root), *map(str, arguments))

    def nix(self, *arguments: object) -> str:
        return self.run(*NIX, *map(str, arguments), "--store", str(self.root))

    def copy_to(self, url: str, *paths: object) -> str:
        return self.run(*NIX, "copy", "--from", str(self.root), "--to", url, *map(str, paths))

    def copy_from(self, url: str, *paths: object) -> str:
        return self.run(*NIX, "copy", "--from", url, "--to", str(self.root), *map(str, paths))

    def run(self, *command: str) -> str:
        return self.run_bytes(*command).decode()

    def run_bytes(self, *command: str) -> bytes:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=self.environ)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def add(self, tree: Path) -> StorePath:
        """Add a tree as a content-addressed path (without references)."""
        return StorePath.parse(self.nix_store("--add", tree).strip())

    def register(self, trees: Iterable[tuple[StorePath, Contents, Iterable[StorePath]]]) -> None:
        """Make paths valid as if they had been built here: each with these contents and references."""
        lines: list[str] = []
        for path, contents, references in trees:
            real = self.real(path)
            real.parent.mkdir(parents=True, exist_ok=True)
            _build(real, contents)
            nar = b"".join(dump(real))
            referred = sorted(map(str, references))
            lines += [str(path), hashlib.sha256(nar).hexdigest(), str(len(nar)), "", str(len(referred)), *referred]
        command = ["nix-store", "--store", str(self.root), "--load-db"]
        text = "".join(line + "\n" for line in lines)
        subprocess.run(command, input=text, text=True, check=True, env=self.environ, capture_output=True)

    def info(self, *paths: StorePath) -> list[SignedInfo]:
        """What the store says of `paths`, in their order."""
        found = {each.info.path: each for each in signed_infos(json.loads(self.nix("path-info", "--json", *paths)))}
        return [found[path] for path in paths]

    def valid(self) -> set[StorePath]:
        """All valid paths."""
        return {StorePath.parse(each["path"]) for each in json.loads(self.nix("path-info", "--json", "--all"))}

    def real(self, path: StorePath) -> Path:
        return self.root / str(path).lstrip("/")

    async def open_nar(self, info: PathInfo) -> AsyncGenerator[Buffer, None]:
        """An `OpenNar` of what is in this store."""
        for piece in dump(self.real(info.path)):
            yield piece


def _build(real: Path, contents: Contents) -> None:
    """Write the tree of a store path, as canonical as Nix makes it."""
    if isinstance(contents, bytes):
        _write(real, contents, 0o444)
        return
    real.mkdir()
    for name, data in contents.items():
        file = real / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, str):
            file.symlink_to(data)
        else:
            _write(file, data, 0o555 if name.startswith("bin/") else 0o444)
    for directory in sorted({real, *(each for each in real.rglob("*") if each.is_dir() and not each.is_symlink())}):
        directory.chmod(0o555)
        os.utime(directory, (1, 1))


def _write(file: Path, data: bytes, mode: int) -> None:
    file.write_bytes(data)
    file.chmod(mode)
    os.utime(file, (1, 1))


def signed_infos(said: Iterable[dict[str, Any]]) -> list[SignedInfo]:
    """The entries of `nix path-info --json` of Nix 2.8."""
    return [
        SignedInfo(info_of_json(each), tuple(sorted(map(Signature.parse, each.get("signatures", []))))) for each in said
    ]


def info_of_json(said: dict[str, Any]) -> PathInfo:
    deriver = said.get("deriver")
    return PathInfo(
        StorePath.parse(said["path"]),
        parse_sha256(said["narHash"]),
        said["narSize"],
        tuple(sorted(map(StorePath.parse, said["references"]))),
        StorePath.parse(deriver) if deriver else None,
        said.get("ca"),
    )


class NixDaemon:
    """A real nix-daemon that serves a chroot store on a socket of its own, for as long as the block lasts."""

    def __init__(self, store: ChrootStore) -> None:
        self.store = store
        self.socket = store.base / "socket"
        self._process: subprocess.Popen[bytes] | None = None
        store.nix_store("--init")  # two connections that both make the database get in each other's way

    def __enter__(self) -> Self:
        environ = self.store.environ | {"NIX_DAEMON_SOCKET_PATH": str(self.socket)}
        with (self.store.base / "daemon.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["nix-daemon", "--store", str(self.store.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
            )
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self._process.poll() is None, (self.store.base / "daemon.log").read_text()
            assert time.monotonic() < deadline, "nix-daemon does not listen"
            time.sleep(0.02)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        processes = psutil.Process(self._process.pid).children(recursive=True)  # one per connection, each a session
        self._process.kill()
        self._process.wait()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

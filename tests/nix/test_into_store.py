"""Imports into real stores: by a daemon that listens, and by one of our own."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from p2pnode.errors import DaemonUnavailable, NixError, OutputExists, OutputUnwritable, Untrusted
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.into_store import may_write, open_session
from p2pnode.nix.storepath import StorePath
from tests.nix.caches import TRUSTED, closure
from tests.nix.imports import add, into_store
from tests.nix.stores import ChrootStore, NixDaemon

CLOSURE = closure()
NARS = {signed.info.path: data for signed, data in CLOSURE}
SIGNED = [signed for signed, _ in CLOSURE]
TWO = next(path for path in NARS if path.name == "two")

pytestmark = pytest.mark.nix


class Source:
    """Gives NARs, and remembers of which paths."""

    def __init__(self) -> None:
        self.opened: list[StorePath] = []

    async def __call__(self, info: PathInfo) -> AsyncGenerator[bytes, None]:
        self.opened.append(info.path)
        yield NARS[info.path]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[NixDaemon]:
    with NixDaemon(ChrootStore(tmp_path / "n", f"trusted-public-keys = {TRUSTED}")) as running:
        yield running


async def test_in_topological_order_and_nothing_twice(daemon):
    shuffled = SIGNED.copy()
    random.Random(1).shuffle(shuffled)
    source = Source()
    some = [each for each in shuffled if each.info.path.name in ("liba", "fod")]
    first = await into_store(some, source, socket=daemon.socket)
    assert set(first) == {each.info.path for each in some}
    rest = await into_store(shuffled, source, socket=daemon.socket)
    assert set(rest) == set(NARS) - set(first)
    assert sorted(source.opened) == sorted(NARS)  # each of them once
    assert daemon.store.info(*(each.info.path for each in SIGNED)) == SIGNED
    daemon.store.nix("store", "verify", "--all", "--sigs-needed", "1")
    assert await into_store(SIGNED, source, socket=daemon.socket) == []
    assert len(source.opened) == len(SIGNED)


async def test_the_root_is_there_before_the_first_path(daemon, tmp_path):
    link = tmp_path / "result"
    auto = daemon.store.root / "nix/var/nix/gcroots/auto"
    seen = []

    async def source(info: PathInfo) -> AsyncGenerator[bytes, None]:
        seen.append([os.readlink(each) for each in auto.iterdir()])
        daemon.store.nix_store("--gc")  # in the middle of everything
        yield NARS[info.path]

    await into_store(SIGNED, source, top=TWO, add_root=link, socket=daemon.socket)
    assert os.readlink(link) == str(TWO)
    assert seen == [[str(link)]] * len(SIGNED)
    kept = {each.info.path for each in SIGNED if each.info.path.name in ("two", "appb", "liba")}
    daemon.store.nix_store("--gc")
    assert daemon.store.valid() >= kept
    link.unlink()
    daemon.store.nix_store("--gc")
    assert not kept & daemon.store.valid()


async def test_a_root_that_fails_is_what_it_was(daemon, tmp_path):
    link = tmp_path / "result"
    unsigned = [dataclasses.replace(each, signatures=()) for each in SIGNED]
    for before in (None, "/nix/store/" + "0" * 32 + "-old"):
        if before is not None:
            link.symlink_to(before)
        with pytest.raises(Untrusted):
            await into_store(unsigned, Source(), top=TWO, add_root=link, socket=daemon.socket)
        assert (os.readlink(link) if before is not None else None) == before
        assert link.is_symlink() == (before is not None)
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


async def test_a_root_replaces_another_but_nothing_else(daemon, tmp_path):
    link = tmp_path / "result"
    link.symlink_to("/nix/store/" + "0" * 32 + "-old")
    await into_store(SIGNED, Source(), top=TWO, add_root=link, socket=daemon.socket)
    assert os.readlink(link) == str(TWO)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").symlink_to("/etc")
    for name in ("file", "elsewhere", "."):
        with pytest.raises(OutputExists):
            await into_store(SIGNED, Source(), top=TWO, add_root=tmp_path / name, socket=daemon.socket)
    with pytest.raises(OutputUnwritable):
        await into_store(SIGNED, Source(), top=TWO, add_root=tmp_path / "none/link", socket=daemon.socket)
    assert (tmp_path / "file").read_text() == "mine"


async def test_what_is_missing_is_kept_until_the_session_ends(daemon):
    names = [each.info.path for each in SIGNED]
    await into_store(SIGNED[:2], Source(), socket=daemon.socket)
    async with open_session(socket=daemon.socket) as session:
        missing = await session.missing([*names, *names])
        present = set(names) - set(missing)
        daemon.store.nix_store("--gc")
        assert missing == [path for path in names if path in missing]
        assert daemon.store.valid() == present != set()
        assert await add(session, SIGNED, Source()) == missing


async def test_without_a_daemon(tmp_path, monkeypatch):
    store = ChrootStore(tmp_path / "n", f"trusted-public-keys = {TRUSTED}")
    monkeypatch.setenv("NIX_CONF_DIR", str(store.base))
    link = tmp_path / "result"
    added = await into_store(SIGNED, Source(), top=TWO, add_root=link, store_root=store.root)
    assert set(added) == set(NARS) == store.valid()
    store.nix_store("--gc")
    assert TWO in store.valid()
    with pytest.raises(Untrusted):
        unsigned = dataclasses.replace(SIGNED[0], signatures=())
        await into_store([unsigned], Source(), store_root=tmp_path / "other")


async def test_trees_from_another_store(tmp_path, monkeypatch):
    """Store to store, contents read from the file system as they are needed."""
    here, there = ChrootStore(tmp_path / "a"), ChrootStore(tmp_path / "b")
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(50):
        (tree / f"f{number}").write_bytes(os.urandom(number * 1000))
    path = here.add(tree)
    monkeypatch.setenv("NIX_CONF_DIR", str(there.base))
    assert await into_store(here.info(path), here.open_nar, store_root=there.root) == [path]
    there.nix("store", "verify", "--all")
    assert there.info(path)[0].info == here.info(path)[0].info


async def test_the_usual_socket(daemon, monkeypatch):
    """As Nix finds it; and what the store says of its paths."""
    monkeypatch.setenv("NIX_DAEMON_SOCKET_PATH", str(daemon.socket))
    await into_store(SIGNED, Source())
    async with open_session() as session:
        assert await session.path_info(NARS) == SIGNED
        with pytest.raises(NixError, match="not a valid path"):
            await session.path_info([StorePath("0" * 32, "absent")])


async def test_no_daemon_at_a_given_socket(tmp_path):
    with pytest.raises(DaemonUnavailable):
        await into_store(SIGNED, Source(), socket=tmp_path / "none")


IMPORT_HERE = """
import trio
from pathlib import Path
from tests.nix.test_into_store import SIGNED, TWO, Source, into_store
added = trio.run(lambda: into_store(SIGNED, Source(), top=TWO, add_root=Path("/nix/var/nix/root-of-two")))
print(len(added))
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount namespace")
@pytest.mark.parametrize("state", ["a daemon listens", "no daemon", "just installed"])
def test_the_store_of_the_machine(tmp_path, state):
    """At its usual place, in a namespace of its own: by the daemon if one listens there, without one otherwise."""
    (tmp_path / "nix.conf").write_text(f"trusted-public-keys = {TRUSTED}\n")
    (tmp_path / "import.py").write_text(IMPORT_HERE)
    start = (
        'nix-daemon & daemon=$!; until [ -S "$socket" ]; do sleep 0.02; done'
        if state == "a daemon listens"
        else "daemon="
    )
    init = "" if state == "just installed" else "mkdir -p /nix/store /nix/var/nix; nix-store --init"
    script = f"""
        set -e
        mkdir -p /nix  # Debian's package has none, and nothing can be mounted on what is not there
        mount -t tmpfs none /nix
        socket=/nix/var/nix/daemon-socket/socket
        trap '[ -z "$daemon" ] || kill $daemon' EXIT
        {init}
        {start}
        {sys.executable} {tmp_path}/import.py
        nix-store --gc >&2
        nix --extra-experimental-features nix-command store verify --all --sigs-needed 1 >&2
        nix-store --query --requisites /nix/var/nix/root-of-two
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("NIX_")}
    environ |= {"NIX_CONF_DIR": str(tmp_path), "PYTHONPATH": os.getcwd(), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr
    count, *kept = done.stdout.split()
    assert int(count) == len(SIGNED)
    assert {StorePath.parse(path).name for path in kept} == {"two", "appb", "liba"}


def test_a_store_that_is_not_there_yet_can_be_made_by_whoever_may_write_above_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert may_write(tmp_path) and may_write(tmp_path / "nix" / "store")
    assert not may_write(tmp_path / "file" / "nix" / "store")
    if os.geteuid() != 0:
        assert not may_write(Path("/nix-of-nobody/store"))

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest

from p2pnode.errors import NixError, NixMissing, PathError
from p2pnode.nix import cli
from p2pnode.nix.cli import NixStore, PathInfo, find_nix_store, parse_dump_db, topological_order
from p2pnode.nix.narmap import dump
from p2pnode.nix.storepath import StorePath
from tests.nix.trees import File, Link, make

DUMP_DB = (Path(__file__).parent.parent / "vectors/narinfo/other/dump-db-liba-appb.txt").read_text()
LIBA = StorePath.parse("/nix/store/ycpj7vr6z82hk6qb0zdjcwdmf1z4sr4a-liba")
APPB = StorePath.parse("/nix/store/szx47aljd1j60hay02cciicyqnmgk5hn-appb")


def test_dump_db_text():
    liba, appb = parse_dump_db(DUMP_DB)
    assert liba.path == LIBA and liba.references == (LIBA,) and liba.nar_size == 528 and liba.ca is None
    assert appb.path == APPB and appb.references == (LIBA,)
    assert appb.nar_hash.hex() == "c7067f20ee27eb50808ba88697c51e65a3c433824ae94a865dae4fd60af20b56"
    assert appb.deriver == StorePath.parse("/nix/store/3gx6zynhkk16mdcc94xw9fj738qfnylw-appb.drv")
    assert parse_dump_db("") == []


def test_dump_db_text_cut_anywhere_is_refused():
    whole = DUMP_DB.index(str(APPB))
    for length in range(1, len(DUMP_DB)):
        if length != whole:
            with pytest.raises(NixError):
                parse_dump_db(DUMP_DB[:length])


@pytest.mark.parametrize(
    "old, new",
    [
        ("528", "-528"),
        ("528", "5e2"),
        ("528", "٥"),
        ("528", "9" * 30),
        ("4e93", "4e9g"),
        ("4e93", "4e"),
        ("-liba.drv", "/liba.drv"),
        ("\n1\n", "\n2\n"),
        ("\n1\n", "\n0\n"),
        ("\n528", "\n\n528"),
    ],
)
def test_dump_db_text_altered(old, new):
    with pytest.raises(NixError):
        parse_dump_db(DUMP_DB.replace(old, new, 1))


def path_of(number: int) -> StorePath:
    return StorePath(f"{number:032d}", "p")


def info(number: int, *references: int) -> PathInfo:
    return PathInfo(path_of(number), bytes(32), 96, tuple(map(path_of, references)), None, None)


def test_topological_order():
    infos = [info(1, 3, 1), info(2), info(3, 2, 9), info(0, 1)]
    assert [i.path for i in topological_order(infos)] == [path_of(n) for n in (2, 3, 1, 0)]
    assert topological_order(infos) == topological_order(reversed(infos))
    assert topological_order([]) == []
    chain = [info(n, n + 1) for n in range(5000)]  # longer than Python can recurse
    assert [i.path for i in topological_order(chain)] == [path_of(n) for n in range(4999, -1, -1)]


def test_a_cycle_is_refused():
    with pytest.raises(NixError, match="refers to itself"):
        topological_order([info(1, 2), info(2, 3), info(3, 1)])


def test_nix_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cli, "_FALLBACK_DIRECTORIES", (str(tmp_path),))
    for attempt in (find_nix_store, NixStore):
        with pytest.raises(NixMissing, match="no nix-store command was found"):
            attempt()


def write_nix_store(directory: Path, script: str) -> None:
    """A program of that name which misbehaves as the real one cannot be made to."""
    directory.joinpath("nix-store").write_text("#!/bin/sh\n" + script)
    directory.joinpath("nix-store").chmod(0o755)


@pytest.mark.parametrize(
    "script, message",
    [
        ("exec sleep 60", "no answer within 0.5 s"),
        ("echo 'warning: old' >&2; echo 'error: the sky fell' >&2; echo more >&2; exit 1", "nix-store: the sky fell"),
        ("exit 3", "failed with status 3"),
        ("kill -9 $$", "status -9"),
        ("printf '\\377'", "not ASCII"),
        ("echo a; echo b", "2 lines"),
        ("echo hello", "'hello' is not a hash"),
    ],
)
def test_a_command_that_fails(monkeypatch, tmp_path, script, message):
    write_nix_store(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NixError, match=message):
        NixStore(timeout=0.5 if "sleep" in script else 60).nar_hash(LIBA)


@pytest.mark.parametrize("path", ["--version", "/etc/passwd", "/nix/store", f"{LIBA}/bin"])
def test_only_store_paths_reach_the_command(monkeypatch, tmp_path, path):
    write_nix_store(tmp_path, "touch called")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    store = NixStore()
    for call in (store.requisites, store.references, store.nar_hash, store.real_path, lambda p: store.path_info([p])):
        with pytest.raises(NixError):
            call(path)
    assert os.listdir(tmp_path) == ["nix-store"]


def test_real_path_without_a_root(monkeypatch, tmp_path):
    write_nix_store(tmp_path, "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert NixStore().real_path(LIBA) == Path(str(LIBA))


@pytest.fixture(scope="module")
def chroot_store(tmp_path_factory):
    """A store with added paths (content-addressed), and with registered ones that refer to each other."""
    base = tmp_path_factory.mktemp("nix")
    root = base / "root"

    def nix(*arguments, **options) -> str:
        command = ["nix-store", "--store", root, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout.strip()

    make({b"y": File(b"x\n")}, base / "d")
    make(File(b"hello\n"), base / "f")
    make(File(b"hello\n", executable=True), base / "x")
    added = {"d": nix("--add", base / "d"), "x": nix("--add", base / "x")}
    added["source"] = nix("--add", base / "f")
    added["flat"] = nix("--add-fixed", "sha256", base / "f")
    added["sha1"] = nix("--add-fixed", "--recursive", "sha1", base / "d")
    trees = {LIBA: {b"lib": File(bytes(LIBA.base_name, "ascii"))}, APPB: {b"liba": Link(bytes(str(LIBA), "ascii"))}}
    text = ""
    for path, references in ((LIBA, [LIBA]), (APPB, [LIBA])):
        real = root / "nix/store" / path.base_name
        make(trees[path], real)
        nar = b"".join(dump(real))
        lines = [path, hashlib.sha256(nar).hexdigest(), len(nar), "", len(references), *references]
        text += "".join(f"{line}\n" for line in lines)
    nix("--load-db", input=text)
    return root, {name: StorePath.parse(path) for name, path in added.items()}


@pytest.mark.nix
def test_a_real_closure(chroot_store):
    root, _ = chroot_store
    store = NixStore(root)
    assert store.requisites(APPB) == [LIBA, APPB]
    assert store.references(str(APPB)) == [LIBA]
    assert store.references(LIBA) == [LIBA]
    assert store.deriver(APPB) is None
    descriptors = len(os.listdir("/proc/self/fd"))
    infos = store.path_info([APPB, LIBA, APPB])
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert [i.path for i in infos] == [APPB, LIBA, APPB]
    assert [i.path for i in topological_order(infos)] == [LIBA, APPB]
    for i in infos:
        nar = b"".join(dump(store.real_path(i.path)))
        assert (i.nar_hash, i.nar_size) == (hashlib.sha256(nar).digest(), len(nar))
        assert (store.nar_hash(i.path), store.nar_size(i.path)) == (i.nar_hash, i.nar_size)
        assert i.ca is None and i.deriver is None


@pytest.mark.nix
def test_content_addresses_are_proved(chroot_store):
    root, added = chroot_store
    store = NixStore(root)
    found = dict(zip(added, store.path_info(added.values()), strict=True))
    for name in ("d", "source", "x"):
        assert found[name].ca == "fixed:r:" + _base32(found[name].nar_hash)
    assert found["flat"].ca == "fixed:" + _base32(hashlib.sha256(b"hello\n").digest())
    assert found["sha1"].ca is None


def _base32(digest: bytes) -> str:
    command = ["nix-hash", "--to-base32", "--type", "sha256", digest.hex()]
    return "sha256:" + subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.nix
def test_an_unknown_path_is_named(chroot_store):
    root, _ = chroot_store
    store = NixStore(root)
    for call in (store.requisites, store.nar_hash, store.deriver, lambda p: store.path_info([APPB, p])):
        with pytest.raises(NixError, match=str(path_of(7))):
            call(path_of(7))


@pytest.mark.nix
def test_a_root_that_holds_no_store_is_not_made_into_one(tmp_path):
    with pytest.raises(PathError, match="is not a Nix store"):
        NixStore(tmp_path)
    assert os.listdir(tmp_path) == []
    assert stat.S_ISDIR(tmp_path.stat().st_mode)

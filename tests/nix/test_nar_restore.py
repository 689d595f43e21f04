from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import DiskFull, NarError, NodeError, OutputExists, OutputUnwritable, PathError
from p2pnode.nix.nar_restore import NarRestorer, remove_tree
from p2pnode.nix.narmap import NarMap, NarTree, dump
from tests.nix.trees import File, Link, naive_nar, nasty_tree, snapshot, trees, unprivileged, vector_bytes, vectors


def restore(nar: bytes, path, **options) -> None:
    with NarRestorer(path, **options) as restorer:
        restorer.feed(nar)
        restorer.finish()


@settings(max_examples=60, deadline=None)
@given(trees, st.booleans(), st.data())
def test_restored_tree_has_the_same_nar(tree, store_modes, data):
    nar = naive_nar(tree)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(nar)), max_size=6)))
    with tempfile.TemporaryDirectory() as base:
        path = os.path.join(base, "out")
        with NarRestorer(path, store_modes=store_modes) as restorer:
            for a, b in zip([0, *cuts], [*cuts, len(nar)], strict=True):
                restorer.feed(nar[a:b])
            restorer.finish()
        assert restorer.size == len(nar)
        assert snapshot(path) == tree
        assert b"".join(dump(path)) == nar
        narmap = NarMap.build(path)
        with NarTree(path) as root:
            assert narmap.read(root, 0, narmap.size) == nar
        remove_tree(path)
        assert os.listdir(base) == []


@pytest.mark.parametrize("vector", vectors("accept"))
def test_accepted_vectors_round_trip(tmp_path, vector):
    nar = vector_bytes(vector)
    restore(nar, tmp_path / "out")
    assert b"".join(dump(tmp_path / "out")) == nar


@pytest.mark.parametrize("vector", vectors("reject"))
def test_rejected_vectors_leave_nothing(tmp_path, vector):
    (tmp_path / "work").mkdir()
    with pytest.raises(NarError):
        restore(vector_bytes(vector), tmp_path / "work" / "out")
    assert os.listdir(tmp_path) == ["work"]
    assert os.listdir(tmp_path / "work") == []


@contextlib.contextmanager
def umask(value: int):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_modes(tmp_path):
    nar = naive_nar({b"d": {}, b"f": File(b""), b"x": File(b"", executable=True)})
    for mask in (0o022, 0o077):
        with umask(mask):
            restore(nar, tmp_path / f"m{mask:o}")
        for name, mode in ((".", 0o777), ("d", 0o777), ("f", 0o666), ("x", 0o777)):
            assert stat.S_IMODE((tmp_path / f"m{mask:o}" / name).stat().st_mode) == mode & ~mask


def test_store_modes(open_dir):
    tree = {b"d": {b"f": File(b"abc")}, b"x": File(b"", executable=True), b"l": Link(b"nowhere")}
    with umask(0o077):
        restore(naive_nar(tree), open_dir / "out", store_modes=True)
    for name, mode in ((".", 0o555), ("d", 0o555), ("d/f", 0o444), ("x", 0o555), ("l", None)):
        status = (open_dir / "out" / name).lstat()
        assert status.st_mtime_ns == 10**9
        if mode is not None:
            assert stat.S_IMODE(status.st_mode) == mode
    with unprivileged(owned=open_dir):
        remove_tree(open_dir / "out")
    assert os.listdir(open_dir) == []


@pytest.mark.parametrize("existing", ["file", "directory", "symlink", "dangling"])
@pytest.mark.parametrize("tree", [{b"a": File(b"1")}, File(b"1"), Link(b"x")], ids=["directory", "file", "symlink"])
def test_an_existing_output_is_not_touched(tmp_path, existing, tree):
    out = tmp_path / "out"
    if existing == "file":
        out.write_bytes(b"mine")
    elif existing == "directory":
        out.mkdir()
    else:
        out.symlink_to(tmp_path if existing == "symlink" else "nowhere")
    before = snapshot(tmp_path) if existing != "symlink" else sorted(os.listdir(tmp_path))
    with pytest.raises(OutputExists):
        restore(naive_nar(tree), out)
    # The same when it appears only after the restorer was made.
    other = tmp_path / "late"
    with pytest.raises(OutputExists), NarRestorer(other) as restorer:
        other.write_bytes(b"mine")
        restorer.feed(naive_nar(tree))
    assert other.read_bytes() == b"mine"
    other.unlink()
    assert (snapshot(tmp_path) if existing != "symlink" else sorted(os.listdir(tmp_path))) == before


def test_missing_parent(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "no" / "out", tmp_path / "file" / "out"):
        with pytest.raises(PathError):
            NarRestorer(path)
    with pytest.raises(OutputExists):
        NarRestorer("/")


def test_nothing_is_made_before_the_first_node(tmp_path):
    with NarRestorer(tmp_path / "out") as restorer:
        restorer.feed(naive_nar({})[:40])
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("store_modes", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_abort_removes_everything(tmp_path, store_modes, share):
    nar = naive_nar(nasty_tree())
    before = len(os.listdir("/proc/self/fd"))
    restorer = NarRestorer(tmp_path / "out", store_modes=store_modes)
    restorer.feed(nar[: int(len(nar) * share)])
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(NarError):
        restorer.finish()
    restorer.abort()
    restorer.abort()
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_abort_leaves_what_someone_else_put_there(tmp_path):
    restorer = NarRestorer(tmp_path / "out")
    restorer.feed(naive_nar({b"a": File(b"1")})[:-16])
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "out").mkdir()
    restorer.abort()
    assert sorted(os.listdir(tmp_path)) == ["moved", "out"]


def test_abort_after_finish_keeps_the_tree(tmp_path):
    restore(naive_nar({b"a": File(b"1")}), tmp_path / "out")
    assert snapshot(tmp_path / "out") == {b"a": File(b"1")}


def test_links_in_an_archive_lead_nowhere(tmp_path):
    """A symlink followed by entries that would go through it, in every order that the format could express."""
    (tmp_path / "target").mkdir()
    outside = os.fsencode(tmp_path / "target")
    nar = naive_nar({b"a": Link(outside), b"b": {b"f": File(b"x")}})
    evil = nar.replace(b"\x01\0\0\0\0\0\0\0b\0\0\0\0\0\0\0", b"\x01\0\0\0\0\0\0\0a\0\0\0\0\0\0\0")
    assert evil != nar
    with pytest.raises(NarError):
        restore(evil, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["target"]
    assert os.listdir(tmp_path / "target") == []


def test_a_directory_swapped_for_a_symlink_while_restoring(tmp_path):
    (tmp_path / "target").mkdir()
    nar = naive_nar({b"d": {b"f": File(b"x" * 100)}})
    at = nar.index(b"name", nar.index(b"directory", nar.index(b"directory") + 1))
    with NarRestorer(tmp_path / "out") as restorer:
        restorer.feed(nar[:at])
        (tmp_path / "out" / "d").rename(tmp_path / "moved")
        (tmp_path / "out" / "d").symlink_to(tmp_path / "target")
        restorer.feed(nar[at:])
        restorer.finish()
    assert os.listdir(tmp_path / "target") == []
    assert os.listdir(tmp_path / "moved") == ["f"]


def test_a_name_taken_by_someone_else_meanwhile(tmp_path):
    nar = naive_nar({b"a": File(b"x"), b"b": File(b"y")})
    at = nar.index(b"entry", nar.index(b"entry") + 1)
    (tmp_path / "victim").write_bytes(b"precious")
    with pytest.raises(OutputUnwritable), NarRestorer(tmp_path / "out") as restorer:
        restorer.feed(nar[:at])
        (tmp_path / "out" / "b").symlink_to(tmp_path / "victim")
        restorer.feed(nar[at:])
    assert os.listdir(tmp_path) == ["victim"]
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_no_permission(open_dir):
    if os.geteuid() != 0:
        open_dir.chmod(0o555)
    try:
        with unprivileged(), pytest.raises(OutputUnwritable, match="out could not be written: Permission denied"):
            restore(naive_nar({}), open_dir / "out")
    finally:
        open_dir.chmod(0o755)
    assert os.listdir(open_dir) == []


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.root
def test_full_disk(small_disk):
    tree = {b"a": File(bytes(100_000)), b"b": File(bytes(300_000))}
    with pytest.raises(DiskFull, match="out/b"):
        restore(naive_nar(tree), small_disk / "out")
    assert os.listdir(small_disk) == []
    restore(naive_nar({b"a": File(bytes(100_000))}), small_disk / "out")


@pytest.mark.root
def test_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for tree in ({}, File(b"x"), Link(b"x")):
        with pytest.raises(OutputUnwritable, match="Read-only file system"):
            restore(naive_nar(tree), small_disk / "out")


def test_remove_tree(open_dir):
    (open_dir / "keep").mkdir()
    (open_dir / "keep" / "f").touch()
    out = open_dir / "out"
    out.mkdir()
    (out / "link").symlink_to(open_dir / "keep")
    (out / "d").mkdir()
    (out / "d" / "f").touch()
    (out / "d").chmod(0o500)
    with unprivileged(owned=open_dir):
        remove_tree(out)
        remove_tree(out)  # nothing there is no error
        remove_tree(out / "neither" / "here")
    assert os.listdir(open_dir) == ["keep"]
    assert os.listdir(open_dir / "keep") == ["f"]
    (open_dir / "link").symlink_to("keep")
    remove_tree(open_dir / "link")
    remove_tree(open_dir / "keep" / "f")
    assert os.listdir(open_dir / "keep") == []


def test_errors_are_ours(tmp_path):
    """A name that the file system cannot take is told as an error a user can read."""
    long = tmp_path / ("x" * 300)
    with pytest.raises(NodeError):
        restore(naive_nar({}), long)

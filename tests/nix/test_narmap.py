from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import ChunkUnavailable, NarError, PathError
from p2pnode.nix.nar_restore import remove_tree
from p2pnode.nix.nar_walk import tree_fingerprint, tree_records
from p2pnode.nix.narmap import NarMap, NarTree, dump
from tests.nix.trees import File, Link, make, make_nasty, naive_nar, nasty_tree, snapshot, trees, unprivileged


def dumped(path) -> bytes:
    return b"".join(dump(path))


@settings(max_examples=60, deadline=None)
@given(trees, st.integers(1, 3000))
def test_dump_is_the_nar_of_the_tree(tree, piece_size):
    with tempfile.TemporaryDirectory() as base:
        path = os.path.join(base, "t")
        make(tree, path)
        pieces = list(dump(path, piece_size))
        assert b"".join(pieces) == naive_nar(tree)
        assert all(len(piece) == piece_size for piece in pieces[:-1])
        assert len({id(piece) for piece in pieces}) == len(pieces)


@settings(max_examples=60, deadline=None)
@given(trees, st.data())
def test_reads_are_slices_of_the_nar(tree, data):
    with tempfile.TemporaryDirectory() as base:
        path = os.path.join(base, "t")
        make(tree, path)
        nar = naive_nar(tree)
        built = NarMap.build(path)
        stored = NarMap.from_bytes(built.to_bytes())
        assert built.size == stored.size == len(nar)
        assert built.fingerprint == stored.fingerprint == tree_fingerprint(path)
        with NarTree(path, max_open=2) as root:
            for narmap in (built, stored):
                for _ in range(5):
                    offset = data.draw(st.integers(0, len(nar)))
                    length = data.draw(st.integers(0, len(nar) - offset))
                    assert narmap.read(root, offset, length) == nar[offset : offset + length]
                assert b"".join(narmap.pieces(root)) == nar


def test_nasty_tree(tmp_path):
    make(nasty_tree(), tmp_path / "t")
    nar = naive_nar(nasty_tree())
    assert dumped(tmp_path / "t") == dumped(os.fsencode(tmp_path / "t")) == dumped(str(tmp_path / "t")) == nar


def test_executable_is_the_owners_bit_alone(tmp_path):
    make_nasty(tmp_path / "t")
    nar = dumped(tmp_path / "t")
    assert nar == naive_nar(snapshot(tmp_path / "t"))
    for mode, executable in ((0o010, False), (0o001, False), (0o100, True), (0o700, True)):
        path = tmp_path / f"m{mode:o}"
        path.touch()
        path.chmod(mode | 0o400)
        assert dumped(path) == naive_nar(File(b"", executable))


def test_random_reads_from_many_threads(tmp_path):
    rng = random.Random(1)
    tree = {b"d%d" % d: {b"f%d" % f: File(rng.randbytes(rng.randrange(3000))) for f in range(20)} for d in range(40)}
    make(tree, tmp_path / "t")
    nar = naive_nar(tree)
    narmap = NarMap.build(tmp_path / "t")
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(100):
            offset = rng.randrange(len(nar) - 20_000)
            if narmap.read(root, offset, 20_000) != nar[offset : offset + 20_000]:
                wrong.append(offset)

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with NarTree(tmp_path / "t", max_open=3) as root:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        narmap.read(root, 0, len(nar))


def test_reading_outside_of_the_nar(tmp_path):
    make(File(b"abc"), tmp_path / "t")
    narmap = NarMap.build(tmp_path / "t")
    with NarTree(tmp_path / "t") as root:
        for offset, length in ((-1, 1), (0, -1), (0, narmap.size + 1), (narmap.size + 1, 0)):
            with pytest.raises(ValueError):
                narmap.read(root, offset, length)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("at_root", [True, False])
def test_special_files_are_refused(tmp_path, kind, at_root):
    path = tmp_path / "special" if at_root else tmp_path / "tree" / "special"
    path.parent.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        elif at_root:
            path = Path("/dev/null")
        else:
            try:
                os.mknod(path, 0o020600, os.makedev(1, 3))
            except PermissionError:
                pytest.skip("making a device needs root")
        with pytest.raises(PathError, match=f"{path} has an unsupported file type"):
            dumped(path if at_root else tmp_path / "tree")


def test_what_is_not_there(tmp_path):
    with pytest.raises(PathError, match="nothing does not exist"):
        NarMap.build(tmp_path / "nothing")
    for bad in ("", "a\0b"):
        with pytest.raises(PathError):
            NarMap.build(bad)


def test_unreadable_file_is_named(open_dir):
    make({b"d": {b"secret": File(b"x"), b"a": File(b"y")}}, open_dir / "t")
    (open_dir / "t/d/secret").chmod(0)
    with unprivileged(), pytest.raises(PathError, match="t/d/secret cannot be read: Permission denied"):
        dumped(open_dir / "t")


def test_unreadable_directory_is_named(open_dir):
    make({b"d": {b"closed": {b"f": File(b"x")}}}, open_dir / "t")
    (open_dir / "t/d/closed").chmod(0)
    try:
        with unprivileged(), pytest.raises(PathError, match="t/d/closed cannot be read: Permission denied"):
            dumped(open_dir / "t")
    finally:
        (open_dir / "t/d/closed").chmod(0o755)


def test_names_in_messages_cannot_command_a_terminal(tmp_path):
    make({}, tmp_path / "t")
    os.mkfifo(os.fsencode(tmp_path) + b"/t/a\x1b[2J\n\xff")
    with pytest.raises(PathError) as caught:
        NarMap.build(tmp_path / "t")
    assert str(caught.value).isprintable()


def test_the_depth_limit_is_that_of_nix(tmp_path):
    tree = File(b"x")
    for _ in range(63):
        tree = {b"d": tree}
    make(tree, tmp_path / "63")
    assert dumped(tmp_path / "63") == naive_nar(tree)
    make({b"d": tree}, tmp_path / "64")
    with pytest.raises(PathError, match="63 directories deep"):
        NarMap.build(tmp_path / "64")
    deep = tmp_path / "deep"  # far beyond Python's recursion limit
    fd = os.open(tmp_path, os.O_RDONLY)
    name = "deep"
    for _ in range(1500):
        os.mkdir(name, dir_fd=fd)
        child = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd, name = child, "d"
    os.close(fd)
    try:
        with pytest.raises(PathError, match="directories deep"):
            NarMap.build(deep)
    finally:  # pytest's own clean-up is recursive
        remove_tree(deep)
    assert not deep.exists()


CHANGES = {
    "shrunk": lambda f: os.truncate(f, 1_500_000),
    "grown": lambda f: os.truncate(f, 3_500_000),
    "rewritten": lambda f: (f.write_bytes(bytes(3_000_000)), os.utime(f, ns=(1, 1))),
    "vanished": lambda f: f.unlink(),
    "replaced": lambda f: (f.unlink(), f.write_bytes(bytes(3_000_000))),
    "symlink": lambda f: (f.rename(f.with_name("moved")), f.symlink_to("moved")),
    "fifo": lambda f: (f.unlink(), os.mkfifo(f)),
    "directory": lambda f: (f.unlink(), f.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at_root", [True, False])
def test_a_file_that_changes_under_a_dump(tmp_path, change, at_root):
    path = tmp_path / "t" if at_root else tmp_path / "t" / "d" / "file"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(3_000_000))
    pieces = dump(tmp_path / "t")
    if change not in ("vanished", "replaced", "symlink", "fifo", "directory"):
        next(pieces)  # in the middle of the file
        CHANGES[change](path)
    else:
        narmap = NarMap.build(tmp_path / "t")
        CHANGES[change](path)
        pieces = narmap.pieces(NarTree(tmp_path / "t"))
    with pytest.raises(PathError, match=r"changed while it was being read|Is a directory"):
        for _ in pieces:
            pass


@pytest.mark.parametrize("change", ["shrunk", "vanished", "symlink", "fifo", "directory"])
def test_a_chunk_whose_file_is_gone_is_unavailable(tmp_path, change):
    path = tmp_path / "t" / "file"
    path.parent.mkdir()
    path.write_bytes(bytes(3_000_000))
    narmap = NarMap.build(tmp_path / "t")
    CHANGES[change](path)
    with NarTree(tmp_path / "t") as root:
        with pytest.raises(ChunkUnavailable):
            narmap.read(root, 2_000_000, 100_000)
        assert len(narmap.read(root, 0, 100)) == 100  # framing needs no file


def test_a_directory_swapped_for_a_symlink_is_not_followed(tmp_path):
    make({b"d": {b"f": File(b"inside")}}, tmp_path / "t")
    make({b"f": File(b"secret")}, tmp_path / "elsewhere")
    narmap = NarMap.build(tmp_path / "t")
    (tmp_path / "t/d").rename(tmp_path / "old")
    (tmp_path / "t/d").symlink_to(tmp_path / "elsewhere")
    with NarTree(tmp_path / "t") as root:
        with pytest.raises(ChunkUnavailable):
            narmap.read(root, 0, narmap.size)
        with pytest.raises(PathError):
            list(narmap.pieces(root))


def test_the_root_is_not_followed(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    assert dumped(tmp_path / "link") == naive_nar(Link(b"nowhere"))


def test_fingerprint_sees_every_change_that_matters(tmp_path):
    root = tmp_path / "t"
    make({b"d": {b"f": File(b"abc"), b"l": Link(b"x")}, b"e": {}}, root)
    seen = {tree_fingerprint(root)}

    def changed():
        found = tree_fingerprint(root)
        new = found not in seen
        seen.add(found)
        return new

    assert not changed()
    os.utime(root / "d")  # says nothing that the entries do not
    assert not changed()
    (root / "d/f").chmod(0o755)
    assert changed()
    os.utime(root / "d/f", ns=(5, 5))
    assert changed()
    (root / "d/f").write_bytes(b"abcd")
    os.utime(root / "d/f", ns=(5, 5))
    assert changed()
    (root / "copy").write_bytes(b"abcd")
    os.utime(root / "copy", ns=(5, 5))
    (root / "copy").rename(root / "d/f")  # same size and mtime, another inode
    (root / "d/f").chmod(0o755)
    assert changed()
    (root / "d/l").unlink()
    (root / "d/l").symlink_to("y")
    assert changed()
    (root / "d/f").rename(root / "d/g")
    assert changed()
    (root / "d/g").rename(root / "e/g")
    assert changed()


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_damaged_maps_are_refused(data):
    with pytest.raises(NarError):
        NarMap.from_bytes(data)


def test_altered_records_never_crash(tmp_path):
    make(nasty_tree(), tmp_path / "t")
    records = tree_records(tmp_path / "t")
    rng = random.Random(2)
    for _ in range(300):
        altered = bytearray(records)
        altered[rng.randrange(len(altered))] = rng.randrange(256)
        with contextlib.suppress(NarError):
            assert NarMap(bytes(altered)).size > 0
    for cut in range(0, len(records), 7):
        with pytest.raises(NarError):
            NarMap(records[:cut])
    for extra in (b"\0", b"\2", records):
        with pytest.raises(NarError):
            NarMap(records + extra)


def test_stored_maps_are_bounded(tmp_path):
    make({b"f": File(b"x")}, tmp_path / "t")
    stored = NarMap.build(tmp_path / "t").to_bytes()
    header = stored[:8]
    bomb = zlib.compress(bytes(50 << 20))
    for bad in (
        stored[:-1],
        stored + b"\0",
        stored[:10],
        b"X" + stored[1:],
        header + (1 << 40).to_bytes(8, "little") + stored[16:],
        header + (1000).to_bytes(8, "little") + bomb,
        header + (1).to_bytes(8, "little") + stored[16:],
    ):
        with pytest.raises(NarError):
            NarMap.from_bytes(bad)

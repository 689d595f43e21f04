from __future__ import annotations

import mmap
import os
import random
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from blake3 import blake3

from p2pnode.errors import (
    Cancelled,
    ChunkUnavailable,
    LocalError,
    NarError,
    OutputExists,
    OutputUnwritable,
    PathError,
    VerificationFailed,
)
from p2pnode.images.exporter import exporter
from p2pnode.images.importer import import_path
from p2pnode.nix.narmap import dump
from p2pnode.progress import Progress
from p2pnode.store import Store
from p2pnode.store.records import Origin
from protocols.manifest import FASTCDC, Chunking, Image, ImageObject, Kind, Layout, encode_image
from tests.store.samples import export


def nasty_tree(path: Path) -> Path:
    path.mkdir()
    (path / "empty").mkdir()
    (path / "empty file").touch()
    (path / "exe").write_bytes(b"#!/bin/sh\n")
    (path / "exe").chmod(0o755)
    (path / "link").symlink_to("/etc/passwd")
    (path / "dangling").symlink_to("no/where")
    (path / "new\nline").write_text("x")
    os.mkdir(os.fsencode(path) + b"/\xff\xfe")
    (path / "a" / "b" / "c").mkdir(parents=True)
    (path / "a" / "b" / "c" / "big").write_bytes(random.Random(1).randbytes(3_000_000))
    (path / "a" / "same").write_bytes(random.Random(1).randbytes(3_000_000))
    (path / "sparse").touch()
    os.truncate(path / "sparse", 5_000_000)
    return path


def nar(path: Path) -> bytes:
    return b"".join(dump(path))


def transfer(source: Store, target: Store, image: Image, out: Path | None, **options: bool) -> None:
    """What a fetch does, without the network."""
    target.put_blocks({cid: source.block(cid) for cid in image.blocks})  # type: ignore[misc]
    target.add_image(image, name="n", origin=Origin.FETCHED, complete=False, path=None)
    check = exporter(target, image, out, force=options.get("force", False))
    check.check()
    landing = target.landing(image, out)
    landing.copy_local(image.chunks)
    here = target.held(image.chunks)
    for digest, held in zip(image.chunks, here, strict=True):
        if not held:
            assert landing.accept(digest, source.read(digest))
    landing.close()
    export(target, image, out, **options)


@pytest.fixture
def other(tmp_path: Path):
    with Store.open(tmp_path / "other") as store:
        yield store


def test_file(store: Store, other: Store, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    data = random.Random(2).randbytes(5_000_000) + bytes(4_000_000)
    path.write_bytes(data)
    seen: list[Progress] = []
    done = import_path(store, path, progress=seen.append)
    assert (done.image.kind, done.name, done.bytes, done.reused) == (Kind.FILE, "disk.img", len(data), False)
    assert done.new_bytes == done.image.chunk_bytes < len(data)
    assert done.image.objects[0].file_hash == blake3(data).digest()
    assert (seen[-1].done, seen[-1].total) == (len(data), len(data))
    assert store.stats().owned_bytes == 0, "no second copy"
    (tmp_path / "link").symlink_to(path)
    again = import_path(store, tmp_path / "link", name="again")
    assert (again.reused, again.new_bytes, again.image, again.name) == (True, 0, done.image, "again")
    transfer(store, other, done.image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert other.verify(done.image.id).ok and other.stats().owned_bytes == 0
    assert import_path(other, tmp_path / "out").image.id == done.image.id


@pytest.mark.parametrize("size", [0, 1, 65536])
def test_small_files(store: Store, other: Store, tmp_path: Path, size: int) -> None:
    (tmp_path / "in").write_bytes(b"x" * size)
    done = import_path(store, tmp_path / "in")
    transfer(store, other, done.image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"x" * size
    assert not [p for p in tmp_path.iterdir() if "p2pnode" in p.name]


def test_directory(store: Store, other: Store, tmp_path: Path) -> None:
    tree = nasty_tree(tmp_path / "tree")
    done = import_path(store, tree)
    assert done.image.kind is Kind.DIRECTORY and not done.reused
    assert import_path(store, tree).reused
    transfer(store, other, done.image, tmp_path / "out")
    assert nar(tmp_path / "out") == nar(tree)
    assert other.verify(done.image.id).ok
    assert other.stats().owned_bytes == 0 and not list(other._packs.iterdir())
    assert import_path(other, tmp_path / "out").image.id == done.image.id
    # What is replaced by --force stays until the new one is in place, and is gone then.
    (tree / "exe").write_text("version 2")
    second = import_path(store, tree)
    assert second.new_bytes < done.image.chunk_bytes
    with pytest.raises(OutputExists):
        transfer(store, other, second.image, tmp_path / "out")
    transfer(store, other, second.image, tmp_path / "out", force=True)
    assert nar(tmp_path / "out") == nar(tree)
    assert other.verify(second.image.id).ok
    assert not [p for p in tmp_path.iterdir() if "p2pnode" in p.name]


def test_without_output_the_content_stays_in_the_store(store: Store, other: Store, tmp_path: Path) -> None:
    done = import_path(store, nasty_tree(tmp_path / "tree"))
    transfer(store, other, done.image, None)
    assert other.verify(done.image.id).ok
    lost = other.remove_image(done.image.id)
    assert sorted(lost) == sorted(done.image.chunks) and not list(other._packs.iterdir())


def test_changed_originals_are_never_served(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(3).randbytes(2_000_000))
    done = import_path(store, path)
    lost: list[bytes] = []
    store.on_lost(lost.extend)
    os.utime(path, (1, 1))
    first, *_, last = done.image.chunks
    assert store.read(first), "touched, but the same bytes"
    with path.open("r+b") as file:
        file.seek(1_999_999)
        file.write(b"!")
    with pytest.raises(ChunkUnavailable):
        store.read(last)
    assert sorted(lost) == sorted(done.image.chunks)
    (problem,) = store.problems()
    assert problem.path == str(path) and "changed" in problem.reason
    again = import_path(store, path)
    assert not again.reused and again.image.id != done.image.id and store.problems() == []


def test_originals_are_hashed_again_unless_nothing_can_have_been_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    monkeypatch.setattr("p2pnode.store.store.blake3", lambda data: hashed.append(1) or blake3(data))
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    for seed, path in enumerate((fresh, old)):
        path.write_bytes(random.Random(seed).randbytes(2_000_000))
    new = import_path(store, fresh).image
    monkeypatch.setattr("p2pnode.images.objects.CLOCK_TICK_NS", 0)  # as if it had been written long ago
    done = import_path(store, old).image
    store.read(next(iter(new.chunks)))
    assert hashed, "it could have been written to within the tick of the file system's clock"
    hashed.clear()
    first, *_, last = done.chunks
    assert blake3(store.read(first)).digest() == first and not hashed
    times = old.stat()
    with old.open("r+b") as file:
        file.seek(1_999_999)
        file.write(b"!")
    os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert blake3(store.read(first)).digest() == first and hashed
    with pytest.raises(ChunkUnavailable, match="do not match"):
        store.read(last)


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_originals_that_somebody_has_mapped_are_hashed_again(store: Store, tmp_path: Path, place: str) -> None:
    """What is written through a mapping to a page that is dirty already does not change the file's ctime."""
    with tempfile.TemporaryDirectory(dir=tmp_path if place == "disk" else "/dev/shm") as folder:
        path = Path(folder, "file")
        path.write_bytes(random.Random(1).randbytes(2_000_000))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[-1] ^= 1
            long_ago = path.stat().st_ctime_ns
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("p2pnode.images.objects.CLOCK_TICK_NS", 0)
                done = import_path(store, path).image
            mapped[-1] ^= 1
            assert path.stat().st_ctime_ns == long_ago or place == "disk", "the disk may just have been written to"
            with pytest.raises(ChunkUnavailable, match="do not match"):
                store.read(list(done.chunks)[-1])


def test_originals_are_hashed_again_after_a_restart_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may leave old bytes under a new ctime."""
    hashed = []
    monkeypatch.setattr("p2pnode.images.objects.CLOCK_TICK_NS", 0)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    with Store.open(tmp_path / "home") as store:
        (chunk,) = import_path(store, path).image.chunks
    monkeypatch.setattr("p2pnode.store.store.blake3", lambda data: hashed.append(1) or blake3(data))
    with Store.open(tmp_path / "home") as store:
        assert store.read(chunk) and not hashed
        with store.catalog.transaction() as db:
            db.execute("UPDATE boot SET id = 'another'")
    with Store.open(tmp_path / "home") as store:
        assert store.read(chunk) and hashed


@pytest.mark.parametrize("harm", ["truncate", "unlink", "replace", "directory", "fifo"])
def test_harmed_files(store: Store, tmp_path: Path, harm: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(3).randbytes(2_000_000))
    done = import_path(store, path)
    last = list(done.image.chunks)[-1]
    store.read(last)  # so that a descriptor is open
    if harm == "truncate":
        os.truncate(path, 1000)
    else:
        path.unlink()
    if harm == "replace":
        path.write_bytes(b"other")
    if harm == "directory":
        path.mkdir()
    if harm == "fifo":
        os.mkfifo(path)
    with pytest.raises(ChunkUnavailable):
        store.read(last)
    assert len(store.problems()) == 1 and not any(store.held(done.image.chunks))


@pytest.mark.parametrize("harm", ["remove", "file", "symlink", "contents"])
def test_harmed_trees(store: Store, tmp_path: Path, harm: str) -> None:
    tree = nasty_tree(tmp_path / "tree")
    done = import_path(store, tree)
    assert store.verify(done.image.id).ok
    victim = tree / "a" / "b" / "c" / "big"
    if harm == "remove":
        shutil.rmtree(tree)
    elif harm == "file":
        victim.unlink()
    elif harm == "symlink":
        victim.rename(tmp_path / "big")
        victim.symlink_to(tmp_path / "big")
    else:
        victim.write_bytes(random.Random(9).randbytes(3_000_000))
    report = store.verify(done.image.id)
    assert not report.ok and store.problems()


def test_replaced_original_is_dropped_when_it_is_provided_again(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(3).randbytes(1_000_000))
    first = import_path(store, path)
    path.write_bytes(random.Random(4).randbytes(1_000_000))
    import_path(store, path)
    record = store.record(first.image.id)
    assert record is not None and record.held_chunks == 0 and not record.complete


def test_bad_paths(store: Store, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    tree = tmp_path / "tree"
    tree.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
    for path in ("missing", "loop", "fifo", "tree"):
        with pytest.raises(PathError, match=path):
            import_path(store, tmp_path / path)
    with pytest.raises(PathError):
        import_path(store, Path("/dev/null"))
    with pytest.raises(PathError, match="not a regular file"):
        import_path(store, tree, kind=Kind.FILE)
    with pytest.raises(PathError, match="not a Nix store path"):
        import_path(store, tree, kind=Kind.CLOSURE)
    with pytest.raises(LocalError, match="not supported yet"):
        import_path(store, tree, kind=Kind.MICROVM)
    assert store.images() == [] and store.stats().chunks == 0


def test_file_that_changes_while_it_is_read(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20_000_000))

    def meddle(progress: Progress) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(PathError, match="changed while it was being read"):
        import_path(store, path, progress=meddle)
    assert store.images() == []


def test_cancelled_import_leaves_no_image(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    with pytest.raises(Cancelled):
        import_path(store, tmp_path / "file", cancelled=lambda: True)
    assert store.images() == []


def test_fixed_chunks(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(random.Random(1).randbytes(100_000))
    done = import_path(store, tmp_path / "file", chunking=Chunking.fixed(65536))
    assert done.image.objects[0].layout.sizes == (65536, 34464)
    assert import_path(store, tmp_path / "file").image.id != done.image.id
    assert store.verify(done.image.id).ok


def test_output_checks(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    image = import_path(store, tmp_path / "file").image
    with pytest.raises(PathError, match="not a directory"):
        exporter(store, image, tmp_path / "no" / "where").check()
    with pytest.raises(OutputExists):
        exporter(store, image, tmp_path / "file").check()
    with pytest.raises(OutputUnwritable):
        exporter(store, image, Path("/proc/sys/out")).check()


def test_wrong_hashes_do_not_become_outputs(store: Store, tmp_path: Path) -> None:
    def image_of(data: bytes, *, wrong: bool) -> Image:
        digest = blake3(data).digest()
        layout = Layout(FASTCDC, (digest,), (len(data),))
        real = __import__("hashlib").sha256(data).digest()
        obj = ImageObject("tree", len(data), layout, nar_hash=bytes(32) if wrong else real)
        encoded = encode_image(Kind.DIRECTORY, {}, [obj])
        store.put_blocks(encoded.blocks)
        image = Image(encoded.id, Kind.DIRECTORY, {}, (obj,), tuple(encoded.blocks))
        store.add_image(image, name="bad", origin=Origin.FETCHED, complete=False, path=None)
        landing = store.landing(image)
        assert landing.accept(digest, data)
        landing.close()
        return image

    (tmp_path / "tree").mkdir()
    for data, wrong in ((nar(tmp_path / "tree"), True), (b"this is no NAR at all" * 9, False)):
        for out in (tmp_path / "out", None):
            target = exporter(store, image_of(data, wrong=wrong), out)
            target.check()
            with pytest.raises(VerificationFailed, match="tree"):
                target.begin_object(0)
                target.feed(data)
                target.end_object()
            target.abort()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "tree"]
    assert not issubclass(VerificationFailed, NarError)


@pytest.fixture
def nix_root(tmp_path: Path) -> Path:
    if shutil.which("nix-store") is None:
        pytest.skip("needs nix-store")
    root = tmp_path / "nixroot"
    (root / "nix/var/nix/db").mkdir(parents=True)
    return root


def nix(root: Path, *arguments: str) -> str:
    command = ["nix-store", "--store", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.nix
def test_store_paths_and_closures(store: Store, other: Store, tmp_path: Path, nix_root: Path) -> None:
    (tmp_path / "dep").mkdir()
    (tmp_path / "dep" / "data").write_bytes(random.Random(5).randbytes(500_000))
    dep = nix(nix_root, "--add", str(tmp_path / "dep"))
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "ref").write_text(dep)
    top = nix(nix_root, "--add", str(tmp_path / "top"))
    # `--add` scans for no references: register the path again with one, as a build does.
    lines = nix(nix_root, "--dump-db", top).splitlines()
    text = "\n".join([*lines[:3], "", "1", dep, ""])
    subprocess.run(["nix-store", "--store", str(nix_root), "--load-db"], input=text.encode(), check=True)
    seen: list[Progress] = []
    with pytest.raises(Cancelled):
        import_path(store, Path(top), nix_store=str(nix_root), progress=seen.append, cancelled=lambda: len(seen) > 0)
    assert store.images() == [], "no half a closure"
    run = import_path(store, Path(top), nix_store=str(nix_root))
    assert 0 < run.new_bytes < run.image.chunk_bytes, "the path that was finished is taken again"
    again = import_path(store, Path(top), nix_store=str(nix_root))
    assert again.reused and again.image == run.image
    one = import_path(store, Path(top), kind=Kind.STORE_PATH, nix_store=str(nix_root))
    assert [obj.path for obj in one.image.objects] == [Path(top).name] and one.name == "top" and one.reused
    assert run.image.kind is Kind.CLOSURE
    names = [obj.path for obj in run.image.objects]
    assert names == sorted([Path(dep).name, Path(top).name])
    root, leaf = names.index(Path(top).name), names.index(Path(dep).name)
    assert run.image.attributes == {"root": root}
    assert run.image.objects[root].references == (leaf,) and run.image.objects[leaf].ca is not None
    assert import_path(store, nix_root / top[1:], nix_store=str(nix_root)).image.id == run.image.id
    transfer(store, other, run.image, tmp_path / "out")
    assert nar(tmp_path / "out" / Path(dep).name) == nar(tmp_path / "dep")
    assert other.verify(run.image.id).ok and other.stats().owned_bytes == 0
    real = nix_root / dep[1:] / "data"
    real.chmod(0o644)
    real.write_bytes(b"damaged")
    for record in store.images():
        store.remove_image(record.id)
    with pytest.raises(VerificationFailed, match=Path(dep).name):
        import_path(store, Path(top), nix_store=str(nix_root))

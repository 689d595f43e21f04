from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pnode.errors import CatalogCorrupt, ChunkUnavailable, DiskFull, OutputExists, UsageError
from p2pnode.store import Store
from p2pnode.store.space import check_space
from tests.store.samples import CHUNK, add, export, sample_file


def fetched(store: Store, seed: int = 1, chunks: int = 20, out: Path | None = None, **options):
    image, blocks, parts, data = sample_file(seed, chunks, **options)
    add(store, image, blocks)
    landing = store.landing(image, out)
    assert landing.accept_many([(digest, (data,)) for digest, data in parts.items()]) == [True] * len(parts)
    landing.close()
    return image, parts, data


def test_landing_refuses_lies_and_serves_the_rest_at_once(store: Store) -> None:
    image, blocks, parts, _ = sample_file(1, 5)
    add(store, image, blocks)
    landing = store.landing(image)
    digest, other, *_ = parts
    assert not landing.accept(digest, parts[other])
    assert not landing.accept(bytes(32), b"not of this image")
    assert not store.has(digest)
    assert landing.accept(digest, memoryview(bytearray(parts[digest])))
    assert store.read(digest) == parts[digest]
    assert list(store.held(parts)) == [1, 0, 0, 0, 0]
    record = store.record(image.id)
    assert record is not None and (record.held_chunks, record.held_bytes, record.complete) == (1, CHUNK, False)
    landing.close()


@pytest.mark.parametrize("most", [10**9, 3 * CHUNK])
def test_chunks_that_follow_each_other_are_written_in_one(
    store: Store, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    image, blocks, chunks, data = sample_file(1, 40)
    add(store, image, blocks)
    digests = list(chunks)
    landing = store.landing(image)
    writes: list[tuple[int, int]] = []
    pwritev = os.pwritev

    def noted(fd: int, pieces: list[memoryview], place: int) -> int:
        writes.append((place // CHUNK, sum(map(len, pieces)) // CHUNK))
        return pwritev(fd, pieces, place)

    monkeypatch.setattr(os, "pwritev", noted)
    monkeypatch.setattr("p2pnode.store.landing.RUN_BYTES", most)
    come = [8, 2, 3, 30, 4, 9, 5, 6, 20, 7]
    halves = [(digests[n], [chunks[digests[n]][:1000], chunks[digests[n]][1000:]]) for n in come]
    lie = (digests[21], [memoryview(bytes(CHUNK))])
    assert landing.accept_many([*halves, lie]) == [True] * len(come) + [False]
    if most > len(data):
        assert writes == [(2, 8), (20, 1), (30, 1)]
    else:
        assert writes == [(2, 3), (5, 3), (8, 2), (20, 1), (30, 1)]
    assert all(landing.read(digests[number]) == chunks[digests[number]] for number in come)
    landing.close()


def test_a_landing_gives_back_what_was_written_to_it_as_long_as_it_is_good(store: Store) -> None:
    image, blocks, chunks, _ = sample_file(1, 4)
    add(store, image, blocks)
    first, second, *_ = chunks
    landing = store.landing(image)
    landing.accept(first, chunks[first])
    assert landing.read(first) == chunks[first] and landing.read(second) is None
    with landing.path.open("r+b") as file:
        file.seek(landing.offset(first))
        file.write(b"!")
    assert landing.read(first) is None
    os.truncate(landing.path, 1)
    assert landing.read(first) is None
    landing.close()


def test_file_lands_beside_its_output_and_becomes_it(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "disk.img"
    image, _, data = fetched(store, chunks=40, out=out, zeros=range(10, 30))
    assert not out.exists()
    (partial,) = tmp_path.glob(".disk.img.*.p2pnode-partial")
    assert partial.stat().st_blocks * 512 < len(data), "zeros stay holes"
    export(store, image, out)
    assert out.read_bytes() == data
    assert not partial.exists() and not list((tmp_path / "home/store/packs").iterdir())
    record = store.record(image.id)
    assert record is not None and record.complete and record.path == str(out)
    assert store.verify(image.id).ok
    assert store.stats().owned_bytes == 0


def test_pack_becomes_the_output_later_and_keep_chunks_keeps_a_copy(store: Store, tmp_path: Path) -> None:
    image, _, data = fetched(store, zeros=(3, 7))
    export(store, image, None)
    export(store, image, tmp_path / "a", keep_chunks=True)
    (tmp_path / "a").unlink()
    assert store.verify(image.id).ok, "the kept copy is enough"
    export(store, image, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data


def test_existing_output_needs_force(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    image, _, data = fetched(store)
    with pytest.raises(OutputExists):
        export(store, image, out)
    assert out.read_text() == "precious"
    export(store, image, out, force=True)
    assert out.read_bytes() == data


def test_two_versions_share_chunks(store: Store, tmp_path: Path) -> None:
    first, parts, _ = fetched(store, chunks=20, out=tmp_path / "v1")
    export(store, first, tmp_path / "v1")
    second, blocks, more, data = sample_file(1, 22)  # the same random bytes, and two chunks more
    add(store, second, blocks)
    landing = store.landing(second, tmp_path / "v2")
    assert landing.copy_local(second.chunks) == 20 * CHUNK
    missing = landing.missing()
    assert set(missing) == more.keys() - parts.keys()
    landing.accept_many([(digest, (more[digest],)) for digest in missing])
    landing.close()
    export(store, second, tmp_path / "v2")
    assert (tmp_path / "v2").read_bytes() == data
    assert store.remove_image(first.id) == [], "the second holds them all"
    assert sorted(store.remove_image(second.id)) == sorted(second.chunks)
    assert (tmp_path / "v1").exists() and (tmp_path / "v2").exists()
    assert store.images() == [] and store.block(second.id) is None


def test_pack_needed_by_another_image_outlives_its_own(store: Store) -> None:
    first, parts, _ = fetched(store, chunks=20)
    second, blocks, _, _ = sample_file(1, 10)
    add(store, second, blocks, "second")
    store.remove_image(first.id)
    assert all(store.held(second.chunks))
    assert store.verify(second.id).ok
    assert len(store.remove_image(second.id)) == 20 or not any(store.held(parts))
    assert not list((store._packs).iterdir())


def test_corrupt_pack_is_noticed_dropped_and_can_be_fetched_again(store: Store) -> None:
    image, parts, _ = fetched(store)
    lost: list[bytes] = []
    store.on_lost(lost.extend)
    (pack,) = store._packs.iterdir()
    with pack.open("r+b") as file:
        file.seek(5 * CHUNK + 17)
        file.write(b"damage")
    bad = list(parts)[5]
    report = store.verify(image.id)
    assert [(fault.path, fault.bad_chunks) for fault in report.bad] == [("file", 1)]
    assert lost == [bad] and not store.has(bad)
    assert [problem.path for problem in store.problems()] == [str(pack)]
    with pytest.raises(ChunkUnavailable):
        store.read(bad)
    landing = store.landing(image)
    assert landing.accept(bad, parts[bad])
    landing.close()
    assert store.verify(image.id).ok


def test_vanished_pack_loses_all_at_once(store: Store) -> None:
    image, parts, _ = fetched(store)
    lost: list[bytes] = []
    store.on_lost(lost.extend)
    store.read(next(iter(parts)))
    next(store._packs.iterdir()).unlink()
    with pytest.raises(ChunkUnavailable):
        store.read(next(iter(parts)))
    assert sorted(lost) == sorted(parts)
    record = store.record(image.id)
    assert record is not None and record.held_chunks == 0


def test_find(store: Store) -> None:
    image, blocks, _, _ = sample_file(1, 2)
    add(store, image, blocks, "one")
    text = str(image.id)
    assert [r.name for r in store.find(text)] == ["one"]
    assert [r.name for r in store.find(text[:12])] == ["one"]
    assert [r.name for r in store.find("one")] == ["one"]
    assert store.find(text[:7]) == [] and store.find(text[:-1] + "a") == [] and store.find("two") == []
    assert store.image(image.id) == image


def test_reopened_store_decodes_the_manifest_and_keeps_everything(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        image, _, _ = fetched(store, chunks=50)
    (tmp_path / "store/packs/orphan.pack").write_bytes(b"x")
    with Store.open(tmp_path) as store:
        assert store.image(image.id) == image
        assert store.verify(image.id).ok
        assert len(list((tmp_path / "store/packs").iterdir())) == 1, "the orphan is gone"
    next((tmp_path / "store/packs").iterdir()).unlink()
    with Store.open(tmp_path) as store:
        assert not any(store.held(image.chunks))


def test_corrupt_catalog_is_named(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    path = tmp_path / "store/catalog.sqlite"
    path.write_bytes(b"this is no database, but it is long enough to look at" * 100)
    with pytest.raises(CatalogCorrupt, match=r"catalog\.sqlite is damaged .* move it away"):
        Store.open(tmp_path)


def test_held_is_fast(store: Store) -> None:
    image, _, _ = fetched(store, chunks=2000)
    wanted = list(image.chunks) + [os.urandom(32) for _ in range(18_000)]
    began = time.monotonic()
    held = store.held(wanted)
    assert time.monotonic() - began < 0.5  # 0.1 s on an idle machine
    assert sum(held) == 2000 and all(held[:2000])


def test_crash_between_rename_and_commit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Store.open(tmp_path / "home") as store:
        image, _, data = fetched(store, out=out)
        (source,) = store.catalog.sources("owned")
        status = os.stat(source.path)
        with store.catalog.transaction() as db:
            db.execute(
                "UPDATE sources SET moving_to = ?, dev = ?, ino = ?, size = ?, mtime_ns = ?",
                (os.fsencode(out), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns),
            )
        os.rename(source.path, out)
    with Store.open(tmp_path / "home") as store:
        record = store.record(image.id)
        assert record is not None and record.complete and record.path == str(out)
        store.remove_image(image.id)
    assert out.read_bytes() == data


def test_one_fetch_at_a_time_per_file(store: Store, tmp_path: Path) -> None:
    image, blocks, parts, _ = sample_file(1, 5)
    add(store, image, blocks)
    landing = store.landing(image, tmp_path / "out")
    landing.accept(*next(iter(parts.items())))
    with pytest.raises(OutputExists, match="another fetch"):
        store.landing(image, tmp_path / "out")
    with pytest.raises(UsageError, match="is being fetched"):
        store.remove_image(image.id)
    landing.close()
    assert sum(store.held(parts)) == 1
    store.landing(image, tmp_path / "out").close()
    assert sum(store.held(parts)) == 1
    assert store.remove_image(image.id) == [next(iter(parts))]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_fetch_of_nothing_leaves_nothing(store: Store, tmp_path: Path) -> None:
    image, blocks, _, _ = sample_file(1, 5)
    add(store, image, blocks)
    store.landing(image, tmp_path / "out").close()
    store.landing(image).close()
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and not list(store._packs.iterdir())


def test_readers_do_not_notice_the_move_to_the_output(store: Store, tmp_path: Path) -> None:
    lost: list[bytes] = []
    store.on_lost(lost.extend)
    stop = threading.Event()
    failures: list[Exception] = []
    image, parts, _ = fetched(store, chunks=50)

    def serve() -> None:
        try:
            while not stop.is_set():
                for digest, data in parts.items():
                    assert store.read(digest) == data
        except (ChunkUnavailable, AssertionError) as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(8):
        export(store, image, tmp_path / str(number), keep_chunks=number % 2 == 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and not lost and store.problems() == []


def test_two_processes_may_open_one_store(store: Store, tmp_path: Path) -> None:
    image, blocks, parts, _ = sample_file(1, 5)
    add(store, image, blocks)
    landing = store.landing(image)
    landing.accept_many([(digest, (data,)) for digest, data in parts.items()])
    landing.flush()
    with Store.open(tmp_path / "home") as second:
        assert [record.held_chunks for record in second.images()] == [5]
    landing.close()
    assert store.verify(image.id).ok


KILLED = """
import sys
from pathlib import Path
from p2pnode.store import Store
from tests.store.samples import add, sample_file
store = Store.open(Path(sys.argv[1]))
image, blocks, parts, _ = sample_file(9, 6000)
add(store, image, blocks)
landing = store.landing(image, Path(sys.argv[2]))
for number, (digest, data) in enumerate(parts.items()):
    landing.accept(digest, data)
    if number == 5000:
        print("go", flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_kill_loses_at_most_what_was_not_committed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "home"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        process.send_signal(signal.SIGKILL)
    image, _, parts, data = sample_file(9, 6000)
    with Store.open(tmp_path / "home") as store:
        held = sum(store.held(image.chunks))
        assert 5001 - held <= (8 << 20) // CHUNK
        assert store.verify(image.id).chunks == held, "what is committed is on the disk"
        landing = store.landing(image, tmp_path / "out")
        landing.accept_many([(digest, (parts[digest],)) for digest in landing.missing()])
        landing.close()
        export(store, image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB; `remount` makes it larger."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", small], check=False).returncode:
        pytest.skip("no mounting here")
    yield small
    subprocess.run(["umount", "-l", small], check=True)


def remount(path: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", path], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_full_disk_is_an_error_and_resumes(store: Store, small_disk: Path) -> None:
    with pytest.raises(DiskFull, match="are needed on the disk of"):
        check_space(small_disk / "out", 1 << 20)
    image, blocks, parts, data = sample_file(1, 200)
    add(store, image, blocks)
    landing = store.landing(image, small_disk / "out")
    with pytest.raises(DiskFull, match="is full"):
        for item in parts.items():
            landing.accept(*item)
    landing.close()
    held = sum(store.held(parts))
    assert 100 < held <= 128
    remount(small_disk, "2m")
    landing = store.landing(image, small_disk / "out")
    assert len(landing.missing()) == 200 - held
    landing.accept_many([(digest, (parts[digest],)) for digest in landing.missing()])
    landing.close()
    export(store, image, small_disk / "out")
    assert (small_disk / "out").read_bytes() == data


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_full_disk_below_the_catalog_too(small_disk: Path) -> None:
    image, blocks, parts, _ = sample_file(1, 200)
    store = Store.open(small_disk)
    add(store, image, blocks)
    landing = store.landing(image)
    with pytest.raises(DiskFull):
        for item in parts.items():
            landing.accept(*item)
    with contextlib.suppress(DiskFull):
        landing.close()
    with contextlib.suppress(DiskFull):
        store.close()
    with contextlib.suppress(DiskFull):
        Store.open(small_disk).close()
    remount(small_disk, "4m")
    with Store.open(small_disk) as store:
        landing = store.landing(image)
        landing.accept_many([(digest, (parts[digest],)) for digest in landing.missing()])
        landing.close()
        assert store.verify(image.id).ok

"""Binary caches that we write, judged by Nix."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from p2pnode.errors import OutputExists, OutputUnwritable, VerificationFailed
from p2pnode.nix.binary_cache import FileCache
from p2pnode.nix.cache_dir import STALE_AGE, CacheDir, to_cache
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import SecretKey
from tests.nix.caches import OTHER_SECRET, SECRET, TRUSTED, closure
from tests.nix.stores import ChrootStore

CLOSURE = closure()
NARS = {signed.info.path: data for signed, data in CLOSURE}
SIGNED = [signed for signed, _ in CLOSURE]


async def open_nar(info: PathInfo) -> AsyncGenerator[bytes, None]:
    data = NARS[info.path]
    for at in range(0, len(data), 100):
        yield data[at : at + 100]


async def no_nar(info: PathInfo) -> AsyncGenerator[bytes, None]:
    raise AssertionError(f"the NAR of {info.path} was asked for")
    yield b""


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@pytest.mark.nix
@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_nix_takes_it(tmp_path, compression):
    directory = tmp_path / "cache"
    report = await to_cache(CacheDir(directory, compression=compression), SIGNED, open_nar)
    assert set(report.added) == set(NARS) and report.nar_bytes == sum(map(len, NARS.values()))
    url = f"file://{directory}"
    store = ChrootStore(tmp_path / "n", f"trusted-public-keys = {TRUSTED}")
    store.copy_from(url, *NARS)
    store.nix("store", "verify", "--all", "--sigs-needed", "1")
    assert store.info(*(each.info.path for each in SIGNED)) == SIGNED
    store.run("nix", "--extra-experimental-features", "nix-command", "store", "verify", "--all", "--store", url)
    for path, data in NARS.items():
        assert store.run_bytes("nix-store", "--dump", str(store.real(path))) == data
    substituted = ChrootStore(tmp_path / "s", f"trusted-public-keys = {TRUSTED}", f"substituters = {url}")
    substituted.nix_store("--realise", *NARS)
    assert substituted.valid() == set(NARS)


@pytest.mark.nix
async def test_signed_by_us(tmp_path):
    """A locally built closure, unsigned in its store: signed on its way into the cache."""
    key = SecretKey.generate("mine-1")
    source = ChrootStore(tmp_path / "a")
    (tmp_path / "tree").mkdir()
    for number in range(20):
        (tmp_path / "tree" / str(number)).write_bytes(os.urandom(5000))
    path = source.add(tmp_path / "tree")
    unsigned = [dataclasses.replace(each, info=dataclasses.replace(each.info, ca=None)) for each in source.info(path)]
    await to_cache(CacheDir(tmp_path / "cache", keys=[key]), unsigned, source.open_nar)
    taker = ChrootStore(tmp_path / "b", f"trusted-public-keys = {key.public_key()}")
    taker.copy_from(f"file://{tmp_path}/cache", path)
    assert [each.key_name for each in taker.info(path)[0].signatures] == ["mine-1"]
    stranger = ChrootStore(tmp_path / "c", f"trusted-public-keys = {TRUSTED}")
    with pytest.raises(AssertionError, match="lacks a valid signature"):
        stranger.copy_from(f"file://{tmp_path}/cache", path)


@pytest.mark.nix
async def test_it_is_the_cache_that_nix_itself_writes(tmp_path):
    store = ChrootStore(tmp_path / "n", f"trusted-public-keys = {TRUSTED}")
    await to_cache(CacheDir(tmp_path / "ours", compression="none"), SIGNED, open_nar)
    store.copy_from(f"file://{tmp_path}/ours", *NARS)
    store.copy_to(f"file://{tmp_path}/theirs?compression=none", *NARS)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.pop("nix-cache-info").startswith(theirs.pop("nix-cache-info"))
    assert ours == theirs


async def test_again_changes_nothing_and_asks_for_nothing(tmp_path):
    await to_cache(CacheDir(tmp_path), SIGNED[:3], open_nar)
    before = contents(tmp_path)
    report = await to_cache(CacheDir(tmp_path), SIGNED[:3], no_nar)
    assert report.added == () and len(report.present) == 3 and contents(tmp_path) == before
    report = await to_cache(CacheDir(tmp_path, compression="none"), SIGNED, open_nar)
    assert len(report.present) == 3 and before.items() <= contents(tmp_path).items()
    assert all(CacheDir(tmp_path).holds(each.info) for each in SIGNED)


async def test_signatures_are_added_to_what_is_there(tmp_path):
    unsigned = [dataclasses.replace(each, signatures=()) for each in SIGNED]
    await to_cache(CacheDir(tmp_path), unsigned, open_nar)
    await to_cache(CacheDir(tmp_path), SIGNED, no_nar)
    await to_cache(CacheDir(tmp_path, keys=[OTHER_SECRET]), unsigned, no_nar)
    for each in SIGNED:
        narinfo = parse((tmp_path / f"{each.info.path.digest}.narinfo").read_bytes())
        assert set(narinfo.signatures) == {SECRET.sign(each.info), OTHER_SECRET.sign(each.info)}
        assert narinfo.compression == "zstd" and narinfo.file_size == (tmp_path / narinfo.url).stat().st_size


@pytest.mark.parametrize("fault", ["short", "long", "changed", "broken"])
async def test_a_nar_that_is_wrong_leaves_nothing(tmp_path, fault):
    async def wrong(info: PathInfo) -> AsyncGenerator[bytes, None]:
        data = NARS[info.path]
        if fault == "broken":
            yield data[:100]
            raise KeyError("gone")
        yield {"short": data[:-1], "long": data + b"\0", "changed": data[:96] + b"!" + data[97:]}[fault]

    with pytest.raises(KeyError if fault == "broken" else VerificationFailed):
        await to_cache(CacheDir(tmp_path), SIGNED[:1], wrong)
    assert list(contents(tmp_path)) == ["nix-cache-info"]


async def test_what_a_crash_left_is_completed(tmp_path):
    """A NAR without contents (after a power failure), one without narinfo, a narinfo cut short, an old temporary."""
    await to_cache(CacheDir(tmp_path), SIGNED, open_nar)
    whole = contents(tmp_path)
    cut, lost, gone = (each.info.path for each in SIGNED[:3])
    (tmp_path / parse(whole[f"{cut.digest}.narinfo"]).url).write_bytes(b"")
    (tmp_path / f"{lost.digest}.narinfo").unlink()
    (tmp_path / f"{gone.digest}.narinfo").write_bytes(whole[f"{gone.digest}.narinfo"][:50])
    stale, fresh = tmp_path / "nar/.tmp-0123456789abcdef", tmp_path / "nar/.tmp-4567"
    stale.write_bytes(b"x")
    os.utime(stale, (1, os.stat(stale).st_mtime - STALE_AGE - 10))
    fresh.write_bytes(b"somebody is writing this")
    report = await to_cache(CacheDir(tmp_path), SIGNED, open_nar)
    assert set(report.added) == {cut, lost, gone}
    assert not stale.exists() and fresh.exists()
    fresh.unlink()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    "planted",
    [{"nar_hash": bytes(32)}, {"nar_size": 4711}, {"references": (SIGNED[-1].info.path,)}],
    ids=["hash", "size", "references"],
)
async def test_another_path_under_one_name_is_neither_signed_nor_overwritten(tmp_path, planted):
    await to_cache(CacheDir(tmp_path), SIGNED[:1], open_nar)
    signed = SIGNED[0]
    file = tmp_path / f"{signed.info.path.digest}.narinfo"
    narinfo = parse(file.read_bytes())
    other = dataclasses.replace(narinfo, info=dataclasses.replace(signed.info, **planted))
    file.write_text(other.format())
    cache = CacheDir(tmp_path, keys=[OTHER_SECRET])
    with pytest.raises(OutputExists, match=str(signed.info.path)):
        cache.holds(signed.info)
    with pytest.raises(OutputExists, match=f"remove {file.name}"):
        await to_cache(cache, [signed], no_nar)
    assert file.read_text() == other.format()
    if "references" in planted:
        assert cache.holds(signed.info, references=False)


def test_a_directory_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputUnwritable):
        CacheDir(tmp_path / "file")
    other = tmp_path / "other"
    other.mkdir()
    (other / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    with pytest.raises(OutputExists, match="/gnu/store"):
        CacheDir(other)


async def test_our_reader_reads_it(tmp_path):
    for compression in ("none", "zstd"):
        directory = tmp_path / compression
        await to_cache(CacheDir(directory, compression=compression), SIGNED, open_nar)
        async with FileCache(directory) as cache:
            assert (await cache.info()).priority == 30 and (await cache.info()).want_mass_query
            assert await cache.hash_parts() == sorted(path.digest for path in NARS)
            for each in SIGNED:
                narinfo = await cache.narinfo(each.info.path)
                assert narinfo is not None and narinfo.signed == each
                assert b"".join([piece async for piece in cache.nar(narinfo)]) == NARS[each.info.path]

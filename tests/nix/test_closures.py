"""Whole closures with references, from one real store to another by every way, and every proof checked on the way."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from p2pnode.nix.binary_cache import open_cache
from p2pnode.nix.cache_dir import CacheDir, to_cache
from p2pnode.nix.content_address import ContentCheck
from p2pnode.nix.hashes import NIX32_ALPHABET
from p2pnode.nix.narmap import dump
from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.storepath import StorePath
from p2pnode.nix.trust import Policy, Proof, TrustedKeys, judge, require
from tests.nix.imports import into_store
from tests.nix.stores import ChrootStore, NixDaemon

pytestmark = pytest.mark.nix

COUNT = 150


def make_closure(store: ChrootStore, seed: int) -> list[StorePath]:
    """Paths that refer to earlier ones and, every third, to themselves; the last to all that nobody else refers to."""
    chance = random.Random(seed)
    paths = [StorePath("".join(chance.choices(NIX32_ALPHABET, k=32)), f"part-{number}") for number in range(COUNT)]
    trees = []
    unreferred = set(paths[:-1])
    for number, path in enumerate(paths):
        references = set(chance.sample(paths[:number], min(number, chance.randrange(5))))
        if number % 3 == 0:
            references.add(path)
        if number == COUNT - 1:
            references |= unreferred
        unreferred -= references - {path}
        filler = chance.randbytes(chance.randrange(3000))
        trees.append((path, filler + b"\n".join(str(each).encode() for each in references) + filler, references))
    store.register(trees)
    return paths


@pytest.fixture
def source(tmp_path: Path) -> ChrootStore:
    return ChrootStore(tmp_path / "source")


async def test_a_signed_closure_over_a_cache_into_a_daemon(source, tmp_path):
    paths = make_closure(source, 1)
    key = SecretKey.generate("publisher-1")
    keys = TrustedKeys([key.public_key()])
    (tmp_path / "secret").write_text(str(key))
    source.nix("store", "sign", "-k", tmp_path / "secret", *paths)
    signed = source.info(*paths)
    for each in signed:  # Nix's signatures, our check
        assert require(each.info, each.signatures, keys, Policy.ALWAYS).signed_by == ("publisher-1",)
    await to_cache(CacheDir(tmp_path / "cache"), reversed(signed), source.open_nar)
    target = ChrootStore(tmp_path / "target", f"trusted-public-keys = {key.public_key()}", "trusted-users = nobody")
    link = tmp_path / "result"
    with NixDaemon(target) as daemon:
        async with open_cache(f"file://{tmp_path}/cache") as cache:
            found = {path: await cache.narinfo(path) for path in paths}
            assert [narinfo.signed for narinfo in found.values() if narinfo is not None] == signed
            added = await into_store(
                [narinfo.signed for narinfo in found.values() if narinfo is not None],
                lambda info: cache.nar(found[info.path]),
                top=paths[-1],
                add_root=link,
                socket=daemon.socket,
            )
    assert set(added) == set(paths)
    target.nix("store", "verify", "--all", "--sigs-needed", "1")
    assert target.info(*paths) == signed
    target.nix_store("--gc")
    assert target.valid() == set(paths)  # the root keeps all of it
    taker = ChrootStore(tmp_path / "taker", f"trusted-public-keys = {key.public_key()}")
    taker.copy_from(f"file://{tmp_path}/cache", paths[-1])
    taker.nix("store", "verify", "-r", "--sigs-needed", "1", paths[-1])
    assert taker.valid() == set(paths)


async def test_a_closure_made_content_addressed_by_nix_proves_itself(source, tmp_path, monkeypatch):
    """Self references too: their hash leaves out the path's own digest, and no NAR hash can stand for it."""
    paths = make_closure(source, 2)
    made = source.nix("store", "make-content-addressed", "--json", *paths)
    rewritten = sorted(map(StorePath.parse, json.loads(made)["rewrites"].values()))
    assert len(rewritten) == COUNT
    infos = source.info(*rewritten)
    assert sum(each.info.path in each.info.references for each in infos) == COUNT // 3
    for each in infos:
        verdict = judge(each.info, each.signatures, TrustedKeys())
        assert verdict.proof is Proof.CONTENT
        assert verdict.needs_contents == (each.info.path in each.info.references)
        check = ContentCheck(each.info)
        for piece in dump(source.real(each.info.path)):
            check.feed(piece)
        check.finish()
    target = ChrootStore(tmp_path / "target", "trusted-public-keys =")
    monkeypatch.setenv("NIX_CONF_DIR", str(target.base))
    added = await into_store(infos, source.open_nar, store_root=target.root)
    assert set(added) == set(rewritten)
    target.nix("store", "verify", "--all")

"""The same trees and streams through the real nix-store."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile

import pytest
from hypothesis import given, settings

from p2pnode.nix.hashes import format_sha256, parse_sha256
from p2pnode.nix.nar_restore import NarRestorer
from p2pnode.nix.narmap import NarMap, NarTree, dump
from tests.nix.trees import make, make_nasty, naive_nar, snapshot, trees, vector_bytes, vectors

pytestmark = pytest.mark.nix


def nix_dump(path) -> bytes:
    return subprocess.run(["nix-store", "--dump", path], check=True, capture_output=True).stdout


def test_nasty_tree(tmp_path):
    make_nasty(tmp_path / "t")
    nar = nix_dump(tmp_path / "t")
    assert b"".join(dump(tmp_path / "t")) == nar
    narmap = NarMap.build(tmp_path / "t")
    with NarTree(tmp_path / "t") as root:
        assert narmap.read(root, 0, narmap.size) == nar


@settings(max_examples=15, deadline=None)
@given(trees)
def test_any_tree(tree):
    with tempfile.TemporaryDirectory() as base:
        path = os.path.join(base, "t")
        make(tree, path)
        assert b"".join(dump(path)) == nix_dump(path)
        with NarRestorer(os.path.join(base, "out"), store_modes=True) as restorer:
            restorer.feed(nix_dump(path))
            restorer.finish()
        assert nix_dump(os.path.join(base, "out")) == naive_nar(tree)


@pytest.mark.parametrize("vector", vectors("accept"))
def test_restored_as_nix_restores(tmp_path, vector):
    nar = vector_bytes(vector)
    subprocess.run(["nix-store", "--restore", tmp_path / "nix"], input=nar, check=True)
    with NarRestorer(tmp_path / "ours") as restorer:
        restorer.feed(nar)
        restorer.finish()
    assert snapshot(tmp_path / "ours") == snapshot(tmp_path / "nix")


def test_a_sparse_file_beyond_4_gib_has_the_right_size_and_place(tmp_path):
    size = (4 << 30) + 3
    with open(tmp_path / "big", "xb") as file:
        file.truncate(size)
        file.seek(size - 3)
        file.write(b"end")
    narmap = NarMap.build(tmp_path / "big")
    assert narmap.size == 112 + size + 5
    with NarTree(tmp_path / "big") as root:
        assert narmap.read(root, narmap.size - 16 - 5 - 3, 3) == b"end"


def test_hash_is_that_of_nix_hash(tmp_path):
    make_nasty(tmp_path / "t")
    digest = hashlib.sha256(b"".join(dump(tmp_path / "t"))).digest()
    for option, spelling in (((), "base16"), (("--base32",), "base32"), (("--base64",), "base64"), (("--sri",), "sri")):
        done = subprocess.run(
            ["nix-hash", "--type", "sha256", *option, tmp_path / "t"], capture_output=True, text=True, check=False
        )
        if done.returncode:  # only newer versions know --base64 and --sri
            assert spelling in ("base64", "sri")
            continue
        printed = done.stdout.strip()
        text = printed if printed.startswith("sha256") else f"sha256:{printed}"
        assert parse_sha256(text) == digest
        assert format_sha256(digest, spelling) == text

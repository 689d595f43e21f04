from __future__ import annotations

import hashlib

import pytest

from p2pnode.errors import NixError
from p2pnode.nix.hashes import parse_sha256
from p2pnode.nix.storepath import (
    CAMethod,
    ContentAddress,
    StorePath,
    check_name,
    infer_ca,
    make_ca_path,
    make_fixed_output_path,
    make_text_path,
)

# Printed by Nix 2.8.0: nix-store --add f; --add-fixed sha256 f; --add-fixed --recursive sha1 d; builtins.toFile.
FILE = b"hello\n"
FILE_NAR = bytes.fromhex("1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13")
SOURCE = StorePath.parse("/nix/store/xp0dpr9yz5h0fk5c5lpj7zzqjbdh3w8c-f")
FLAT = StorePath.parse("/nix/store/1p9q0bz6f22dyxh4lw8xs08p4201vyq4-f")
TEXT = StorePath.parse("/nix/store/9yzk1m9dhzmxypliwab5gyyzv96wmshw-t.txt")


def test_parts():
    assert StorePath("xp0dpr9yz5h0fk5c5lpj7zzqjbdh3w8c", "f") == SOURCE
    assert str(SOURCE) == "/nix/store/xp0dpr9yz5h0fk5c5lpj7zzqjbdh3w8c-f"
    assert StorePath.from_base_name(SOURCE.base_name) == SOURCE


@pytest.mark.parametrize("name", ["f", "a" * 211, ".hidden", "...", "..a", "A+b-c._?=0", "-", "a-.."])
def test_names_that_new_nix_takes(name):
    check_name(name)
    assert StorePath.from_base_name("0" * 32 + "-" + name).name == name


@pytest.mark.parametrize(
    "name", ["", "a" * 212, ".", "..", ".-a", "..-a", "a/b", "a b", "é", "a\n", "a%", "a\0", "٣", "..-", "a~"]
)
def test_names_that_new_nix_refuses(name):
    with pytest.raises(NixError):
        check_name(name)
    with pytest.raises(NixError):
        StorePath.from_base_name("0" * 32 + "-" + name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/nix/store",
        "/nix/store/",
        "/nix/store/.links",
        "/nix/store/" + "0" * 32,
        "/nix/store/" + "0" * 32 + "a-name",
        "/nix/store/" + "0" * 31 + "-name",
        "/nix/store/" + "e" * 32 + "-name",
        "/nix/store/" + "0" * 32 + "-name/",
        "/nix/store/" + "0" * 32 + "-name/bin",
        "/nix/store/../store/" + "0" * 32 + "-name",
        "/gnu/store/" + "0" * 32 + "-name",
        "nix/store/" + "0" * 32 + "-name",
        "0" * 32 + "-name",
        "/nix/store/" + "0" * 32 + "-name\n",
    ],
)
def test_what_is_no_store_path(text):
    with pytest.raises(NixError):
        StorePath.parse(text)


def test_paths_computed_as_nix_computes_them():
    recursive = ContentAddress(CAMethod.RECURSIVE, "sha256", FILE_NAR)
    flat = ContentAddress(CAMethod.FLAT, "sha256", hashlib.sha256(FILE).digest())
    assert make_fixed_output_path(recursive, "f") == SOURCE
    assert make_fixed_output_path(flat, "f") == FLAT
    assert make_text_path(hashlib.sha256(b"hey").digest(), "t.txt") == TEXT


def test_text_with_a_reference():
    path = StorePath.parse("/nix/store/0i9ls1r38hkv75y1fipchixvll9jz7sa-t.txt")
    address = ContentAddress.parse("text:sha256:1m488m7ycgfsxc4pvx2rn1jz10aji5aqnxly6wfnk2rj4la5yr78")
    reference = StorePath.from_base_name("idpl50b4jlhvdg6flz4dadnzn401flh4-dep")
    assert make_ca_path(address, "t.txt", [reference]) == path
    assert make_ca_path(address, "t.txt") != path


def test_source_with_a_self_reference():
    path = StorePath.parse("/nix/store/6g0wbr1il6yn5y83cfcdm34vrx3ly6xx-caout")
    address = ContentAddress.parse("fixed:r:sha256:04srxxscxqs7rs0dfhwhgji80saca604qd4627h3n9g9rrf6apgl")
    assert make_fixed_output_path(address, "caout", self_reference=True) == path
    assert make_fixed_output_path(address, "caout") != path


def test_other_algorithms_and_what_cannot_have_references():
    address = ContentAddress(CAMethod.RECURSIVE, "sha1", bytes(20))
    assert make_fixed_output_path(address, "d") != make_fixed_output_path(
        ContentAddress(CAMethod.FLAT, "sha1", bytes(20)), "d"
    )
    with pytest.raises(NixError):
        make_fixed_output_path(address, "d", [SOURCE])
    with pytest.raises(NixError):
        make_fixed_output_path(address, "d", self_reference=True)


@pytest.mark.parametrize(
    "text",
    [
        "fixed:sha256:014znj6hnd349vhlqmvfbl7aa0bawgrhp305jb92g2ahhzkmh6za",
        "fixed:r:sha256:014znj6hnd349vhlqmvfbl7aa0bawgrhp305jb92g2ahhzkmh6za",
        "text:sha256:014znj6hnd349vhlqmvfbl7aa0bawgrhp305jb92g2ahhzkmh6za",
    ],
)
def test_content_addresses_round_trip(text):
    assert str(ContentAddress.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "fixed:", "sha256:00", "text:sha1:" + "0" * 40, "fixed:x:sha256:" + "0" * 52, "text:r:sha256:" + "0" * 52],
)
def test_bad_content_addresses(text):
    with pytest.raises(NixError):
        ContentAddress.parse(text)


def test_infer_ca_proves_or_says_none():
    flat = hashlib.sha256(FILE).digest()
    assert infer_ca(SOURCE, FILE_NAR, []) == ContentAddress(CAMethod.RECURSIVE, "sha256", FILE_NAR)
    assert infer_ca(FLAT, FILE_NAR, []) is None
    assert infer_ca(FLAT, FILE_NAR, [], flat) == ContentAddress(CAMethod.FLAT, "sha256", flat)
    text = hashlib.sha256(b"hey").digest()
    assert infer_ca(TEXT, FILE_NAR, [], text) == ContentAddress(CAMethod.TEXT, "sha256", text)
    assert infer_ca(SOURCE, FILE_NAR, [TEXT]) is None
    assert infer_ca(SOURCE, FILE_NAR, [SOURCE]) is None
    assert infer_ca(SOURCE, parse_sha256("sha256:" + "0" * 64), []) is None

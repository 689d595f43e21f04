"""The narinfo vectors, and what the tests of caches, signatures and trust need of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from p2pnode.nix.cli import PathInfo, topological_order
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import PublicKey, SecretKey, SignedInfo
from p2pnode.nix.storepath import StorePath
from p2pnode.nix.trust import TrustedKeys

ROOT = Path(__file__).parent.parent / "vectors/narinfo"
INDEX = json.loads((ROOT / "index.json").read_text())
TRUSTED = PublicKey.parse(INDEX["public_keys"]["trusted"])
SECRET = SecretKey.parse(INDEX["secret_keys"]["trusted"])
OTHER_SECRET = SecretKey.parse(INDEX["secret_keys"]["unknown"])
KEYS = TrustedKeys([TRUSTED])


def vectors(expect: str) -> list[Any]:
    """Test parameters: one vector each, named by it."""
    return [pytest.param(each, id=each["name"]) for each in INDEX["vectors"] if each["expect"] == expect]


def vector(name: str) -> dict[str, Any]:
    return next(each for each in INDEX["vectors"] if each["name"] == name)


def text(each: dict[str, Any]) -> bytes:
    return (ROOT / each["file"]).read_bytes()


def path(each: dict[str, Any]) -> StorePath:
    return StorePath.parse(each["path"])


def nar(url: str) -> bytes:
    return (ROOT / url).read_bytes()


def closure() -> list[tuple[SignedInfo, bytes]]:
    """Every path of the vectors once, properly signed, with its NAR; references first."""
    found: dict[StorePath, tuple[SignedInfo, bytes]] = {}
    for each in INDEX["vectors"]:
        if each["expect"] == "accept" and each["name"] != "url-query":
            narinfo = parse(text(each))
            signed = SignedInfo(narinfo.info, (SECRET.sign(narinfo.info),))
            found.setdefault(narinfo.info.path, (signed, nar(narinfo.url)))
    dep = StorePath.parse("/nix/store/idpl50b4jlhvdg6flz4dadnzn401flh4-dep")
    data = nar("nar/0k43d7bbl33ifww7ir26cd0x9l0y524gapyx9zgwm7p7phh6xxcc.nar")
    info = PathInfo(dep, hashlib.sha256(data).digest(), len(data), (), None, None)
    found.setdefault(dep, (SignedInfo(info, (SECRET.sign(info),)), data))
    return [found[info.path] for info in topological_order(signed.info for signed, _ in found.values())]

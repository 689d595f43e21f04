"""Store paths: their form, and the proof that a path belongs to its contents.

Source: the Nix manual's "Store path" protocol page, libstore/path.cc and content-address.cc. The rules for names are
those of new Nix (2.36), which are stricter than those of 2.8.

A path is provable from contents and references alone only when it is *content-addressed*; its `ca` field says by
which method::

    fixed:r:ALGORITHM:HASH    hash of the NAR        (a directory, a fetched tree; `nix-store --add`)
    fixed:ALGORITHM:HASH      hash of the one file   (fetchurl)
    text:sha256:HASH          hash of the one file   (builtins.toFile, .drv)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from p2pnode.errors import NixError
from p2pnode.nix.hashes import NIX32_ALPHABET, format_hash, nix32_encode, parse_hash

STORE_DIR = "/nix/store"
DIGEST_DIGITS = 32  # 160 bits: no digit has spare bits
MAX_NAME = 211  # 255, less the digest, the dash and room for ".lock", ".chroot" and temporary suffixes

_BASE_NAME = re.compile(rf"([{NIX32_ALPHABET}]{{{DIGEST_DIGITS}}})-([0-9a-zA-Z+._?=-]{{1,{MAX_NAME}}})", re.ASCII)


def check_name(name: str) -> None:
    """Raise NixError unless `name` may stand after the digest of a store path."""
    if not re.fullmatch(rf"[0-9a-zA-Z+._?=-]{{1,{MAX_NAME}}}", name, re.ASCII):
        raise NixError(f"{name[:250]!r} is not a store path name: 1 to {MAX_NAME} of 0-9 a-z A-Z + - . _ ? =")
    # "." and ".." as the first dash-part: a tool that cuts the name at a dash would get a path component out of it.
    if name.partition("-")[0] in (".", ".."):
        raise NixError(f"{name!r} is not a store path name: it begins with a '.' or '..' of its own")


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """A path directly below /nix/store. `digest` is its 32 nix32 digits, `name` what follows the dash."""

    digest: str
    name: str

    @classmethod
    def parse(cls, text: str) -> StorePath:
        """Read a full path. Raises NixError, also for a path below a store path or with a slash at the end."""
        if not text.startswith(STORE_DIR + "/"):
            raise NixError(f"{text[:300]!r} is not a path in {STORE_DIR}")
        return cls.from_base_name(text[len(STORE_DIR) + 1 :])

    @classmethod
    def from_base_name(cls, text: str) -> StorePath:
        """Read `DIGEST-NAME`. Raises NixError."""
        match = _BASE_NAME.fullmatch(text)
        if match is None:
            raise NixError(f"{text[:300]!r} is not a store path: it must be 32 nix32 digits, '-' and a name")
        check_name(match[2])
        return cls(match[1], match[2])

    @property
    def base_name(self) -> str:
        return f"{self.digest}-{self.name}"

    def __str__(self) -> str:
        return f"{STORE_DIR}/{self.digest}-{self.name}"


class CAMethod(Enum):
    """How a content-addressed path's hash is taken; the value is how a `ca` field begins."""

    TEXT = "text:"
    FLAT = "fixed:"
    RECURSIVE = "fixed:r:"


@dataclass(frozen=True, slots=True)
class ContentAddress:
    """A `ca` field. `digest` is over the NAR (RECURSIVE) or over the single file's contents (TEXT, FLAT)."""

    method: CAMethod
    algorithm: str
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> ContentAddress:
        """Raises NixError for another method, another algorithm or a hash that is not well spelled."""
        for method in (CAMethod.TEXT, CAMethod.RECURSIVE, CAMethod.FLAT):  # "fixed:" is a prefix of "fixed:r:"
            if text.startswith(method.value):
                break
        else:
            raise NixError(f"{text[:100]!r} is not a content address: it must begin with 'fixed:' or 'text:'")
        algorithm, digest = parse_hash(text.removeprefix(method.value))
        if method is CAMethod.TEXT and algorithm != "sha256":
            raise NixError("a 'text:' content address has a sha256 hash")
        return cls(method, algorithm, digest)

    def __str__(self) -> str:
        return self.method.value + format_hash(self.algorithm, self.digest)


def make_store_path(kind: str, inner_sha256: bytes, name: str) -> StorePath:
    """The path whose fingerprint is `KIND:sha256:INNER:/nix/store:NAME`."""
    check_name(name)
    fingerprint = f"{kind}:sha256:{inner_sha256.hex()}:{STORE_DIR}:{name}"
    folded = bytearray(20)
    for index, byte in enumerate(hashlib.sha256(fingerprint.encode()).digest()):
        folded[index % 20] ^= byte
    return StorePath(nix32_encode(bytes(folded)), name)


def make_fixed_output_path(
    address: ContentAddress, name: str, references: Iterable[StorePath] = (), *, self_reference: bool = False
) -> StorePath:
    """The path of a `fixed:` content address. `references` leaves out the path itself.

    With a self reference the digest must be the hash modulo self references (32 NUL bytes in place of each
    digest part, then `|OFFSET` for every place). Raises NixError where the method cannot have references.
    """
    if address.method is CAMethod.TEXT:
        raise ValueError("a text path is computed by make_text_path")
    if address.method is CAMethod.RECURSIVE and address.algorithm == "sha256":
        parts = ["source", *_sorted_paths(references), *(["self"] if self_reference else [])]
        return make_store_path(":".join(parts), address.digest, name)
    if self_reference or any(True for _ in references):
        raise NixError(f"a path with content address {address} cannot have references")
    recursive = "r:" if address.method is CAMethod.RECURSIVE else ""
    inner = f"fixed:out:{recursive}{address.algorithm}:{address.digest.hex()}:"
    return make_store_path("output:out", hashlib.sha256(inner.encode()).digest(), name)


def make_text_path(sha256: bytes, name: str, references: Iterable[StorePath] = ()) -> StorePath:
    """The path of a text whose contents have this SHA-256."""
    return make_store_path(":".join(["text", *_sorted_paths(references)]), sha256, name)


def make_ca_path(address: ContentAddress, name: str, references: Iterable[StorePath] = ()) -> StorePath:
    """The path that content address, name and references (without itself) give. Raises NixError."""
    if address.method is CAMethod.TEXT:
        return make_text_path(address.digest, name, references)
    return make_fixed_output_path(address, name, references)


def infer_ca(
    path: StorePath, nar_sha256: bytes, references: Iterable[StorePath], flat_sha256: bytes | None = None
) -> ContentAddress | None:
    """The SHA-256 content address that `path` is proved by, if it has one.

    `nix-store` prints no `ca`, and `--load-db` loses it; but whether contents and references give the path can be
    computed anywhere, so this answer is the same on every machine. `flat_sha256`: hash of the contents, when the
    path is one non-executable file. Not found: paths that refer to themselves (their hash needs a rewritten NAR) and
    algorithms other than SHA-256.
    """
    others = sorted(set(references))
    if path in others:
        return None
    candidates = [ContentAddress(CAMethod.RECURSIVE, "sha256", nar_sha256)]
    if flat_sha256 is not None:
        candidates.append(ContentAddress(CAMethod.TEXT, "sha256", flat_sha256))
        if not others:
            candidates.append(ContentAddress(CAMethod.FLAT, "sha256", flat_sha256))
    return next((address for address in candidates if make_ca_path(address, path.name, others) == path), None)


def _sorted_paths(references: Iterable[StorePath]) -> list[str]:
    return sorted(str(path) for path in set(references))

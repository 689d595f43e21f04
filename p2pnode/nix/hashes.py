"""The spellings of a hash in the Nix world: nix32, base 16, base 64 and SRI, read strictly.

Source: Nix manual "Nix32 encoding", and libutil/hash.cc of Nix 2.8 and 2.36. One digest has four spellings::

    sha256:e3b0...   64 hexadecimal digits        sha256:0mdq...   52 nix32 digits
    sha256:47DE...=  44 characters of base 64     sha256-47DE...=  the same as Subresource Integrity (SRI)

After a colon the length tells which; no two lengths of one algorithm are equal.
"""

from __future__ import annotations

import base64
import binascii
from typing import Literal

from p2pnode.errors import NixError

Spelling = Literal["base16", "base32", "base64", "sri"]

NIX32_ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"  # no e, o, u, t: no accidental words

DIGEST_SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}
"""Bytes of a digest, for every algorithm that a store path or a `ca` field may name."""

_NIX32_VALUES = {character: value for value, character in enumerate(NIX32_ALPHABET)}


def nix32_length(size: int) -> int:
    """Digits that `size` bytes take: 20 -> 32, 32 -> 52."""
    return (size * 8 + 4) // 5


def nix32_encode(data: bytes) -> str:
    """`data` as nix32: one little-endian number, its most significant digit first."""
    number = int.from_bytes(data, "little")
    return "".join(NIX32_ALPHABET[number >> 5 * k & 31] for k in range(nix32_length(len(data)) - 1, -1, -1))


def nix32_decode(text: str, size: int) -> bytes:
    """The `size` bytes that `text` spells.

    Raises NixError for another length, a character outside the alphabet, or bits beyond the last byte
    (else one digest would have several spellings).
    """
    if len(text) != nix32_length(size):
        raise NixError(f"a nix32 hash of {size} bytes has {nix32_length(size)} digits, not {len(text)}")
    number = 0
    for character in text:
        value = _NIX32_VALUES.get(character)
        if value is None:
            raise NixError(f"{character!r} is not a nix32 digit")
        number = number << 5 | value
    if number >> 8 * size:
        raise NixError("the first digit of a nix32 hash is too large")
    return number.to_bytes(size, "little")


def parse_hash(text: str) -> tuple[str, bytes]:
    """`(algorithm, digest)` of any spelling of an algorithm in `DIGEST_SIZES`. Raises NixError."""
    algorithm, separator, value = text.partition(":")
    sri = not separator
    if sri:
        algorithm, separator, value = text.partition("-")
    size = DIGEST_SIZES.get(algorithm)
    if not separator or size is None:
        raise NixError(f"{text[:80]!r} is not a hash: it must start with an algorithm such as 'sha256:'")
    if sri or len(value) == _base64_length(size):
        return algorithm, _base64_decode(value, size)
    if len(value) == 2 * size:
        return algorithm, _base16_decode(value)
    if len(value) == nix32_length(size):
        return algorithm, nix32_decode(value, size)
    raise NixError(f"a {algorithm} hash cannot have {len(value)} characters")


def parse_sha256(text: str) -> bytes:
    """The 32 bytes of a SHA-256 in any spelling. Raises NixError, also for another algorithm."""
    algorithm, digest = parse_hash(text)
    if algorithm != "sha256":
        raise NixError(f"a sha256 hash is needed here, not {algorithm}")
    return digest


def format_hash(algorithm: str, digest: bytes, spelling: Spelling = "base32") -> str:
    """`digest` with its prefix. `base32` is what Nix writes into narinfo and store databases."""
    if len(digest) != DIGEST_SIZES[algorithm]:
        raise ValueError(f"a {algorithm} digest has {DIGEST_SIZES[algorithm]} bytes, not {len(digest)}")
    match spelling:
        case "base16":
            return f"{algorithm}:{digest.hex()}"
        case "base32":
            return f"{algorithm}:{nix32_encode(digest)}"
        case "base64":
            return f"{algorithm}:{base64.b64encode(digest).decode()}"
        case "sri":
            return f"{algorithm}-{base64.b64encode(digest).decode()}"


def format_sha256(digest: bytes, spelling: Spelling = "base32") -> str:
    """The 32 bytes of a SHA-256 with their prefix, in one of the four spellings."""
    return format_hash("sha256", digest, spelling)


def _base64_length(size: int) -> int:
    return (size + 2) // 3 * 4


def _base64_decode(value: str, size: int) -> bytes:
    try:
        digest = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):  # ValueError: a character beyond ASCII
        raise NixError(f"{value[:100]!r} is not base 64") from None
    # Encoding again catches unused bits that are not zero, and a length that is not the algorithm's.
    if len(digest) != size or base64.b64encode(digest).decode() != value:
        raise NixError(f"{value[:100]!r} is not the base 64 of {size} bytes")
    return digest


def _base16_decode(value: str) -> bytes:
    # bytes.fromhex skips blanks, so a string of the right length could give fewer bytes.
    if not set(value) <= set("0123456789abcdefABCDEF"):
        raise NixError(f"{value[:130]!r} is not base 16")
    return bytes.fromhex(value)

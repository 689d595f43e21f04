"""What is asked for: the paths of a binary cache, and byte ranges. Pure; everything not listed here is not there.

No path of a request ever becomes a path of a file: a route is a kind and a hash, and nothing else is recognised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from p2pnode.errors import NixError
from p2pnode.nix.hashes import NIX32_ALPHABET, nix32_decode, nix32_encode

MAX_TARGET = 2048

_PATH = re.compile(
    rf"/(?:(?P<info>nix-cache-info)|(?P<part>[{NIX32_ALPHABET}]{{32}})\.narinfo"
    rf"|nar/(?P<nar>[{NIX32_ALPHABET}]{{52}})\.nar(?P<zst>\.zst)?)"
)
_AUTHORITY = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class Kind(Enum):
    CACHE_INFO = "nix-cache-info"
    NARINFO = "narinfo"
    NAR = "nar"
    NAR_ZSTD = "nar.zst"


@dataclass(frozen=True, slots=True)
class Route:
    """`key`: the 20 bytes of a hash part, or the 32 of a NAR hash."""

    kind: Kind
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `stop` (exclusive) of a body."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Unsatisfiable(Exception):
    """A range that lies behind the end."""


def route(target: str) -> Route | None:
    """What the target of a request line asks for; None: nothing that a binary cache has."""
    if len(target) > MAX_TARGET:
        return None
    path = _AUTHORITY.sub("", target, count=1).partition("?")[0]
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    try:
        if match["info"]:
            return Route(Kind.CACHE_INFO)
        if match["part"]:
            return Route(Kind.NARINFO, nix32_decode(match["part"], 20))
        return Route(Kind.NAR_ZSTD if match["zst"] else Kind.NAR, nix32_decode(match["nar"], 32))
    except NixError:  # a first digit with bits that no hash of 32 bytes has
        return None


def nar_url(nar_hash: bytes, *, zstd: bool) -> str:
    """The URL of a NAR relative to the cache, as `route` reads it."""
    return f"nar/{nix32_encode(nar_hash)}.nar{'.zst' if zstd else ''}"


def span(header: str | None, size: int) -> Span | None:
    """The one range that a Range header asks for (RFC 9110, 14.2); None: the whole, as for all forms not understood.

    Raises Unsatisfiable.
    """
    match = None if header is None else _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = int(match[2])
        if not length or not size:
            raise Unsatisfiable
        return Span(max(0, size - length), size)
    start = int(match[1])
    if match[2] and int(match[2]) < start:
        return None  # not a valid range at all
    if start >= size:
        raise Unsatisfiable
    return Span(start, min(size, int(match[2]) + 1) if match[2] else size)


def matches(header: str | None, tag: str) -> bool:
    """Whether an If-None-Match header names the entity tag `tag`, quotes included (RFC 9110, 13.1.2)."""
    if header is None:
        return False
    return any(each.strip().removeprefix("W/") in (tag, "*") for each in header.split(","))

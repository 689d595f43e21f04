"""narinfo: what a binary cache says about one store path. Read as strictly as new Nix, written as Nix writes it.

Source: libstore/nar-info.cc of Nix 2.36. Lines `Key: value`; the order is free and unknown keys are skipped. Where Nix
lets the last of two equal lines win we refuse, for two readers of one text must not see two paths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from p2pnode.errors import NarInfoError, NixError
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.hashes import format_hash, format_sha256, parse_hash, parse_sha256
from p2pnode.nix.nar_format import MAX_SIZE
from p2pnode.nix.signatures import Signature, SignedInfo
from p2pnode.nix.storepath import ContentAddress, StorePath

MAX_NARINFO = 1 << 20
"""Bytes of a narinfo. The largest in nixpkgs have some hundred references of 60 bytes; this is room for 17,000."""

MAX_SIGNATURES = 64
"""Sig lines. Caches of today have one or two; each one of a trusted name costs 0.1 ms to check."""

UNKNOWN_DERIVER = "unknown-deriver"
DEFAULT_COMPRESSION = "bzip2"  # what a narinfo of 2010 without the field meant, and still means

_LINE = re.compile(r"([!-9;-~]+): (.*)")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")  # a CR above all: it would become part of a value
_URL = re.compile(r"[!-~]{1,4096}")
_COMPRESSION = re.compile(r"[0-9a-z-]{1,32}")
_ONCE = frozenset(
    (
        *("StorePath", "URL", "Compression", "FileHash", "FileSize", "NarHash", "NarSize"),
        *("References", "Deriver", "CA", "IpfsCid"),
    )
)
"""Known keys, each of which may stand there once; Sig may stand there often."""


@dataclass(frozen=True, slots=True)
class NarInfo:
    """One narinfo. `info.ca` and `signatures` are what the cache claims: `trust.judge` checks them.

    `url`: of the compressed NAR, relative to the cache's root or absolute. `compression`: as the cache names it; known
    or not is the reader's business. `file_hash`: algorithm and digest of the compressed file, `file_size` its bytes;
    both unsigned and optional. `ipfs_cid`: of the NAR's own DAG, a field of ours that Nix skips as unknown.
    """

    info: PathInfo
    signatures: tuple[Signature, ...]
    url: str
    compression: str
    file_hash: tuple[str, bytes] | None = None
    file_size: int | None = None
    ipfs_cid: str | None = None

    @property
    def signed(self) -> SignedInfo:
        """The path alone, without where this cache keeps it."""
        return SignedInfo(self.info, self.signatures)

    def format(self) -> str:
        """The text, in the order in which Nix writes it."""
        info = self.info
        lines = [f"StorePath: {info.path}", f"URL: {self.url}", f"Compression: {self.compression}"]
        if self.file_hash is not None:
            lines.append(f"FileHash: {format_hash(*self.file_hash)}")
        if self.file_size is not None:
            lines.append(f"FileSize: {self.file_size}")
        lines += [
            f"NarHash: {format_sha256(info.nar_hash)}",
            f"NarSize: {info.nar_size}",
            f"References: {' '.join(path.base_name for path in sorted(set(info.references)))}",
        ]
        if info.deriver is not None:
            lines.append(f"Deriver: {info.deriver.base_name}")
        lines += [f"Sig: {signature}" for signature in self.signatures]
        if info.ca is not None:
            lines.append(f"CA: {info.ca}")
        if self.ipfs_cid is not None:
            lines.append(f"IpfsCid: {self.ipfs_cid}")
        return "".join(line + "\n" for line in lines)


def parse(text: bytes | str, *, expect: StorePath | str | None = None) -> NarInfo:
    """Read a narinfo. `expect`: the path, or the 32 digits of its hash part, that was asked for.

    Raises NarInfoError for everything new Nix refuses, for two lines of one key, and for another path than expected.
    """
    if len(text) > MAX_NARINFO:
        raise NarInfoError(f"a narinfo of {len(text)} bytes is larger than any can be ({MAX_NARINFO})")
    try:
        if isinstance(text, bytes):
            text = text.decode()
        narinfo = _parse(text)
    except UnicodeDecodeError:
        raise NarInfoError("a narinfo is not UTF-8 text") from None
    except NarInfoError:
        raise
    except NixError as error:  # from a hash, a path, a signature
        raise NarInfoError(f"not a valid narinfo: {error}") from None
    path = narinfo.info.path
    if (isinstance(expect, StorePath) and path != expect) or (isinstance(expect, str) and path.digest != expect):
        raise NarInfoError(f"a narinfo for {expect} was asked for, and one for {path} came")
    return narinfo


def _parse(text: str) -> NarInfo:
    fields, signatures = _fields(text)
    for key in ("StorePath", "URL", "NarHash", "NarSize"):
        if key not in fields:
            raise NarInfoError(f"not a valid narinfo: it has no {key}")
    url = fields["URL"]
    if not _URL.fullmatch(url):
        raise NarInfoError(f"not a valid narinfo: {url[:100]!r} is not a URL")
    compression = fields.get("Compression") or DEFAULT_COMPRESSION
    if not _COMPRESSION.fullmatch(compression):
        raise NarInfoError(f"not a valid narinfo: {compression[:50]!r} is not the name of a compression")
    nar_size = _number(fields["NarSize"], "NarSize")
    if nar_size == 0:
        raise NarInfoError("not a valid narinfo: NarSize is 0")
    deriver = fields.get("Deriver", "")
    ca = fields.get("CA", "")
    info = PathInfo(
        path=StorePath.parse(fields["StorePath"]),
        nar_hash=parse_sha256(fields["NarHash"]),
        nar_size=nar_size,
        references=tuple(sorted({StorePath.from_base_name(name) for name in _words(fields.get("References", ""))})),
        deriver=StorePath.from_base_name(deriver) if deriver not in ("", UNKNOWN_DERIVER) else None,
        ca=str(ContentAddress.parse(ca)) if ca else None,
    )
    return NarInfo(
        info=info,
        signatures=tuple(map(Signature.parse, signatures)),
        url=url,
        compression=compression,
        file_hash=parse_hash(fields["FileHash"]) if "FileHash" in fields else None,
        file_size=_number(fields["FileSize"], "FileSize") if "FileSize" in fields else None,
        ipfs_cid=fields.get("IpfsCid") or None,
    )


def _words(text: str) -> list[str]:
    """What blanks separate. `str.split` would split at blanks beyond ASCII too, which Nix does not."""
    return [word for word in text.split(" ") if word]


def _fields(text: str) -> tuple[dict[str, str], list[str]]:
    """The known keys that stand there once, and the Sig lines."""
    if not text.endswith("\n"):
        raise NarInfoError("not a valid narinfo: it is empty, or its last line has no end")
    if _CONTROL.search(text):
        raise NarInfoError("not a valid narinfo: there is a control character in it")
    fields: dict[str, str] = {}
    signatures: list[str] = []
    for line in text[:-1].split("\n"):
        match = _LINE.fullmatch(line)
        if match is None:
            raise NarInfoError(f"not a valid narinfo: {line[:100]!r} is not 'Key: value'")
        key, value = match.groups()
        if key == "Sig":
            if len(signatures) == MAX_SIGNATURES:
                raise NarInfoError(f"a narinfo with more than {MAX_SIGNATURES} signatures is not read")
            signatures.append(value)
        elif key in _ONCE:
            if key in fields:
                raise NarInfoError(f"not a valid narinfo: it has two lines {key}")
            fields[key] = value
    return fields, signatures


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19) or int(text) > MAX_SIZE:
        raise NarInfoError(f"not a valid narinfo: {text[:40]!r} is not a {what}")
    return int(text)

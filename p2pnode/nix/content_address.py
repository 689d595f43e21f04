"""Whether contents are those that a `ca` field promises: the proof of a path that needs no signature.

Source: libstore/content-address.cc and libstore/local-store.cc (`hashCAPath`), libutil/references.cc
(`HashModuloSink`) of Nix 2.8 and 2.36. A path proves itself in two steps: `ca`, name and references give its digest
(`names_path`, no contents needed), and the contents give the hash in `ca` (`ContentCheck`, while they stream past).
"""

from __future__ import annotations

import hashlib
from array import array

from p2pnode.errors import NarError, NixError, VerificationFailed
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.nar_reader import Buffer, NarReader
from p2pnode.nix.storepath import (
    DIGEST_DIGITS,
    CAMethod,
    ContentAddress,
    make_fixed_output_path,
    make_text_path,
)


def names_path(info: PathInfo) -> bool:
    """Whether `info.ca`, name and references give exactly `info.path`; False without a `ca`.

    Raises nothing: a `ca` that cannot be read or cannot have these references proves nothing.
    """
    if info.ca is None:
        return False
    others = [path for path in info.references if path != info.path]
    self_reference = len(others) != len(info.references)
    try:
        address = ContentAddress.parse(info.ca)
        if address.method is CAMethod.TEXT:
            return not self_reference and make_text_path(address.digest, info.path.name, others) == info.path
        return make_fixed_output_path(address, info.path.name, others, self_reference=self_reference) == info.path
    except NixError:
        return False


def proved_by_nar_hash(info: PathInfo) -> bool:
    """Whether the path is proved as soon as its NAR has `info.nar_hash`: true of `fixed:r:sha256` without a self
    reference, where `ca` is the NAR's hash; all others need a `ContentCheck`."""
    if info.ca is None or info.path in info.references or not names_path(info):
        return False
    address = ContentAddress.parse(info.ca)
    return address.method is CAMethod.RECURSIVE and address.algorithm == "sha256" and address.digest == info.nar_hash


def check_beside_nar_hash(info: PathInfo) -> ContentCheck | None:
    """What the NAR of a path must be fed to besides the hash that gives `info.nar_hash`; None if that is all."""
    return ContentCheck(info) if names_path(info) and not proved_by_nar_hash(info) else None


class ContentCheck:
    """Compares a NAR with the `ca` of its path. Feed it all of the NAR, then call `finish`."""

    def __init__(self, info: PathInfo) -> None:
        """Raises VerificationFailed if `ca` does not give the path in the first place."""
        if info.ca is None or not names_path(info):
            raise VerificationFailed(f"{info.path} is not the path that its content address gives")
        self._path = info.path
        address = self._address = ContentAddress.parse(info.ca)
        self._contents: _FileContents | None = None
        self._modulo: _HashModulo | None = None
        self._hash = hashlib.new(address.algorithm, usedforsecurity=False)
        if address.method is not CAMethod.RECURSIVE:
            self._contents = _FileContents(address.algorithm)
            self._reader = NarReader(self._contents)
        elif info.path in info.references:
            self._modulo = _HashModulo(address.algorithm, info.path.digest.encode())

    def feed(self, data: Buffer) -> None:
        """Take the next bytes of the NAR. Raises NarError where the NAR must be that of one plain file and is not."""
        if self._contents is not None:
            self._reader.feed(data)
        elif self._modulo is not None:
            self._modulo.feed(data)
        else:
            self._hash.update(data)

    def finish(self) -> None:
        """Say that the NAR has ended. Raises VerificationFailed unless the contents are those of `ca`."""
        if self._contents is not None:
            self._reader.close()
            digests = {self._contents.hash.digest()}
        elif self._modulo is not None:
            digests = self._modulo.digests()
        else:
            digests = {self._hash.digest()}
        if self._address.digest not in digests:
            raise VerificationFailed(f"the contents of {self._path} are not those of its content address")


class _FileContents:
    """NarVisitor: hashes the contents of the one plain file that the NAR has to be."""

    def __init__(self, algorithm: str) -> None:
        self.hash = hashlib.new(algorithm, usedforsecurity=False)

    def enter_directory(self, name: bytes) -> None:
        raise NarError("a directory cannot have a flat content address")

    def leave_directory(self) -> None:
        raise NarError("a directory cannot have a flat content address")

    def begin_file(self, name: bytes, executable: bool, size: int) -> None:
        if executable:  # the x bit is in the NAR only, so a flat hash would not prove it
            raise NarError("an executable file cannot have a flat content address")

    def file_contents(self, data: memoryview) -> None:
        self.hash.update(data)

    def end_file(self) -> None:
        pass

    def symlink(self, name: bytes, target: bytes) -> None:
        raise NarError("a symlink cannot have a flat content address")


class _HashModulo:
    """The hash of a stream in which every occurrence of `needle` stands as NUL bytes."""

    def __init__(self, algorithm: str, needle: bytes) -> None:
        assert len(needle) == DIGEST_DIGITS
        self._hash = hashlib.new(algorithm, usedforsecurity=False)
        self._needle = needle
        self._tail = b""  # may begin an occurrence; shorter than the needle
        self._at = 0  # offset of the tail in the stream
        self._offsets = array("Q")  # at most one per 32 bytes of NAR, in practice a few thousand

    def feed(self, data: Buffer) -> None:
        window = self._tail + bytes(data)
        size = len(self._needle)
        found = window.find(self._needle)
        at = 0
        while found >= 0:
            self._hash.update(window[at:found])
            self._hash.update(bytes(size))
            self._offsets.append(self._at + found)
            at = found + size
            found = window.find(self._needle, at)
        keep = max(at, len(window) - size + 1)
        self._hash.update(window[at:keep])
        self._tail = window[keep:]
        self._at += keep

    def digests(self) -> set[bytes]:
        """With the offsets after the stream, as Nix up to 2.16 and from 2.35 has it, and without, as those between."""
        plain = self._hash.copy()
        plain.update(self._tail)
        suffixed = plain.copy()
        for offset in self._offsets:
            suffixed.update(b"|%d" % offset)
        return {plain.digest(), suffixed.digest()}

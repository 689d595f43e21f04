"""Writing a `file://` binary cache: a directory from which any Nix can substitute, signed by whoever makes it.

Layout, as Nix itself writes it: `nix-cache-info`, `HASHPART.narinfo`, `nar/FILEHASH.nar[.zst]`. A NAR gets its name
only when it is complete and has the hash it should, and its narinfo comes after it; so a reader sees all of a path or
nothing, whenever the writer is stopped, and writing again completes what is missing. Blocking calls: for worker
threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import trio
import zstandard

from p2pnode.errors import NarInfoError, OutputExists, VerificationFailed
from p2pnode.nix.cli import PathInfo, topological_order
from p2pnode.nix.daemon import OpenNar
from p2pnode.nix.hashes import nix32_encode
from p2pnode.nix.nar_format import write_error
from p2pnode.nix.nar_reader import Buffer, NarHasher
from p2pnode.nix.narinfo import MAX_NARINFO, NarInfo, parse
from p2pnode.nix.signatures import SecretKey, SignedInfo, merged
from p2pnode.nix.storepath import STORE_DIR, StorePath

Compression = Literal["none", "zstd"]

CACHE_INFO = "nix-cache-info"
DEFAULT_PRIORITY = 30
"""Smaller is asked first; cache.nixos.org says 40, and a directory of one's own is nearer than that."""

ZSTD_LEVEL = 3  # zstd's own default: 300 MB/s a core, and of the size that xz makes some 20 % more

STALE_AGE = 24 * 3600.0
"""Seconds after which an unfinished file counts as left behind by a writer that was killed."""

_SUFFIX = {"none": ".nar", "zstd": ".nar.zst"}
_TEMPORARY = ".tmp-"
_OURS = re.compile(r"\.tmp-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What an export did. `present` were there before (their signatures may have been added to)."""

    added: tuple[StorePath, ...]
    present: tuple[StorePath, ...]
    nar_bytes: int
    file_bytes: int


class CacheDir:
    """A binary cache in the directory `path`, which is made if it is not there.

    `compression` is of what is written from now on; what is there stays as it is. `keys` sign every path that is
    written or found. Raises OutputUnwritable, DiskFull; OutputExists if the directory is the cache of another store.
    """

    def __init__(
        self,
        path: Path,
        *,
        compression: Compression = "zstd",
        keys: Sequence[SecretKey] = (),
        priority: int = DEFAULT_PRIORITY,
    ) -> None:
        self.path = path
        self._compression = compression
        self._keys = tuple(keys)
        try:
            (path / "nar").mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            with contextlib.suppress(FileNotFoundError):
                self._check((path / CACHE_INFO).read_bytes()[:MAX_NARINFO])
                return
        except OSError as error:
            raise write_error(os.fsencode(path), error) from error
        self._replace(CACHE_INFO, f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: {priority}\n")

    def narinfo(self, path: StorePath) -> NarInfo | None:
        """What the cache says about `path`; None if it does not hold it whole, or what it says makes no sense."""
        try:
            with (self.path / f"{path.digest}.narinfo").open("rb") as file:
                narinfo = parse(file.read(MAX_NARINFO + 1), expect=path)
            status = (self.path / narinfo.url).stat()
        except (OSError, NarInfoError):
            return None
        # Files are not synced one by one, so after a power failure a NAR may be there by name and empty.
        complete = stat.S_ISREG(status.st_mode) and status.st_size == narinfo.file_size
        return narinfo if complete else None

    def holds(self, info: PathInfo, *, references: bool = True) -> bool:
        """Whether the path is there, so that `begin` would not ask for its NAR; its references count if `references`.

        Raises OutputExists if something else is there under its name.
        """
        return self._present(info, references=references) is not None

    def _present(self, info: PathInfo, *, references: bool = True) -> NarInfo | None:
        present = self.narinfo(info.path)
        if present is None:
            return None
        there = present.info
        if (there.nar_hash, there.nar_size) != (info.nar_hash, info.nar_size):
            other = "contents"
        elif references and set(there.references) != set(info.references):
            other = "references"
        else:
            return present
        # Readers may have the old narinfo still; and who put it there is not known, so its words are not signed.
        raise OutputExists(
            f"{self.path} holds {info.path} with other {other}; remove {info.path.digest}.narinfo there first"
        )

    def begin(self, signed: SignedInfo) -> CacheEntry | None:
        """Start writing a path; None if it is there already, its signatures completed.

        Raises OutputExists if other contents or references are there under its name.
        """
        present = self._present(signed.info)
        if present is None:
            return CacheEntry(self, signed)
        signatures = merged(present.signatures, signed.signatures, (key.sign(present.info) for key in self._keys))
        if set(signatures) != set(present.signatures):
            complete = NarInfo(
                present.info, signatures, present.url, present.compression, present.file_hash, present.file_size
            )
            self._replace(f"{present.info.path.digest}.narinfo", complete.format())
        return None

    def _check(self, said: bytes) -> None:
        for line in said.decode("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key == "StoreDir" and value.strip() != STORE_DIR:
                raise OutputExists(f"{self.path} is a cache of the store {value.strip()[:200]!r}, not of {STORE_DIR}")

    def _remove_stale(self) -> None:
        for place in (self.path, self.path / "nar"):
            for entry in os.scandir(place):
                if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_AGE:
                            os.unlink(entry.path)

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            try:
                temporary.write_text(text)
                temporary.rename(self.path / name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise write_error(os.fsencode(self.path / name), error) from error


class CacheEntry:
    """One path being written. Feed it the NAR, then call `finish`; as a context manager it aborts unless that was
    reached. Made by `CacheDir.begin`."""

    def __init__(self, cache: CacheDir, signed: SignedInfo) -> None:
        self._cache = cache
        self._signed = signed
        self._nar = NarHasher()
        self._file_hash = hashlib.sha256()
        self._file_size = 0
        self._compressor = (
            zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj() if cache._compression == "zstd" else None
        )
        self._temporary = cache.path / "nar" / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            self._file = self._temporary.open("xb", buffering=0)
        except OSError as error:
            raise write_error(os.fsencode(self._temporary), error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def feed(self, data: Buffer) -> None:
        """Take the next bytes of the NAR. Raises VerificationFailed (too many), OutputUnwritable, DiskFull."""
        self._nar.feed(data)
        if self._nar.size > self._signed.info.nar_size:
            raise VerificationFailed(f"the NAR of {self._signed.info.path} is longer than it should be")
        self._write(data if self._compressor is None else self._compressor.compress(data))

    def finish(self) -> NarInfo:
        """Put the path into the cache. Raises VerificationFailed if the NAR is not the one it should be."""
        info = self._signed.info
        if self._nar.size != info.nar_size or self._nar.digest() != info.nar_hash:
            raise VerificationFailed(f"the NAR of {info.path} does not have the hash that it should have")
        if self._compressor is not None:
            self._write(self._compressor.flush())
        digest = self._file_hash.digest()
        compression = self._cache._compression
        url = f"nar/{nix32_encode(digest)}{_SUFFIX[compression]}"
        signatures = merged(self._signed.signatures, (key.sign(info) for key in self._cache._keys))
        narinfo = NarInfo(info, signatures, url, compression, ("sha256", digest), self._file_size)
        try:
            self._file.close()
            self._temporary.rename(self._cache.path / url)
        except OSError as error:
            raise write_error(os.fsencode(self._cache.path / url), error) from error
        self._cache._replace(f"{info.path.digest}.narinfo", narinfo.format())
        return narinfo

    def abort(self) -> None:
        """Leave nothing behind; after `finish`, do nothing."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: Buffer) -> None:
        self._file_hash.update(data)
        view = memoryview(data)
        self._file_size += view.nbytes
        try:
            while view.nbytes:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise write_error(os.fsencode(self._temporary), error) from error


async def to_cache(
    cache: CacheDir,
    paths: Iterable[SignedInfo],
    open_nar: OpenNar,
    *,
    added: Callable[[NarInfo], None] = lambda narinfo: None,
) -> CacheReport:
    """Write `paths`, references first, so that a reader who sees a path can have what it needs.

    NARs of paths that are there already are not opened. Raises what `CacheDir.begin`, `CacheEntry` and `open_nar`
    raise; paths before the one at fault are in the cache. NixError for references that go in a circle.
    """
    signed = {each.info.path: each for each in paths}
    written: list[NarInfo] = []
    present: list[StorePath] = []
    for info in topological_order(each.info for each in signed.values()):
        entry = await trio.to_thread.run_sync(cache.begin, signed[info.path])
        if entry is None:
            present.append(info.path)
            continue
        with entry:
            async with aclosing(open_nar(info)) as pieces:
                async for piece in pieces:
                    await trio.to_thread.run_sync(entry.feed, piece)
            narinfo = await trio.to_thread.run_sync(entry.finish)
        written.append(narinfo)
        added(narinfo)
    return CacheReport(
        added=tuple(narinfo.info.path for narinfo in written),
        present=tuple(present),
        nar_bytes=sum(narinfo.info.nar_size for narinfo in written),
        file_bytes=sum(narinfo.file_size or 0 for narinfo in written),
    )

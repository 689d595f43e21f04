"""What a Nix store knows about its paths, asked through the `nix-store` command.

Only output that has been stable since Nix 2.0 is used (`-q`, `--dump-db`); no experimental command. Works on the
machine's store and on a chroot store (`--store DIR`, whose paths lie in DIR/nix/store but are named /nix/store/...).
Blocking calls: for worker threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pnode.errors import NixError, NixMissing, PathError
from p2pnode.nix.hashes import parse_sha256
from p2pnode.nix.nar_format import MAX_SIZE
from p2pnode.nix.storepath import STORE_DIR, StorePath, infer_ca

QUERY_TIMEOUT = 120.0
"""Seconds for one command. A closure of 20,000 paths takes about one; a store locked by a garbage collector, more."""

BATCH = 5000
"""Paths per command line: some 400 KB, well within the 2 MiB that Linux allows for arguments."""

FLAT_CA_LIMIT = 1 << 20
"""Bytes of a single-file path up to which its contents are hashed to find its `ca`; derivations and texts are small."""

_FALLBACK_DIRECTORIES = ("/nix/var/nix/profiles/default/bin", "/run/current-system/sw/bin")


@dataclass(frozen=True, slots=True)
class PathInfo:
    """One valid path. `nar_hash`: 32 bytes of SHA-256. `references` are sorted and include the path itself if it does.

    `ca` is the content address that the path is *proved* by (`storepath.infer_ca`), the same on every machine; None
    for input-addressed paths, and for content-addressed ones that refer to themselves, use other hashes than SHA-256,
    or are a flat file beyond `FLAT_CA_LIMIT`.
    """

    path: StorePath
    nar_hash: bytes
    nar_size: int
    references: tuple[StorePath, ...]
    deriver: StorePath | None
    ca: str | None


def find_nix_store() -> str:
    """Full path of the `nix-store` command. Raises NixMissing.

    Services often run with a PATH that lacks Nix, so its usual places are tried too.
    """
    found = shutil.which("nix-store") or shutil.which("nix-store", path=os.pathsep.join(_FALLBACK_DIRECTORIES))
    if found is None:
        raise NixMissing(
            "store paths and closures need Nix, and no nix-store command was found in PATH; "
            "install Nix, or provide a file or directory instead"
        )
    return found


class NixStore:
    """A Nix store. `store_root`: directory of a chroot store; None is the machine's own store.

    Every method raises NixError, with Nix's own first line, when the command fails, prints what it should not, or
    takes longer than `timeout` seconds.
    """

    def __init__(self, store_root: str | os.PathLike[str] | None = None, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Raises NixMissing; PathError if `store_root` holds no store (nix-store would make an empty one there)."""
        self._timeout = timeout
        self._root: Path | None = None
        self._command = [find_nix_store()]
        if store_root is not None:
            self._root = Path(store_root).absolute()
            if not (self._root / "nix/var/nix/db").is_dir():
                raise PathError(f"{self._root} is not a Nix store: there is no nix/var/nix/db in it")
            self._command += ["--store", str(self._root)]

    def real_path(self, path: StorePath | str) -> Path:
        """Where the contents of a store path lie on this machine's file system."""
        base_name = _parse(path).base_name
        if self._root is None:
            return Path(STORE_DIR, base_name)
        return self._root.joinpath(STORE_DIR.lstrip("/"), base_name)

    def requisites(self, path: StorePath | str) -> list[StorePath]:
        """The closure: `path` and all it refers to, directly or not; references before those who refer to them."""
        return _parse_lines(self._query("--requisites", path))

    def references(self, path: StorePath | str) -> list[StorePath]:
        """What `path` refers to directly, itself included if it does."""
        return _parse_lines(self._query("--references", path))

    def nar_hash(self, path: StorePath | str) -> bytes:
        """The registered SHA-256 of the path's NAR, 32 bytes."""
        return parse_sha256(_one_line(self._query("--hash", path)))

    def nar_size(self, path: StorePath | str) -> int:
        """The registered size of the path's NAR in bytes."""
        return _parse_number(_one_line(self._query("--size", path)), "size")

    def deriver(self, path: StorePath | str) -> StorePath | None:
        """The derivation that built the path, if the store knows it."""
        line = _one_line(self._query("--deriver", path))
        return None if line == "unknown-deriver" else StorePath.parse(line)

    def path_info(self, paths: Iterable[StorePath | str]) -> list[PathInfo]:
        """What is registered about each of `paths`, in their order; one command per `BATCH` paths.

        Raises NixError if one of them is not valid in this store.
        """
        wanted = [_parse(path) for path in paths]
        found: dict[StorePath, PathInfo] = {}
        distinct = list(dict.fromkeys(wanted))
        for start in range(0, len(distinct), BATCH):
            for info in parse_dump_db(self._run("--dump-db", *map(str, distinct[start : start + BATCH]))):
                found[info.path] = self._with_ca(info)
        for path in wanted:
            if path not in found:
                raise NixError(f"{path} is not a valid path of this Nix store")
        return [found[path] for path in wanted]

    def _with_ca(self, info: PathInfo) -> PathInfo:
        address = infer_ca(info.path, info.nar_hash, info.references, self._flat_hash(info))
        if address is None:
            return info
        return PathInfo(info.path, info.nar_hash, info.nar_size, info.references, info.deriver, str(address))

    def _flat_hash(self, info: PathInfo) -> bytes | None:
        """SHA-256 of the contents, if the path is one small file that is not executable."""
        if info.nar_size > FLAT_CA_LIMIT:
            return None
        try:
            fd = os.open(self.real_path(info.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                mode = os.fstat(fd).st_mode
                if not stat.S_ISREG(mode) or mode & stat.S_IXUSR:
                    return None
                with open(fd, "rb", closefd=False) as file:  # closes nothing if it fails, so the fd stays ours
                    data = file.read(FLAT_CA_LIMIT)
            finally:
                os.close(fd)
        except OSError:  # a symlink; or gone or unreadable: then reading the path itself will say so
            return None
        return hashlib.sha256(data).digest()

    def _query(self, option: str, path: StorePath | str) -> str:
        # Parsed first: only well-formed store paths reach the command line, so none is taken for an option.
        return self._run("--query", option, str(_parse(path)))

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NixError(
                f"nix-store {arguments[0]} gave no answer within {self._timeout:g} s; is the store locked?"
            ) from None
        except OSError as error:
            raise NixError(f"{self._command[0]} could not be started: {error.strerror}") from error
        if done.returncode:
            raise NixError(_first_error(done.stderr.decode("utf-8", "replace"), done.returncode))
        try:
            return done.stdout.decode("ascii")
        except UnicodeDecodeError:
            raise NixError(f"nix-store {arguments[0]} printed something that is not ASCII") from None


def parse_dump_db(text: str) -> list[PathInfo]:
    """Read the output of `nix-store --dump-db`; `ca` is None in all. Raises NixError.

    Per path, one line each: path, SHA-256 in base 16, NAR size, deriver or nothing, number of references, references.
    """
    lines = iter(text.split("\n"))
    found: list[PathInfo] = []
    for line in lines:
        if not line:
            break
        path = StorePath.parse(line)
        digest = parse_sha256("sha256:" + _next(lines))
        size = _parse_number(_next(lines), "size")
        deriver = _next(lines)
        count = _parse_number(_next(lines), "number of references")
        references = tuple(sorted(StorePath.parse(_next(lines)) for _ in range(count)))
        found.append(PathInfo(path, digest, size, references, StorePath.parse(deriver) if deriver else None, None))
    if (text and not text.endswith("\n")) or next(lines, None) is not None:
        raise NixError("nix-store --dump-db printed an incomplete or unknown text")
    return found


def topological_order(infos: Iterable[PathInfo]) -> list[PathInfo]:
    """References before those who refer to them, ties by path: one order for one closure, on every machine.

    References to paths that are not among `infos`, and to oneself, count for nothing. Raises NixError on a cycle.
    """
    remaining = {info.path: info for info in sorted(infos, key=lambda info: info.path)}
    ordered: dict[StorePath, PathInfo] = {}
    entered: set[StorePath] = set()
    # Depth first with a stack of our own: a chain of references may be longer than Python's recursion limit.
    for start in remaining:
        stack: list[tuple[PathInfo, Iterator[StorePath]]] = []
        following: StorePath | None = start
        while following is not None or stack:
            if following is not None:
                entered.add(following)
                info = remaining[following]
                stack.append((info, iter(sorted(info.references))))
                following = None
            info, references = stack[-1]
            for reference in references:
                if reference == info.path or reference not in remaining or reference in ordered:
                    continue
                if reference in entered:
                    raise NixError(f"{reference} refers to itself by way of {info.path}")
                following = reference
                break
            else:
                stack.pop()
                ordered[info.path] = info
    return list(ordered.values())


def _parse(path: StorePath | str) -> StorePath:
    return path if isinstance(path, StorePath) else StorePath.parse(path)


def _parse_lines(text: str) -> list[StorePath]:
    return [StorePath.parse(line) for line in text.splitlines()]


def _one_line(text: str) -> str:
    lines: Sequence[str] = text.splitlines()
    if len(lines) != 1:
        raise NixError(f"nix-store printed {len(lines)} lines where one was expected")
    return lines[0]


def _next(lines: Iterator[str]) -> str:
    line = next(lines, None)
    if line is None:
        raise NixError("nix-store --dump-db printed an incomplete text")
    return line


def _parse_number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19) or int(text) > MAX_SIZE:
        raise NixError(f"nix-store printed {text[:40]!r} as the {what} of a path")
    return int(text)


def _first_error(stderr: str, status: int) -> str:
    """Nix's own sentence: its first `error:` line, or failing that its first line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    line = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "")
    return f"nix-store: {line.removeprefix('error:').strip()}" if line else f"nix-store failed with status {status}"

"""Content to swarm, and comparing what arrived with the original, without a line of the code under test."""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import stat
from pathlib import Path

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


def parse_size(text: str) -> int:
    """Bytes, of "64M", "1.5GiB", "4096". Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is not a size such as 64M")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_rate(text: str) -> float:
    """Bytes per second, of tc's "100mbit". Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is not a rate such as 100mbit")
    return float(found[1]) * _BITS[found[2].lower()] / 8


def write_random(path: Path, size: int, seed: str = "p2pnode") -> None:
    """A file of `size` bytes that look random and are the same each time: SHAKE-256 of `seed` and a block number."""
    block = 1 << 20
    with path.open("wb") as file:
        for number, start in enumerate(range(0, size, block)):
            file.write(hashlib.shake_256(f"{seed} {number}".encode()).digest(min(block, size - start)))


def difference(original: Path, copy: Path) -> str | None:
    """The first difference between two files or trees in what a NAR keeps (bytes, x bit, links), or None.

    Of a single plain file only the bytes count: an image of kind `file` keeps no mode.
    """
    if original.is_file() and not original.is_symlink():
        if not copy.is_file():
            return f"{copy} is not a file"
        return None if filecmp.cmp(original, copy, shallow=False) else f"{copy} differs from {original}"
    pending = [(original, copy)]
    while pending:
        here, there = pending.pop()
        found = _difference(here, there)
        if found is not None:
            return found
        if stat.S_ISDIR(here.lstat().st_mode):
            pending += [(here / name, there / name) for name in os.listdir(here)]
    return None


def _difference(here: Path, there: Path) -> str | None:
    try:
        a, b = here.lstat(), there.lstat()
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    if stat.S_IFMT(a.st_mode) != stat.S_IFMT(b.st_mode):
        return f"{there} is of another type than {here}"
    if stat.S_ISLNK(a.st_mode):
        return None if here.readlink() == there.readlink() else f"{there} points elsewhere than {here}"
    if stat.S_ISDIR(a.st_mode):
        extra = set(os.listdir(there)) ^ set(os.listdir(here))
        return f"{there} and {here} differ in {sorted(extra)[0]}" if extra else None
    if (a.st_mode ^ b.st_mode) & stat.S_IXUSR:
        return f"{there} and {here} differ in being executable"
    return None if filecmp.cmp(here, there, shallow=False) else f"{there} differs from {here}"

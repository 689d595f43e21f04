"""Whether an output can be made, before anything is fetched for it."""

from __future__ import annotations

import os
from pathlib import Path

from p2pnode.errors import OutputExists, OutputUnwritable, PathError


def check_output(out: Path, *, force: bool) -> None:
    """Raises OutputExists (without `force`), PathError (no parent directory), OutputUnwritable."""
    parent = out.parent
    if not out.name or out.name == "..":
        raise PathError(f"{out} cannot be an output; name a file or directory to be made")
    if os.path.lexists(out) and not force:
        raise OutputExists(f"{out} exists already; choose another output or pass --force")
    if not parent.is_dir():
        raise PathError(f"{parent} is not a directory, so {out.name} cannot be made in it")
    if os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise OutputUnwritable(f"{parent} is on a read-only disk; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputUnwritable(f"{parent} cannot be written by this user; choose another output")

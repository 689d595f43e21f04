"""Kind `directory`: any directory, as its NAR. Needs no Nix."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from p2pnode.images.objects import ImportRun
from p2pnode.images.trees import TreeExporter
from protocols.manifest import ImageObject

OBJECT_NAME = "tree"  # the user's name for it is no part of the content


def import_directory(run: ImportRun, path: Path) -> list[ImageObject]:
    """The one object of a directory image. Raises PathError."""
    return [run.nar(path, OBJECT_NAME)]


DirectoryExporter = partial(TreeExporter, together=False)

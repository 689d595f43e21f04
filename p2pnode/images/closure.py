"""Kind `closure`: a store path and everything it refers to, directly or not."""

from __future__ import annotations

from functools import partial

from p2pnode.images.objects import ImportRun
from p2pnode.images.store_path import nar_objects
from p2pnode.images.trees import TreeExporter
from p2pnode.nix.cli import NixStore
from p2pnode.nix.storepath import StorePath
from protocols.manifest import ImageObject


def import_closure(run: ImportRun, nix: NixStore, path: StorePath) -> tuple[list[ImageObject], dict[str, int]]:
    """The objects, and the attribute `root` that says which is `path`. Raises as `import_store_path` does."""
    objects = nar_objects(run, nix, nix.path_info(nix.requisites(path)))
    root = next(number for number, obj in enumerate(objects) if obj.path == path.base_name)
    return objects, {"root": root}


ClosureExporter = partial(TreeExporter, together=True)

"""Kind `store-path`: one path of a Nix store, without what it refers to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from p2pnode.errors import NixError, VerificationFailed
from p2pnode.images.objects import ImportRun
from p2pnode.images.trees import TreeExporter
from p2pnode.nix.cli import NixStore, PathInfo
from p2pnode.nix.hashes import format_sha256
from p2pnode.nix.storepath import STORE_DIR, StorePath
from protocols.manifest import ImageObject


def as_store_path(path: Path, store_root: str | Path | None) -> StorePath | None:
    """The store path that `path` names: itself, by its place in a chroot store, or through symlinks to it."""
    real_store = STORE_DIR if store_root is None else os.path.join(os.path.abspath(store_root), STORE_DIR[1:])
    for text in (os.path.abspath(path), os.path.realpath(path)):
        for prefix in (real_store, STORE_DIR):
            try:
                return StorePath.parse(text.replace(prefix, STORE_DIR, 1) if text.startswith(prefix + "/") else text)
            except NixError:
                continue
    return None


def nar_objects(run: ImportRun, nix: NixStore, infos: Sequence[PathInfo]) -> list[ImageObject]:
    """Objects of `infos`, sorted by base name. Raises VerificationFailed where a NAR hash is not the registered one."""
    infos = sorted(infos, key=lambda info: info.path.base_name)
    numbers = {info.path: number for number, info in enumerate(infos)}
    run.total = sum(info.nar_size for info in infos)
    objects = []
    for info in infos:
        name = info.path.base_name
        obj = run.nar(nix.real_path(info.path), name, registered=info.nar_hash)
        if obj.nar_hash != info.nar_hash:
            raise VerificationFailed(
                f"{info.path} does not have the NAR hash that the Nix store has registered for it "
                f"({format_sha256(info.nar_hash)}); repair it with nix-store --repair-path"
            )
        references = tuple(sorted(numbers[path] for path in info.references if path in numbers))
        objects.append(ImageObject(name, obj.size, obj.layout, obj.nar_hash, None, references, info.ca))
    return objects


def import_store_path(run: ImportRun, nix: NixStore, path: StorePath) -> list[ImageObject]:
    """The one object of a store path image. Raises NixError, PathError, VerificationFailed."""
    return nar_objects(run, nix, nix.path_info([path]))


StorePathExporter = partial(TreeExporter, together=False)

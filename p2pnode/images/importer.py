"""From a path to an image in the catalog whose chunks lie in the original."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from p2pnode.errors import LocalError, NixError, PathError
from p2pnode.images.closure import import_closure
from p2pnode.images.directory import import_directory
from p2pnode.images.file import import_file
from p2pnode.images.objects import ImportRun
from p2pnode.images.store_path import as_store_path, import_store_path
from p2pnode.nix.cli import NixStore
from p2pnode.nix.storepath import StorePath
from p2pnode.progress import Report, silent
from p2pnode.store.records import Origin
from p2pnode.store.store import Store
from protocols.errors import ManifestError
from protocols.manifest import FASTCDC, Chunking, Image, Kind, encode_image


@dataclass(frozen=True, slots=True)
class Imported:
    """An image that is now in the store.

    `bytes`: size of the content; `new_bytes`: distinct chunks that the store did not hold before; `chunks`: distinct
    chunks; `reused`: every object was recognised as unchanged, so nothing was read.
    """

    image: Image
    name: str
    bytes: int
    new_bytes: int
    chunks: int
    reused: bool


def import_path(
    store: Store,
    path: Path,
    *,
    kind: Kind | None = None,
    name: str | None = None,
    chunking: Chunking = FASTCDC,
    nix_store: str | Path | None = None,
    progress: Report = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> Imported:
    """Make an image of `path` and put it into the catalog, whose chunks then point into the original.

    `kind` None: a valid store path is a closure, a regular file a file, a directory a directory. `nix_store`: root of
    a chroot store. Blocks; interrupted by `cancelled` it raises Cancelled, and objects finished until then are not
    read again. Raises PathError, NixMissing, NixError, LocalError (kind not supported), VerificationFailed.
    """
    run = ImportRun(store, chunking, progress, cancelled)
    attributes: Mapping[str, int] = {}
    store_path = None if kind in (Kind.FILE, Kind.DIRECTORY) else as_store_path(path, nix_store)
    nix = None if store_path is None else NixStore(nix_store)
    if kind is None:
        kind = _guess(path, nix, store_path)
    if kind in (Kind.CLOSURE, Kind.STORE_PATH):
        if store_path is None or nix is None:
            raise PathError(f"{path} is not a Nix store path, so it cannot be a {kind}")
        original = nix.real_path(store_path)
        if kind is Kind.CLOSURE:
            objects, attributes = import_closure(run, nix, store_path)
        else:
            objects = import_store_path(run, nix, store_path)
        name = name or store_path.name
    elif kind in (Kind.FILE, Kind.DIRECTORY):
        original = _resolve(path)
        mode = _mode(original)
        if kind is Kind.FILE:
            if not stat.S_ISREG(mode):
                raise PathError(f"{path} is {_type_name(mode)}, not a regular file")
            objects = import_file(run, original)
        else:
            if not stat.S_ISDIR(mode):
                raise PathError(f"{path} is {_type_name(mode)}, not a directory")
            objects = import_directory(run, original)
        name = name or path.name or original.name or str(kind)
    else:
        raise LocalError(f"images of kind {kind} are not supported yet")
    try:
        encoded = encode_image(kind, attributes, objects)
    except ManifestError as error:
        raise PathError(f"{path} cannot be an image: {error}") from error
    image = Image(encoded.id, kind, attributes, tuple(objects), tuple(encoded.blocks))
    with store.catalog.transaction():
        store.put_blocks(encoded.blocks)
        store.add_image(image, name=name, origin=Origin.PROVIDED, complete=True, path=str(original))
    return Imported(image, name, image.size, run.new_bytes, len(image.chunks), run.reused)


def _guess(path: Path, nix: NixStore | None, store_path: StorePath | None) -> Kind:
    if nix is not None and store_path is not None:
        try:
            nix.path_info([store_path])
            return Kind.CLOSURE
        except NixError:
            pass  # looks like a store path, but is not valid in this store
    mode = _mode(_resolve(path))
    if stat.S_ISREG(mode):
        return Kind.FILE
    if stat.S_ISDIR(mode):
        return Kind.DIRECTORY
    raise PathError(f"{path} is {_type_name(mode)}; only files, directories and store paths can be images")


def _resolve(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except FileNotFoundError:
        raise PathError(f"{path} does not exist") from None
    except RuntimeError:
        raise PathError(f"{path} is a symlink that leads back to itself") from None
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise PathError(f"{path} cannot be read: {reason}") from error


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise PathError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from error


def _type_name(mode: int) -> str:
    for test, text in (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a fifo"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return text
    return "of an unknown type"

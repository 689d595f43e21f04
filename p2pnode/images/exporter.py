"""From chunks in the store to what the user asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from p2pnode.errors import LocalError
from p2pnode.images.closure import ClosureExporter
from p2pnode.images.directory import DirectoryExporter
from p2pnode.images.file import FileExporter
from p2pnode.images.store_path import StorePathExporter
from p2pnode.nix.nar_reader import Buffer
from p2pnode.store.store import Store
from protocols.manifest import Image, Kind


class Exporter(Protocol):
    """Puts an image where the user wants it.

    `check()`; for each object, in any order: `begin_object(i)`, `feed(data)` for all pieces of its
    chunks in order (repeated ones too; already checked against their digests), `end_object()`; then `finish()`, or
    `abort()` at any point. Nothing appears under the final name before `finish`. Blocking; one thread at a time.
    """

    def check(self) -> None:
        """Whether the output can be made at all. Raises OutputExists, PathError, OutputUnwritable, DiskFull."""

    def begin_object(self, index: int) -> None:
        """Raises OutputUnwritable, DiskFull."""

    def feed(self, data: Buffer) -> None:
        """Raises VerificationFailed (not a safe NAR), DiskFull, OutputUnwritable."""

    def end_object(self) -> None:
        """Check size and hash. Raises VerificationFailed."""

    def finish(self) -> Path | None:
        """Give the output its final name, and let the store serve it from there; None without output.

        Raises OutputExists, OutputUnwritable, DiskFull, ChunkUnavailable.
        """

    def abort(self) -> None:
        """Remove everything temporary, except the partial file that a later fetch resumes."""


def exporter(
    store: Store, image: Image, out: Path | None, *, force: bool = False, keep_chunks: bool = False
) -> Exporter:
    """The exporter for the image's kind. `out` None: verify only, the content stays in the store.

    `force`: replace what is at `out`. `keep_chunks`: keep a copy in the store besides the output. Raises LocalError
    for a kind that cannot be exported yet.
    """
    makers: dict[Kind, Callable[..., Exporter]] = {
        Kind.FILE: FileExporter,
        Kind.DIRECTORY: DirectoryExporter,
        Kind.STORE_PATH: StorePathExporter,
        Kind.CLOSURE: ClosureExporter,
    }
    make = makers.get(image.kind)
    if make is None:
        raise LocalError(f"images of kind {image.kind} are not supported yet")
    return make(store, image, out, force=force, keep_chunks=keep_chunks)

"""Kind `file`: any single file, byte for byte."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from p2pnode.errors import ChunkUnavailable, VerificationFailed
from p2pnode.images.objects import ImportRun
from p2pnode.images.output import check_output
from p2pnode.nix.nar_reader import Buffer
from p2pnode.store.store import Store
from protocols.manifest import Image, ImageObject

OBJECT_NAME = "file"  # the user's name for it is no part of the content


def import_file(run: ImportRun, path: Path) -> list[ImageObject]:
    """The one object of a file image. Raises PathError."""
    return [run.file(path, OBJECT_NAME)]


class FileExporter:
    """Checks the whole file's hash; its bytes are in the landing's partial already, which becomes the output."""

    def __init__(self, store: Store, image: Image, out: Path | None, *, force: bool, keep_chunks: bool) -> None:
        self._store = store
        self._image = image
        self._out = None if out is None else out.absolute()
        self._force = force
        self._keep_chunks = keep_chunks
        self._hasher = blake3()
        self._size = 0
        self._verified = False

    def check(self) -> None:
        if self._out is not None:
            check_output(self._out, force=self._force)

    def begin_object(self, index: int) -> None:
        self._hasher = blake3()
        self._size = 0

    def feed(self, data: Buffer) -> None:
        self._hasher.update(data)
        self._size += len(data)

    def end_object(self) -> None:
        obj = self._image.objects[0]
        if self._size != obj.size or self._hasher.digest() != obj.file_hash:
            raise VerificationFailed(
                "the file is complete, but its BLAKE3 hash is not the one its image promises: the image is wrong; "
                "ask whoever made it"
            )
        self._verified = True

    def finish(self) -> Path | None:
        if not self._verified:
            raise ValueError("finish before the object was verified")
        if self._out is None:
            return None
        landing = self._store.landing(self._image, self._out)
        try:
            # Another image's copy may have stood in for a chunk so far; the output needs its own.
            landing.copy_local(self._image.chunks)
            if missing := landing.missing():
                raise ChunkUnavailable(
                    f"{len(missing)} chunks went bad on this disk after they had been verified; "
                    "run the same command again to fetch them"
                )
            landing.sync()
            self._store.adopt_file(
                self._image, landing.path, self._out, force=self._force, keep_chunks=self._keep_chunks
            )
        finally:
            landing.close()
        return self._out

    def abort(self) -> None:
        """Nothing to remove: the partial is what the next fetch resumes from."""

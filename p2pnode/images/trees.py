"""Exporting NARs as trees: what `directory`, `store-path` and `closure` have in common."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from p2pnode.errors import NarError, VerificationFailed
from p2pnode.images.output import check_output
from p2pnode.nix.nar_reader import Buffer, NarReader
from p2pnode.nix.nar_restore import NarRestorer, remove_tree
from p2pnode.store.rename import place, remove_quietly
from p2pnode.store.space import check_space, write_failure
from p2pnode.store.store import Store
from protocols.manifest import Image


class _Nowhere:
    """The visitor of a NAR that is checked but not unpacked."""

    def enter_directory(self, name: bytes) -> None:
        """Ignored, like the rest."""

    def leave_directory(self) -> None: ...
    def begin_file(self, name: bytes, executable: bool, size: int) -> None: ...
    def file_contents(self, data: memoryview) -> None: ...
    def end_file(self) -> None: ...
    def symlink(self, name: bytes, target: bytes) -> None: ...


class TreeExporter:
    """Unpacks objects into a hidden tree beside the output while hashing them; `finish` gives it its name.

    `together`: the output is a directory with one tree per object, by the objects' paths; else it is the one tree.
    """

    def __init__(
        self, store: Store, image: Image, out: Path | None, *, force: bool, keep_chunks: bool, together: bool
    ) -> None:
        self._store = store
        self._image = image
        self._out = None if out is None else out.absolute()
        self._force = force
        self._keep_chunks = keep_chunks
        self._together = together
        self._begun = False
        self._index = -1
        self._restorer: NarRestorer | NarReader | None = None
        self._hasher = hashlib.sha256()
        self._size = 0
        self._verified: set[int] = set()

    @property
    def _temporary(self) -> Path:
        assert self._out is not None
        name = os.fsdecode(os.fsencode(self._out.name)[:220])
        return self._out.with_name(f".{name}.{str(self._image.id)[-8:]}.p2pnode-tree")

    def check(self) -> None:
        if self._out is not None:
            check_output(self._out, force=self._force)
            check_space(self._out.parent, self._image.size)

    def begin_object(self, index: int) -> None:
        if self._out is not None and not self._begun:
            remove_tree(self._temporary)  # of a run that was killed
            if self._together:
                try:
                    self._temporary.mkdir()
                except OSError as error:
                    raise write_failure(self._temporary, error) from error
        self._begun = True
        self._index = index
        self._hasher = hashlib.sha256()
        self._size = 0
        obj = self._image.objects[index]
        if self._out is None:
            self._restorer = NarReader(_Nowhere(), max_size=obj.size)  # what cannot be unpacked is not complete either
        else:
            target = self._temporary / obj.path if self._together else self._temporary
            self._restorer = NarRestorer(target, max_size=obj.size)

    def feed(self, data: Buffer) -> None:
        assert self._restorer is not None
        self._hasher.update(data)
        self._size += len(data)
        try:
            self._restorer.feed(data)
        except NarError as error:
            raise self._not_a_nar(error) from error

    def end_object(self) -> None:
        obj = self._image.objects[self._index]
        if self._size != obj.size or self._hasher.digest() != obj.nar_hash:
            raise VerificationFailed(
                f"{obj.path} is complete, but its NAR hash is not the one its image promises: the image is wrong; "
                "ask whoever made it"
            )
        try:
            if isinstance(self._restorer, NarRestorer):
                self._restorer.finish()
            elif self._restorer is not None:
                self._restorer.close()
        except NarError as error:
            raise self._not_a_nar(error) from error
        self._restorer = None
        self._verified.add(self._index)

    def _not_a_nar(self, error: NarError) -> VerificationFailed:
        path = self._image.objects[self._index].path
        return VerificationFailed(f"{path} is not a NAR that can be unpacked safely: {error}")

    def finish(self) -> Path | None:
        if len(self._verified) != len(self._image.objects):
            raise ValueError("finish before all objects were verified")
        if self._out is None:
            return None
        place(self._temporary, self._out, replace=self._force)
        trees = [self._out / obj.path if self._together else self._out for obj in self._image.objects]
        self._store.adopt_trees(self._image, trees, self._out, keep_chunks=self._keep_chunks)
        return self._out

    def abort(self) -> None:
        if isinstance(self._restorer, NarRestorer):
            self._restorer.abort()
        self._restorer = None
        if self._out is not None and self._begun:
            remove_quietly(self._temporary)

"""The store: what a node holds, and where. Chunk bytes always lie in *sources*, files and trees that can be read at
any offset: the user's own (references, never touched) or packs and partials of ours (owned).

Layout of a home: `store/catalog.sqlite` and `store/packs/<image id>.pack`; partials lie hidden beside the outputs.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blake3 import blake3

from p2pnode.errors import ChunkUnavailable, StoreError, UsageError
from p2pnode.nix.narmap import NarMap
from p2pnode.store import recovery, removal, verification
from p2pnode.store.catalog import open_catalog
from p2pnode.store.imports import ImportKey, decode_object, encode_object
from p2pnode.store.landing import Landing, chunk_places, partial_path
from p2pnode.store.records import (
    FileStamp,
    ImageRecord,
    Location,
    Origin,
    Pin,
    Problem,
    Source,
    SourceKind,
    StoreStatistics,
    VerifyReport,
)
from p2pnode.store.rename import copy_file, place
from p2pnode.store.sources import SourcePool, changed
from p2pnode.store.space import free_bytes, write_failure
from protocols.cid import CID, DIGEST_SIZE
from protocols.errors import CIDError, ManifestError
from protocols.manifest import Image, ImageAssembler, ImageObject, Kind

log = logging.getLogger(__name__)

CACHED_IMAGES = 8
MIN_PREFIX = 8  # an id's first 7 characters are the same in all ids
MAX_MOVES = 4  # how often a chunk may be looked up again because its file got another name meanwhile

Lost = Callable[[list[bytes]], None]


class Store:
    """All that a node holds. Thread-safe, blocking: call it from worker threads.

    Every method raises CatalogCorrupt, DiskFull, OutputUnwritable or StoreError when the catalog fails.
    """

    def __init__(self, home: Path) -> None:
        self._packs = home / "store" / "packs"
        try:
            self._packs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failure(self._packs, error) from error
        self.catalog = open_catalog(home / "store" / "catalog.sqlite")
        try:
            self._lock_fd = recovery.recover(self.catalog, self._packs)
        except BaseException:
            self.catalog.close()
            raise
        self._pool = SourcePool(self.catalog.source_map)
        self._cache: OrderedDict[CID, Image] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._lost: list[Lost] = []
        self._landings: set[CID] = set()

    @classmethod
    def open(cls, home: Path) -> Self:
        """Open or create the store below `home`, and put in order what a crash left."""
        return cls(home)

    def close(self) -> None:
        """Commit and close everything. May be called again."""
        if self._lock_fd < 0:
            return
        self._pool.close()
        self.catalog.close()
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Manifests

    def put_blocks(self, blocks: Mapping[CID, bytes], beside: CID | None = None) -> None:
        """Keep manifest blocks, which the caller has verified. Those of no image go when the store opens again.

        `beside`: an image that they are no part of, but stay as long as.
        """
        with self.catalog.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO blocks VALUES (?, ?)", ((cid.to_bytes(), data) for cid, data in blocks.items())
            )
            if beside is not None:
                rows = ((beside.to_bytes(), cid.to_bytes()) for cid in blocks)
                db.executemany("INSERT OR IGNORE INTO image_blocks VALUES (?, ?)", rows)

    def block(self, cid: CID) -> bytes | None:
        """A manifest block, checked against its hash."""
        rows = self.catalog.query("SELECT data FROM blocks WHERE cid = ?", cid.to_bytes())
        return rows[0][0] if rows and cid.matches(rows[0][0]) else None

    def add_image(self, image: Image, *, name: str, origin: Origin, complete: bool, path: str | None) -> None:
        """Put an image, whose blocks were put before, into the catalog. A known one gets the new name and state."""
        id = image.id.to_bytes()
        now = time.time()
        sizes = struct.pack(f"<{len(image.chunks)}I", *image.chunks.values())
        with self.catalog.transaction() as db:
            db.execute(
                "INSERT INTO images (id, kind, name, size, chunks, chunk_bytes, digests, sizes, complete, origin, path,"
                " added, last_used) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                " name = excluded.name, complete = max(complete, excluded.complete),"
                " origin = CASE WHEN excluded.complete >= complete THEN excluded.origin ELSE origin END,"
                " path = coalesce(excluded.path, path), last_used = excluded.last_used",
                (
                    id,
                    image.kind,
                    name,
                    image.size,
                    len(image.chunks),
                    image.chunk_bytes,
                    b"".join(image.chunks),
                    sizes,
                    complete,
                    origin,
                    path,
                    now,
                    now,
                ),
            )
            blocks = ((id, cid.to_bytes()) for cid in image.blocks)
            db.executemany("INSERT OR IGNORE INTO image_blocks VALUES (?, ?)", blocks)
            nars = ((obj.nar_hash, id) for obj in image.objects if obj.nar_hash is not None)
            db.executemany("INSERT OR IGNORE INTO nars VALUES (?, ?)", nars)
        self._remember(image)

    def images(self) -> list[ImageRecord]:
        """All images, in the order in which they came."""
        return self._records("1")

    def record(self, id: CID) -> ImageRecord | None:
        """One image's record."""
        found = self._records("id = ?", id.to_bytes())
        return found[0] if found else None

    def image(self, id: CID) -> Image | None:
        """The decoded manifest; None if the image is not here. A few are cached."""
        with self._cache_lock:
            image = self._cache.get(id)
            if image is not None:
                self._cache.move_to_end(id)
                return image
        if not self.catalog.query("SELECT 1 FROM images WHERE id = ?", id.to_bytes()):
            return None
        try:
            assembler = ImageAssembler(id)
            while assembler.missing:
                for cid in sorted(assembler.missing):
                    data = self.block(cid)
                    if data is None:
                        return None  # damaged in the catalog: fetched again like an image that is not here
                    assembler.add(cid, data)
            image = assembler.image()
        except ManifestError:
            return None
        self._remember(image)
        return image

    def find(self, text: str) -> list[ImageRecord]:
        """By full id, by id prefix of at least 8 characters, or by exact name; more than one if it is ambiguous."""
        try:
            record = self.record(CID.parse(text))
            return [] if record is None else [record]
        except CIDError:
            pass
        found = self._records("name = ?", text)
        if not found and len(text) >= MIN_PREFIX:
            ids = [row[0] for row in self.catalog.query("SELECT id FROM images ORDER BY added")]
            matching = [id for id in ids if str(CID.from_bytes(id)).startswith(text)]
            found = [record for id in matching for record in self._records("id = ?", id)]
        return found

    def mark_complete(self, id: CID, path: str | None) -> None:
        """The whole content was verified. `path`: where it was exported to, if it was."""
        with self.catalog.transaction() as db:
            db.execute(
                "UPDATE images SET complete = 1, path = coalesce(?, path), last_used = ? WHERE id = ?",
                (path, time.time(), id.to_bytes()),
            )

    def pin(self, id: CID, by: Pin, pinned: bool = True) -> None:
        """Let an image be kept, or no longer on somebody's account."""
        with self.catalog.transaction() as db:
            change = "pinned | ?1" if pinned else "pinned & ~?1"
            db.execute(f"UPDATE images SET pinned = {change} WHERE id = ?2 AND pinned <> {change}", (by, id.to_bytes()))

    def provided(self, after: CID | None, limit: int) -> list[ImageRecord]:
        """Up to `limit` complete images that this node provides itself, by ascending id, those greater than `after`."""
        own = "origin = ? AND complete"
        self._count_held(own, Origin.PROVIDED)
        page = f"SELECT id FROM images WHERE {own} AND held_chunks = chunks AND id > ? ORDER BY id LIMIT ?"
        begin = b"" if after is None else after.to_bytes()
        found = self._records(f"id IN ({page})", Origin.PROVIDED, begin, limit)
        return sorted(found, key=lambda record: record.id.to_bytes())

    def remove_image(self, id: CID) -> list[bytes]:
        """Forget an image. Returns the digests no longer held at all.

        Packs and partials that no other image needs are deleted, the user's files never. Raises UsageError while it
        is being fetched.
        """
        if id in self._landings:
            raise UsageError(f"image {id} is being fetched; stop that first")
        lost, sources = removal.remove_image(self.catalog, id)
        with self._cache_lock:
            self._cache.pop(id, None)
        self._delete_files(sources)
        return lost

    # Chunks

    def held(self, digests: Iterable[bytes]) -> bytearray:
        """One byte per digest, in order: 1 if a location is known, else 0."""
        wanted = list(digests)
        found = self.catalog.held(wanted)
        return bytearray(digest in found for digest in wanted)

    def held_of(self, image: Image) -> bytearray:
        """As `held`, of an image's distinct chunks; quickly if it is known that all of them are."""
        if self.catalog.query("SELECT 1 FROM images WHERE id = ? AND held_chunks = chunks", image.id.to_bytes()):
            return bytearray(b"\1") * len(image.chunks)
        return self.held(image.chunks)

    def has(self, digest: bytes) -> bool:
        """Whether a location of the chunk is known."""
        return bool(self.catalog.held([digest]))

    def read(self, digest: bytes) -> bytes:
        """A chunk's bytes, checked against the digest unless they cannot have changed since that was done.

        Raises ChunkUnavailable when no location is left.

        A location whose bytes are wrong or gone is dropped, told to `on_lost`, and shows up in `problems`.
        """
        reason = "it is not held here"
        for _ in range(MAX_MOVES):
            moved = False
            for location in self.catalog.locations(digest):
                try:
                    data, proved = self._pool.read(location.source, location.offset, location.length)
                except ChunkUnavailable as error:
                    reason = str(error)
                else:
                    if proved or blake3(data).digest() == digest:
                        return data
                    reason = f"bytes {location.offset} to {location.offset + location.length} do not match their hash"
                moved |= not self._drop(location, digest, reason)
            if not moved:
                break
        raise ChunkUnavailable(f"chunk {digest.hex()[:16]}… is not available: {reason}")

    def read_at_hand(self, digests: Sequence[bytes]) -> list[memoryview | None]:
        """Those chunks that are in memory, checked as `read` does; None for each that only `read` can tell of.

        Waits for no disk (but for the catalog's pages) and for no other thread."""
        try:
            locations = self.catalog.locations_at_hand(digests)
        except StoreError as error:
            log.debug("left to whoever waits: %s", error)
            locations = {}
        return [self._read_at_hand(digest, locations.get(digest)) for digest in digests]

    def _read_at_hand(self, digest: bytes, location: Location | None) -> memoryview | None:
        if location is None:
            return None
        found = self._pool.read_at_hand(location.source, location.offset, location.length)
        if found is None:
            return None
        data, proved = found
        return data if proved or blake3(data).digest() == digest else None

    def _drop(self, location: Location, digest: bytes, reason: str) -> bool:
        """Drop what turned out bad; False if it only moved while it was read, so that it must be looked up again."""
        source = location.source
        with self.catalog.transaction():
            if location not in self.catalog.locations(digest):
                self._pool.forget(source.id)
                return False
            whole = changed(source, self.catalog.source_fingerprint(source.id))
            if whole is None:
                self.catalog.drop_chunk(digest, source.id)
                gone = [digest]
            else:
                gone = self.catalog.drop_source(source.id)
            self.catalog.add_problem(str(source.path), whole or f"{source.path} is damaged: {reason}")
            lost = self._not_held(gone)
        if whole is not None:
            self._pool.forget(source.id)
        log.warning("%s; %d chunks are no longer held", whole or reason, len(lost))
        self._tell_lost(lost)
        return True

    def on_lost(self, callback: Lost) -> None:
        """Call `callback` with digests that are no longer held at all, in the thread that noticed."""
        self._lost.append(callback)

    def problems(self) -> list[Problem]:
        """Sources that went bad and were not provided again since, the latest first."""
        return [
            Problem(*row) for row in self.catalog.query("SELECT path, reason, time FROM problems ORDER BY time DESC")
        ]

    def forget_source(self, id: int, reason: str | None = None) -> None:
        """Drop a source and its rows; its file is left alone. `reason`: recorded as a problem."""
        with self.catalog.transaction():
            for source in self.catalog.sources("id = ?", id):
                if reason is not None:
                    self.catalog.add_problem(str(source.path), reason)
            lost = self._not_held(self.catalog.drop_source(id))
        self._pool.forget(id)
        self._tell_lost(lost)

    def _not_held(self, digests: Sequence[bytes]) -> list[bytes]:
        found = self.catalog.held(digests)
        return [digest for digest in digests if digest not in found]

    def _tell_lost(self, digests: list[bytes]) -> None:
        if digests:
            for callback in self._lost:
                callback(digests)

    # Fetching

    def landing(self, image: Image, out: Path | None = None) -> Landing:
        """Where a fetch of `image` writes. `out`: its final path, which only a `file` is written beside.

        Raises OutputExists when another fetch writes there, PathError, OutputUnwritable, DiskFull.
        """
        pack = self._packs / f"{image.id}.pack"
        partial = out is not None and image.kind is Kind.FILE
        path = pack
        if out is not None and partial:
            path = partial_path(image.id, out.absolute())
            self._reuse_pack(image, pack, path)
        landing = Landing(self, self.catalog, image, path, partial=partial)
        self._landings.add(image.id)
        return landing

    def landing_closed(self, id: CID) -> None:
        """For `Landing.close`."""
        self._landings.discard(id)

    def _reuse_pack(self, image: Image, pack: Path, partial: Path) -> None:
        """A file's pack has the bytes of the file: on the same disk it becomes the partial by a rename."""
        rows = self.catalog.sources("image = ? AND path = ?", image.id.to_bytes(), os.fsencode(pack))
        if not rows or image.id in self._landings or os.path.lexists(partial):
            return
        with self.catalog.transaction() as db:
            db.execute("DELETE FROM sources WHERE path = ? AND owned", (os.fsencode(partial),))
            try:
                os.rename(pack, partial)
            except OSError:  # another disk: `Landing.copy_local` copies
                return
            db.execute("UPDATE sources SET path = ? WHERE id = ?", (os.fsencode(partial), rows[0].id))
        self._pool.forget(rows[0].id)

    def adopt_file(self, image: Image, partial: Path, out: Path, *, force: bool, keep_chunks: bool) -> None:
        """Give a complete partial its final name; its chunks are then served from there, as the user's file.

        All packs and partials of the image go, except that `keep_chunks` leaves a copy of our own. Raises
        OutputExists, OutputUnwritable, DiskFull.
        """
        id = image.id.to_bytes()
        found = self.catalog.sources("image = ? AND path = ?", id, os.fsencode(partial))
        if not found:
            raise ChunkUnavailable(f"{partial} was removed while it was being written; run the same command again")
        (source,) = found
        if keep_chunks:
            self._keep_copy(image, source)
        # Seen by recovery: after a crash between rename and commit the file is at its new name.
        with self.catalog.transaction() as db:
            status = os.stat(partial)
            stamp = FileStamp.of(status)
            db.execute(
                "UPDATE sources SET moving_to = ?, dev = ?, ino = ?, size = ?, mtime_ns = ? WHERE id = ?",
                (os.fsencode(out), stamp.dev, stamp.ino, stamp.size, stamp.mtime_ns, source.id),
            )
        with self.catalog.transaction():
            place(partial, out, replace=force)
            stale = self.catalog.sources("path = ? AND NOT owned", os.fsencode(out))
            recovery.finish_move(self.catalog, source.id, image.id, out, FileStamp.of(os.stat(out)))
            lost = [digest for old in stale for digest in self.catalog.drop_source(old.id)]
            obsolete = [] if keep_chunks else self.catalog.sources("image = ? AND owned", id)
            for old in obsolete:
                self.catalog.drop_source(old.id)
            lost = self._not_held(lost)
        for old in (source, *stale):
            self._pool.forget(old.id)
        self._delete_files(obsolete)
        self._tell_lost(lost)

    def _keep_copy(self, image: Image, source: Source) -> None:
        """Copy a partial to the image's pack, inside the kernel (a reflink where the file system has them)."""
        pack = self._packs / f"{image.id}.pack"
        places, total = chunk_places(image)
        for old in self.catalog.sources("path = ?", os.fsencode(pack)):
            self.forget_source(old.id)
        id = self.catalog.add_source(SourceKind.FILE, pack, owned=True, image=image.id)
        try:
            with open(source.path, "rb") as original, open(pack, "wb") as copy:
                copy_file(original.fileno(), copy.fileno(), total)
        except OSError as error:
            self.catalog.drop_source(id)
            raise write_failure(pack, error) from error
        self.catalog.add_chunks(id, ((digest, places[digest][0], size) for digest, size in image.chunks.items()))

    def adopt_trees(self, image: Image, trees: Sequence[Path], out: Path, *, keep_chunks: bool) -> None:
        """Serve the image's chunks from its exported trees, object i from `trees[i]`; packs go unless `keep_chunks`.

        Nothing is copied. A tree that somebody has changed already is left out, and then the pack stays.
        """
        maps = [(obj, tree, NarMap.build(tree)) for obj, tree in zip(image.objects, trees, strict=True)]
        whole = all(map.size == obj.size for obj, _, map in maps)
        obsolete: list[Source] = []
        stale: list[Source] = []
        with self.catalog.transaction():
            for obj, tree, map in maps:
                stale += self.catalog.sources("path = ? AND NOT owned", os.fsencode(tree))
                if map.size == obj.size:
                    self._add_tree(tree, map, obj)
            if whole and not keep_chunks:
                obsolete = self.catalog.sources("image = ? AND owned", image.id.to_bytes())
            gone = [digest for old in (*stale, *obsolete) for digest in self.catalog.drop_source(old.id)]
            lost = self._not_held(gone)
            self.mark_complete(image.id, str(out))
        for old in stale:
            self._pool.forget(old.id)
        self._delete_files(obsolete)
        self._tell_lost(lost)

    def adopt_store_paths(
        self, image: Image, trees: Mapping[int, Path], *, keep_chunks: bool, hashed: bool = True
    ) -> None:
        """Serve objects from the store paths that have their registered NAR hash: object i from `trees[i]`.

        `hashed`: they were made of the image's chunks. Else an import must not take the image's word for what they are.
        The image's packs go, unless `keep_chunks`, or one of their chunks is nowhere else. Raises PathError.
        """
        maps: list[tuple[ImportKey, ImageObject, NarMap]] = []
        for number, tree in trees.items():
            obj = image.objects[number]
            key = ImportKey.registered(tree, obj.layout.chunking, obj.nar_hash or b"")
            if self.recall_object(key, SourceKind.NAR) is not None or (not hashed and self._serves(tree, obj)):
                continue
            if (map := NarMap.build(tree)).size == obj.size:
                maps.append((key, obj, map))
        obsolete: list[Source] = []
        with self.catalog.transaction():
            for each in maps:
                self.remember_object(*each, recall=hashed)
            if not keep_chunks:
                for source in self.catalog.sources("image = ? AND owned", image.id.to_bytes()):
                    if self.catalog.is_spare(source.id):
                        self.catalog.drop_source(source.id)
                        obsolete.append(source)
        self._delete_files(obsolete)

    def _serves(self, tree: Path, obj: ImageObject) -> bool:
        """Whether the chunks of an object are already read from the tree."""
        sources = self.catalog.sources("path = ? AND kind = ? AND NOT owned", os.fsencode(tree), SourceKind.NAR)
        return any(set(obj.layout.digests) <= set(self.catalog.source_digests(source.id)) for source in sources)

    def forget_vanished(self) -> list[bytes]:
        """Drop references into Nix stores whose paths are not there any more; the digests no longer held at all.

        Nix collects garbage without asking, and nobody should be promised what it took. (Files of a user are left to
        the next read: an editor may be replacing them just now.)
        """
        gone: list[bytes] = []
        for source in self.catalog.sources("NOT owned AND kind = ?", SourceKind.NAR):
            if source.path.parts[-3:-1] != ("nix", "store"):
                continue
            try:
                os.lstat(source.path)
            except (FileNotFoundError, NotADirectoryError):
                with self.catalog.transaction():
                    self.catalog.add_problem(str(source.path), f"{source.path} does not exist any more")
                    gone += self.catalog.drop_source(source.id)
                self._pool.forget(source.id)
            except OSError:
                continue  # a disk that is not answering today: reading it will tell
        lost = self._not_held(gone)
        self._tell_lost(lost)
        return lost

    def look_again(self, digests: Iterable[bytes], *, quietly: bool = False) -> bool:
        """Whether all of these chunks are here, after a look at the metadata of the files and trees that hold them.

        (`held` goes by the catalog alone.) Sources that are gone, and files that were changed, are dropped, and told of
        as problems unless `quietly`: for who is about to read the contents again. What was changed inside of a tree is
        noticed when it is read.
        """
        wanted = list(digests)
        for source in self.catalog.sources_of(wanted):
            if source.kind is SourceKind.FILE:
                reason = changed(source, None)
            else:
                reason = None if os.path.lexists(source.path) else f"{source.path} does not exist any more"
            if reason is not None:
                self.forget_source(source.id, None if quietly else reason)
        return all(self.held(wanted))

    def _add_tree(self, tree: Path, map: NarMap, obj: ImageObject) -> int:
        source = self.catalog.add_source(
            SourceKind.NAR, tree, owned=False, fingerprint=map.fingerprint, map=map.to_bytes()
        )
        self.catalog.add_chunks(source, _rows(obj))
        return source

    def _delete_files(self, sources: Iterable[Source]) -> None:
        for source in sources:
            self._pool.forget(source.id)
            try:
                os.unlink(source.path)
            except FileNotFoundError:
                pass
            except OSError as error:
                # Its rows are gone: the space is lost until somebody removes the file, so say which.
                log.warning("%s could not be removed: %s", source.path, os.strerror(error.errno or 0))

    # Importing

    def remember_object(
        self, key: ImportKey, obj: ImageObject, original: FileStamp | NarMap, *, recall: bool = True
    ) -> None:
        """Record a finished object whose bytes stay in the file (`FileStamp`) or tree (`NarMap`) at `key.path`.

        `recall`: for `recall_object` too, not only to read its chunks there.
        """
        path = Path(os.fsdecode(key.path))
        kind = SourceKind.NAR if isinstance(original, NarMap) else SourceKind.FILE
        with self.catalog.transaction() as db:
            stale = []
            source = None
            for old in self.catalog.sources("path = ? AND kind = ? AND NOT owned", key.path, kind):
                if isinstance(original, NarMap):
                    same = self.catalog.source_fingerprint(old.id) == original.fingerprint
                else:
                    same = old.stamp == original
                if same:
                    source = old.id
                else:
                    stale.append(old)
            if source is not None:
                self.catalog.add_chunks(source, _rows(obj))
            elif isinstance(original, NarMap):
                source = self._add_tree(path, original, obj)
            else:
                source = self.catalog.add_source(kind, path, owned=False, stamp=original)
                self.catalog.add_chunks(source, _rows(obj))
            gone = [digest for old in stale for digest in self.catalog.drop_source(old.id)]
            if recall:
                db.execute(
                    "INSERT OR REPLACE INTO imports VALUES (?, ?, ?, ?, ?, ?)",
                    (key.path, kind, key.chunking_bytes, key.fingerprint, source, encode_object(obj)),
                )
            db.execute("DELETE FROM problems WHERE path = ?", (str(path),))
            lost = self._not_held(gone)
        for old in stale:
            self._pool.forget(old.id)
        self._tell_lost(lost)

    def recall_object(self, key: ImportKey, kind: SourceKind) -> ImageObject | None:
        """The object that `remember_object` was given, if the key is equal and none of its chunks was dropped."""
        rows = self.catalog.query(
            "SELECT object FROM imports WHERE path = ? AND kind = ? AND chunking = ? AND fingerprint = ?",
            key.path,
            kind,
            key.chunking_bytes,
            key.fingerprint,
        )
        return decode_object(rows[0][0]) if rows else None

    # The whole

    def verify(self, id: CID, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
        """Read every chunk, at all its places, and every object again; `progress(done, total)` in bytes.

        What is bad is dropped from the catalog, so that a fetch gets it again; an image of which nothing is bad is
        complete. Raises NotFound.
        """
        report = verification.verify(self, id, progress)
        record = self.record(id)
        if report.ok and record is not None and not record.complete:
            self.mark_complete(id, None)
        return report

    def check_locations(self, digest: bytes) -> None:
        """Read a chunk at all its places and drop those where it is bad."""
        for location in self.catalog.locations(digest):
            try:
                data, _ = self._pool.read(location.source, location.offset, location.length)
                good = blake3(data).digest() == digest
                reason = f"bytes {location.offset} to {location.offset + location.length} do not match their hash"
            except ChunkUnavailable as error:
                good, reason = False, str(error)
            if not good:
                self._drop(location, digest, reason)

    def stats(self) -> StoreStatistics:
        """Numbers for `status`."""
        ((images, complete),) = self.catalog.query("SELECT count(*), coalesce(sum(complete), 0) FROM images")
        ((chunks,),) = self.catalog.query("SELECT count(DISTINCT digest) FROM chunks")
        ((referenced,),) = self.catalog.query(
            "SELECT coalesce(sum(length), 0) FROM chunks c JOIN sources s ON s.id = c.source WHERE NOT s.owned"
        )
        ((problems,),) = self.catalog.query("SELECT count(*) FROM problems")
        owned = 0
        for source in self.catalog.sources("owned"):
            try:
                owned += os.stat(source.path).st_blocks * 512
            except OSError:
                continue  # vanished: noticed when it is read
        return StoreStatistics(images, complete, chunks, owned, referenced, free_bytes(self._packs), problems)

    def _remember(self, image: Image) -> None:
        with self._cache_lock:
            self._cache[image.id] = image
            self._cache.move_to_end(image.id)
            while len(self._cache) > CACHED_IMAGES:
                self._cache.popitem(last=False)

    def _records(self, where: str, *values: Any) -> list[ImageRecord]:
        self._count_held(where, *values)
        rows = self.catalog.query(
            "SELECT id, kind, name, size, chunks, chunk_bytes, coalesce(held_chunks, 0), coalesce(held_bytes, 0),"
            f" complete AND held_chunks = chunks, origin, path, added, last_used, pinned FROM images WHERE {where}"
            " ORDER BY added, id",
            *values,
        )
        return [ImageRecord.of_row(row) for row in rows]

    def count_held(self) -> None:
        """Let `held_chunks` of all images tell what is here now."""
        self._count_held("1")

    def _count_held(self, where: str, *values: Any) -> None:
        for id, digests, sizes in self.catalog.query(
            f"SELECT id, digests, sizes FROM images WHERE held_chunks IS NULL AND {where}", *values
        ):
            names = [digests[i : i + DIGEST_SIZE] for i in range(0, len(digests), DIGEST_SIZE)]
            found = self.catalog.held(names)
            lengths = struct.unpack(f"<{len(sizes) // 4}I", sizes)
            held = sum(size for name, size in zip(names, lengths, strict=True) if name in found)
            with self.catalog.transaction() as db:
                db.execute("UPDATE images SET held_chunks = ?, held_bytes = ? WHERE id = ?", (len(found), held, id))


def _rows(obj: ImageObject) -> Iterable[tuple[bytes, int, int]]:
    """(digest, offset, length) of an object's chunks; of one that occurs again, its first place."""
    offset = 0
    rows = []
    for digest, size in zip(obj.layout.digests, obj.layout.sizes, strict=True):
        rows.append((digest, offset, size))
        offset += size
    return rows

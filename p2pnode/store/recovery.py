"""Putting a store in order when it opens: what a crash left half done is finished or taken back."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from p2pnode.errors import StoreError
from p2pnode.store.catalog import Catalog
from p2pnode.store.records import FileStamp
from p2pnode.store.space import write_failure
from protocols.cid import CID


def recover(catalog: Catalog, packs: Path) -> int:
    """Recover, unless another process has the store open; the descriptor of a lock to be kept while it is open here.

    Finishes renames, drops rows of our files that are gone, removes packs without rows and blocks without image.
    """
    path = catalog.path.with_suffix(".lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(fd, fcntl.LOCK_SH)  # another process is at work: its half-done things are not ours to judge
            return fd
        _finish_moves(catalog)
        _drop_vanished(catalog)
        _remove_orphans(catalog, packs)
        fcntl.flock(fd, fcntl.LOCK_SH)
    except OSError as error:
        os.close(fd)
        raise StoreError(f"the store at {packs.parent} could not be put in order: {error}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def finish_move(catalog: Catalog, source: int, image: CID, out: Path, stamp: FileStamp) -> None:
    """A partial has become the output: from now on it is the user's file."""
    with catalog.transaction() as db:
        db.execute(
            "UPDATE sources SET path = ?, owned = 0, dev = ?, ino = ?, size = ?, mtime_ns = ?, image = NULL,"
            " moving_to = NULL WHERE id = ?",
            (os.fsencode(out), stamp.dev, stamp.ino, stamp.size, stamp.mtime_ns, source),
        )
        db.execute("UPDATE images SET complete = 1, path = ? WHERE id = ?", (str(out), image.to_bytes()))


def _finish_moves(catalog: Catalog) -> None:
    for source in catalog.sources("moving_to IS NOT NULL"):
        ((target,),) = catalog.query("SELECT moving_to FROM sources WHERE id = ?", source.id)
        out = Path(os.fsdecode(target))
        stamp = None if os.path.lexists(source.path) or not out.is_file() else FileStamp.of(os.stat(out))
        if stamp is not None and source.stamp == stamp and source.image is not None:
            finish_move(catalog, source.id, source.image, out, stamp)
        else:
            with catalog.transaction() as db:
                db.execute("UPDATE sources SET moving_to = NULL WHERE id = ?", (source.id,))


def _drop_vanished(catalog: Catalog) -> None:
    for source in catalog.sources("owned"):
        if not os.path.lexists(source.path):
            catalog.drop_source(source.id)


def _remove_orphans(catalog: Catalog, packs: Path) -> None:
    # A source of ours whose image is unknown: the image was removed, and then its file could not be.
    for source in catalog.sources("owned AND image NOT IN (SELECT id FROM images)"):
        needed = catalog.query("SELECT 1 FROM chunks WHERE source = ? LIMIT 1", source.id)
        if not needed:
            catalog.drop_source(source.id)
            os.unlink(source.path)
    known = {source.path for source in catalog.sources("owned")}
    for entry in os.scandir(packs):
        if packs / entry.name not in known and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
    if catalog.query("SELECT 1 FROM blocks WHERE cid NOT IN (SELECT cid FROM image_blocks) LIMIT 1"):
        with catalog.transaction() as db:
            db.execute("DELETE FROM blocks WHERE cid NOT IN (SELECT cid FROM image_blocks)")

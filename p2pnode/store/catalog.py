"""The catalog: one SQLite database, one connection, one lock.

Rows of arriving chunks are written in a transaction that stays open for a while (`defer`): committing each of them
would cost more than the network does. All reads go through the same connection, so they see such rows at once.
WAL with synchronous=NORMAL: a power cut may lose the last transactions, never the consistency of the rest; what the
rows promise is checked on every read of a chunk anyway.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from p2pnode.errors import CatalogCorrupt, DiskFull, OutputUnwritable, StoreError
from p2pnode.store.records import FileStamp, Location, Source, SourceKind
from p2pnode.store.space import free_bytes, write_failure
from protocols.cid import CID

SCHEMA_VERSION = 4
COMMIT_BYTES = 8 << 20  # at most this much is fetched again after a kill -9
COMMIT_SECONDS = 0.5
MAX_PROBLEMS = 1000
LITTLE_SPACE = 1 << 20
QUERY_DIGESTS = 2000  # parameters of one SELECT; SQLite takes 32,766

_SCHEMA = """
CREATE TABLE images (
    id BLOB PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, size INTEGER NOT NULL,
    chunks INTEGER NOT NULL, chunk_bytes INTEGER NOT NULL,
    digests BLOB NOT NULL,          -- the distinct chunks, 32 bytes each
    sizes BLOB NOT NULL,            -- and their sizes, u32 little-endian
    held_chunks INTEGER, held_bytes INTEGER,  -- NULL: to be counted again
    complete INTEGER NOT NULL, origin TEXT NOT NULL, path TEXT,
    added REAL NOT NULL, last_used REAL NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0         -- bits, see `Pin`
) STRICT;
CREATE INDEX images_name ON images (name);
CREATE TABLE nars (hash BLOB NOT NULL, image BLOB NOT NULL, PRIMARY KEY (hash, image)) STRICT, WITHOUT ROWID;
CREATE TABLE blocks (cid BLOB PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE image_blocks (image BLOB NOT NULL, cid BLOB NOT NULL, PRIMARY KEY (image, cid)) STRICT, WITHOUT ROWID;
CREATE INDEX image_blocks_cid ON image_blocks (cid);
CREATE TABLE sources (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: readers keep descriptors by it
    kind TEXT NOT NULL, path BLOB NOT NULL, owned INTEGER NOT NULL,
    dev INTEGER, ino INTEGER, size INTEGER, mtime_ns INTEGER,
    fingerprint BLOB, map BLOB,     -- of a tree
    image BLOB,                     -- of a pack or partial
    moving_to BLOB                  -- a rename under way: at this path the file is the user's
) STRICT;
CREATE INDEX sources_path ON sources (path);
CREATE TABLE chunks (
    digest BLOB NOT NULL, source INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (digest, source)
) STRICT, WITHOUT ROWID;
CREATE INDEX chunks_source ON chunks (source);
CREATE TABLE imports (
    path BLOB NOT NULL, kind TEXT NOT NULL, chunking BLOB NOT NULL, fingerprint BLOB NOT NULL,
    source INTEGER NOT NULL, object BLOB NOT NULL,
    PRIMARY KEY (path, kind, chunking)
) STRICT;
CREATE INDEX imports_source ON imports (source);
CREATE TABLE problems (path TEXT PRIMARY KEY, reason TEXT NOT NULL, time REAL NOT NULL) STRICT;
"""

_CLAIMS = """
CREATE TABLE claims (               -- see store/claims.py
    path TEXT NOT NULL, nar_hash BLOB NOT NULL,
    variant BLOB NOT NULL,          -- of the references: the first 16 bytes of their SHA-256
    kind TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (path, nar_hash, variant, kind, value)
) STRICT, WITHOUT ROWID;
CREATE INDEX claims_nar ON claims (nar_hash);
"""

# See FileStamp. `boot`: when the ctimes were taken.
_CTIMES = """
ALTER TABLE sources ADD COLUMN ctime_ns INTEGER;
CREATE TABLE boot (id TEXT NOT NULL) STRICT;
"""

_MIRRORS = """
CREATE TABLE mirrors (              -- see store/mirrors.py
    thing TEXT PRIMARY KEY,         -- an image id or a peer id
    addrs TEXT NOT NULL,            -- multiaddresses of peers that have it, separated by blanks
    name TEXT, added REAL NOT NULL, looked REAL, problem TEXT
) STRICT;
CREATE TABLE mirrored (
    thing TEXT NOT NULL, image BLOB NOT NULL, name TEXT, size INTEGER NOT NULL,
    listed INTEGER NOT NULL,        -- the publisher has it still
    problem TEXT,
    PRIMARY KEY (thing, image)
) STRICT, WITHOUT ROWID;
CREATE INDEX mirrored_image ON mirrored (image);
"""

_MIGRATIONS = {0: _SCHEMA, 1: _CLAIMS, 2: _MIRRORS, 3: _CTIMES}
"""What makes the next version of each, all in one transaction."""

_SOURCE_COLUMNS = "s.id, s.kind, s.path, s.owned, s.dev, s.ino, s.size, s.mtime_ns, s.ctime_ns, s.image"


class Catalog:
    """The database of one store. Every method may be called from any thread.

    Raises CatalogCorrupt, DiskFull, OutputUnwritable or StoreError where SQLite fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._depth = 0
        self._deferred = 0  # bytes of chunks whose rows are not committed
        self._timer: threading.Timer | None = None
        self._more = self._fewer = False  # chunk rows were added, removed
        self.claims_generation = 0  # counts the changes of the table `claims`
        with self._errors():
            self._db = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA cache_size = -16000")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version in _MIGRATIONS:
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()  # another process may just have done it
            while version in _MIGRATIONS:
                for statement in _MIGRATIONS[version].split(";\n"):
                    db.execute(statement)
                version += 1
                db.execute(f"PRAGMA user_version = {version}")
            db.execute("COMMIT")
        if version != SCHEMA_VERSION:
            raise CatalogCorrupt(
                f"the catalog {self.path} has schema version {version}, and this p2pnode knows {SCHEMA_VERSION}; "
                "use the version of p2pnode that made it, or another --home"
            )
        self._forget_ctimes_of_another_boot()
        # A damaged header or schema shows here; a damaged page when it is first read.
        for table in ("images", "sources", "problems"):
            db.execute(f"SELECT * FROM {table} LIMIT 1").fetchall()

    def _forget_ctimes_of_another_boot(self) -> None:
        """After a power cut a file may have its new ctime and its old bytes."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        except OSError:
            boot = ""  # cannot be told: none is good for longer than this process
        if boot and self._db.execute("SELECT id FROM boot").fetchall() == [(boot,)]:
            return
        with self.transaction() as db:
            db.execute("DELETE FROM boot")
            db.execute("INSERT INTO boot VALUES (?)", (boot,))
            db.execute("UPDATE sources SET ctime_ns = NULL WHERE ctime_ns IS NOT NULL")

    def close(self) -> None:
        with self._lock:
            try:
                self.commit()
            finally:
                if self._timer is not None:
                    self._timer.cancel()
                self._db.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return CatalogCorrupt(
                f"the catalog {self.path} is damaged ({error}); move it away together with its -wal and -shm files, "
                "then provide or fetch the images again (original files and exports are not touched)"
            )
        full = code == sqlite3.SQLITE_IOERR and free_bytes(self.path) < LITTLE_SPACE  # growing the WAL's index failed
        if code == sqlite3.SQLITE_FULL or full:
            return DiskFull(f"the disk of {self.path} is full; make room and run the same command again")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return OutputUnwritable(f"the catalog {self.path} cannot be opened for writing: {error}")
        return StoreError(f"the catalog {self.path} failed: {error}")

    # Transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, committed at the end together with what was deferred."""
        with self._lock, self._errors():
            if self._depth == 0:
                self.commit()
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self._db
            except BaseException:
                self._depth -= 1
                if self._depth == 0:
                    self._more = self._fewer = False
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                raise
            self._depth -= 1
            if self._depth == 0:
                self.commit()

    def defer(self, rows: Iterable[tuple[bytes, int, int, int]], size: int) -> None:
        """Add rows (digest, source, offset, length) for `size` bytes of chunks; committed within the limits above."""
        with self._lock, self._errors():
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?)", rows)
            self._more = True
            self._deferred += size
            if self._deferred >= COMMIT_BYTES:
                self.commit()
            elif self._timer is None:  # one that is running also does: it only comes sooner
                self._timer = threading.Timer(COMMIT_SECONDS, self._commit_late)
                self._timer.daemon = True
                self._timer.start()

    def _commit_late(self) -> None:
        # A failure is no news to anybody here: the next accept or flush meets it again.
        with self._lock, contextlib.suppress(StoreError, sqlite3.ProgrammingError):
            self._timer = None
            self.commit()

    def commit(self) -> None:
        """Commit what was deferred."""
        with self._lock, self._errors():
            if self._depth:
                return
            if not self._db.in_transaction:
                return
            try:
                if self._fewer:
                    self._db.execute("UPDATE images SET held_chunks = NULL")
                elif self._more:
                    self._db.execute("UPDATE images SET held_chunks = NULL WHERE held_chunks < chunks")
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._more = self._fewer = False
                self._deferred = 0

    def query(self, sql: str, *values: Any) -> list[Any]:
        with self._lock, self._errors():
            return self._db.execute(sql, values).fetchall()

    # Chunks

    def held(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of `digests` that have a location."""
        found: set[bytes] = set()
        wanted = list(digests)
        for start in range(0, len(wanted), QUERY_DIGESTS):
            batch = wanted[start : start + QUERY_DIGESTS]
            marks = ",".join("?" * len(batch))
            found.update(row[0] for row in self.query(f"SELECT digest FROM chunks WHERE digest IN ({marks})", *batch))
        return found

    def locations(self, digest: bytes) -> list[Location]:
        """Where a chunk is, our own files first: they are the least likely to have changed."""
        rows = self.query(
            f"SELECT {_SOURCE_COLUMNS}, c.offset, c.length FROM chunks c JOIN sources s ON s.id = c.source"
            " WHERE c.digest = ? ORDER BY s.owned DESC, s.id DESC",
            digest,
        )
        return [Location(_source(row[:-2]), *row[-2:]) for row in rows]

    def locations_at_hand(self, digests: Sequence[bytes]) -> dict[bytes, Location]:
        """For each of `digests`, the first of its `locations`, if it has one; none if the catalog is busy."""
        marks = ",".join("?" * len(digests))
        if not self._lock.acquire(blocking=False):
            return {}
        try:
            rows = self.query(
                f"SELECT {_SOURCE_COLUMNS}, c.offset, c.length, c.digest FROM chunks c"
                f" JOIN sources s ON s.id = c.source WHERE c.digest IN ({marks}) ORDER BY s.owned, s.id",
                *digests,
            )
        finally:
            self._lock.release()
        return {row[-1]: Location(_source(row[:-3]), *row[-3:-1]) for row in rows}

    def add_chunks(self, source: int, chunks: Iterable[tuple[bytes, int, int]]) -> None:
        """Rows (digest, offset, length) of a source; a digest it has already stays where it is."""
        with self.transaction() as db:
            rows = ((digest, source, offset, length) for digest, offset, length in chunks)
            db.executemany("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?, ?)", rows)
            self._more = True

    def drop_chunk(self, digest: bytes, source: int) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM chunks WHERE digest = ? AND source = ?", (digest, source))
            db.execute("DELETE FROM imports WHERE source = ?", (source,))  # so that it is read again
            self._fewer = True

    # Sources

    def add_source(
        self,
        kind: SourceKind,
        path: Path,
        *,
        owned: bool,
        stamp: FileStamp | None = None,
        fingerprint: bytes | None = None,
        map: bytes | None = None,
        image: CID | None = None,
    ) -> int:
        stamps = (stamp.dev, stamp.ino, stamp.size, stamp.mtime_ns, stamp.ctime_ns) if stamp else (None,) * 5
        with self.transaction() as db:
            cursor = db.execute(
                "INSERT INTO sources (kind, path, owned, dev, ino, size, mtime_ns, ctime_ns, fingerprint, map, image)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (kind, os.fsencode(path), owned, *stamps, fingerprint, map, image and image.to_bytes()),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def sources(self, where: str = "1", *values: Any) -> list[Source]:
        return [_source(row) for row in self.query(f"SELECT {_SOURCE_COLUMNS} FROM sources s WHERE {where}", *values)]

    def sources_of(self, digests: Iterable[bytes]) -> list[Source]:
        """All sources that have a location of one of `digests`."""
        found: dict[int, Source] = {}
        wanted = list(digests)
        for start in range(0, len(wanted), QUERY_DIGESTS):
            batch = wanted[start : start + QUERY_DIGESTS]
            marks = ",".join("?" * len(batch))
            where = f"s.id IN (SELECT source FROM chunks WHERE digest IN ({marks}))"
            found.update((source.id, source) for source in self.sources(where, *batch))
        return list(found.values())

    def source_map(self, source: int) -> bytes | None:
        rows = self.query("SELECT map FROM sources WHERE id = ?", source)
        return rows[0][0] if rows else None

    def source_fingerprint(self, source: int) -> bytes | None:
        rows = self.query("SELECT fingerprint FROM sources WHERE id = ?", source)
        return rows[0][0] if rows else None

    def source_digests(self, source: int) -> list[bytes]:
        return [row[0] for row in self.query("SELECT digest FROM chunks WHERE source = ?", source)]

    def is_spare(self, source: int) -> bool:
        """Whether each of its chunks is in another source too."""
        only = "SELECT 1 FROM chunks o WHERE o.digest = c.digest AND o.source != c.source"
        return not self.query(f"SELECT 1 FROM chunks c WHERE c.source = ? AND NOT EXISTS ({only}) LIMIT 1", source)

    def drop_source(self, source: int) -> list[bytes]:
        """Forget a source; the digests it held. Its file is left alone."""
        with self.transaction() as db:
            digests = self.source_digests(source)
            db.execute("DELETE FROM chunks WHERE source = ?", (source,))
            db.execute("DELETE FROM imports WHERE source = ?", (source,))
            db.execute("DELETE FROM sources WHERE id = ?", (source,))
            self._fewer = True
        return digests

    # Problems

    def add_problem(self, path: str, reason: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO problems VALUES (?, ?, ?)", (path, reason, time.time()))
            db.execute(
                "DELETE FROM problems WHERE path NOT IN (SELECT path FROM problems ORDER BY time DESC LIMIT ?)",
                (MAX_PROBLEMS,),
            )


@functools.lru_cache(1024)
def _source(row: tuple[Any, ...]) -> Source:
    id, kind, path, owned, dev, ino, size, mtime_ns, ctime_ns, image = row
    stamp = None if ino is None else FileStamp(dev, ino, size, mtime_ns, ctime_ns)
    where = Path(os.fsdecode(path))
    return Source(id, SourceKind(kind), where, bool(owned), stamp, None if image is None else CID.from_bytes(image))


def open_catalog(path: Path) -> Catalog:
    """Open or create. Raises CatalogCorrupt, DiskFull, OutputUnwritable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(path.parent, error) from error
    return Catalog(path)

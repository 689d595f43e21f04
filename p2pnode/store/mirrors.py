"""What this node mirrors: images, and publishers with all that they list.

Tables of the catalog. A *thing* is an image id or a peer id, as text. Every image that is mirrored has a row for each
thing it is mirrored for, and is pinned (`Pin.MIRROR`) as long as it has one. A publisher may take an image back, such
as when it has collected its own copy; who has mirrored it completely keeps it.

Blocking, as all of the store.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from p2pnode.errors import UsageError
from p2pnode.store.records import ImageRecord, Pin
from p2pnode.store.store import Store
from protocols.catalog import Entry
from protocols.cid import CID
from protocols.errors import CIDError

MAX_MIRRORS = 4096
MAX_ADDRS = 32  # kept of one thing, the newest first


@dataclass(frozen=True, slots=True)
class Mirror:
    """One thing that is mirrored. `image`: its id, None for a publisher, whose peer id is `thing`. `looked`: seconds
    since the epoch at the end of the last look, None before the first; `problem`: what kept that one from its end."""

    thing: str
    addrs: tuple[str, ...] = ()
    name: str | None = None
    added: float = 0.0
    looked: float | None = None
    problem: str | None = None

    @property
    def image(self) -> CID | None:
        try:
            return CID.parse(self.thing)
        except CIDError:
            return None


@dataclass(frozen=True, slots=True)
class Mirrored:
    """One image of a thing. `record`: what is here of it; `size` in bytes, as the publisher says before that."""

    image: CID
    name: str | None
    size: int
    listed: bool
    problem: str | None
    record: ImageRecord | None

    @property
    def complete(self) -> bool:
        return self.record is not None and self.record.complete


@dataclass(frozen=True, slots=True)
class Summary:
    """How a thing is mirrored: how many images it has, and how many of them are here completely."""

    mirror: Mirror
    name: str | None
    images: int
    complete: int


class Mirrors:
    """The list of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._catalog = store.catalog

    def add(self, thing: str, addrs: Sequence[str], name: str | None) -> Mirror:
        """Mirror something from now on; what is mirrored already keeps its place. Raises UsageError at the limit."""
        with self._catalog.transaction() as db:
            known = self.get(thing)
            if known is None:
                ((count,),) = self._catalog.query("SELECT count(*) FROM mirrors")
                if count >= MAX_MIRRORS:
                    raise UsageError(f"{MAX_MIRRORS} things are mirrored already; end one with `p2pnode mirror --stop`")
                db.execute(
                    "INSERT INTO mirrors (thing, addrs, name, added) VALUES (?, '', ?, ?)", (thing, name, time.time())
                )
            merged = list(dict.fromkeys([*addrs, *(known.addrs if known else ())]))[:MAX_ADDRS]
            db.execute("UPDATE mirrors SET addrs = ? WHERE thing = ?", (" ".join(merged), thing))
            mirror = self.get(thing)
            assert mirror is not None
            if mirror.image is not None:
                self._keep_rows(thing, [Entry(mirror.image, name or "", 0)])
        return mirror

    def add_all(self, things: Sequence[tuple[str, Sequence[str], str | None]]) -> list[Mirror]:
        """All of these, or with the error none of them."""
        with self._catalog.transaction():
            return [self.add(*each) for each in things]

    def get(self, thing: str) -> Mirror | None:
        """One thing, by its exact id."""
        return next(iter(self._mirrors("thing = ?", thing)), None)

    def all(self) -> list[Mirror]:
        """All things, in the order in which they were added."""
        return self._mirrors("1")

    def summaries(self) -> list[Summary]:
        """All things, as `all`, with numbers."""
        self._store.count_held()
        rows = self._catalog.query(
            "SELECT d.thing, count(*), coalesce(sum(i.complete AND i.held_chunks = i.chunks), 0), max(i.name)"
            " FROM mirrored d LEFT JOIN images i ON i.id = d.image GROUP BY d.thing"
        )
        counts = {thing: numbers for thing, *numbers in rows}
        summaries = []
        for mirror in self.all():
            images, complete, name = counts.get(mirror.thing, (0, 0, None))
            summaries.append(Summary(mirror, mirror.name or (name if mirror.image else None), images, complete))
        return summaries

    def find(self, text: str) -> Mirror | None:
        """A thing by its id, the beginning of that (8 characters or more; one thing's only), or an image's name."""
        found = self._mirrors("thing = ?", text)
        if not found and len(text) >= 8:
            found = self._mirrors("substr(thing, 1, ?) = ?", len(text), text)
        found = found or self._mirrors("name = ?", text)
        if len(found) > 1:
            raise UsageError(f"{text!r} can mean {len(found)} of the things that are mirrored; give more of the id")
        return found[0] if found else None

    def images(self, thing: str) -> list[Mirrored]:
        """The images of a thing, those that went wrong the last time at the end."""
        rows = self._catalog.query(
            "SELECT image, name, size, listed, problem FROM mirrored WHERE thing = ?"
            " ORDER BY problem IS NOT NULL, NOT listed, image",
            thing,
        )
        return [self._mirrored(row) for row in rows]

    def wanted_by(self, image: CID, *, listed: bool = False) -> list[str]:
        """The things that an image is mirrored for. `listed`: those only that still have it."""
        condition = " AND listed" if listed else ""
        rows = self._catalog.query(f"SELECT thing FROM mirrored WHERE image = ?{condition}", image.to_bytes())
        return [row[0] for row in rows]

    def keep_list(self, thing: str, entries: Sequence[Entry]) -> None:
        """Take over what a publisher lists now. What it lists no more stays if it was here completely at that time."""
        now = {entry.image for entry in entries}
        with self._catalog.transaction() as db:
            if self.get(thing) is None:
                return  # ended meanwhile
            for image in set(self._images_of(thing, " AND listed")) - now:
                record = self._store.record(image)
                if record is not None and record.complete:
                    row = (thing, image.to_bytes())
                    db.execute("UPDATE mirrored SET listed = 0 WHERE thing = ? AND image = ?", row)
                else:
                    self._drop(image, [thing])
            self._keep_rows(thing, entries)

    def _keep_rows(self, thing: str, entries: Iterable[Entry]) -> None:
        with self._catalog.transaction() as db:
            db.executemany(
                "INSERT INTO mirrored VALUES (?, ?, ?, ?, 1, NULL) ON CONFLICT DO UPDATE SET"
                " name = coalesce(excluded.name, name), size = excluded.size, listed = 1",
                ((thing, each.image.to_bytes(), each.name or None, each.size) for each in entries),
            )

    def looked(self, thing: str, problem: str | None) -> None:
        """A look at a thing came to its end."""
        with self._catalog.transaction() as db:
            db.execute(
                "UPDATE mirrors SET looked = ?, problem = ? WHERE thing = ?", (round(time.time(), 3), problem, thing)
            )

    def judged(self, thing: str, image: CID, problem: str | None) -> None:
        """What came of one image."""
        with self._catalog.transaction() as db:
            row = (problem, thing, image.to_bytes())
            db.execute("UPDATE mirrored SET problem = ? WHERE thing = ? AND image = ?", row)

    def stop(self, thing: str) -> None:
        """Mirror a thing no longer. Its images stay, without the pin unless something else wants it."""
        with self._catalog.transaction() as db:
            images = self._images_of(thing)
            db.execute("DELETE FROM mirrors WHERE thing = ?", (thing,))
            for image in images:
                self._drop(image, [thing])

    def release(self, image: CID) -> None:
        """Keep an image no longer for those that do not list it any more."""
        with self._catalog.transaction():
            self._drop(image, sorted({*self.wanted_by(image)}.difference(self.wanted_by(image, listed=True))))

    def unpin_unwanted(self, image: CID) -> None:
        """Take back a pin that was set when nothing wanted the image any more."""
        if not self.wanted_by(image):
            self._drop(image, ())

    def _images_of(self, thing: str, condition: str = "") -> list[CID]:
        rows = self._catalog.query(f"SELECT image FROM mirrored WHERE thing = ?{condition}", thing)
        return [CID.from_bytes(row[0]) for row in rows]

    def _drop(self, image: CID, things: Sequence[str]) -> None:
        with self._catalog.transaction() as db:
            db.executemany(
                "DELETE FROM mirrored WHERE thing = ? AND image = ?", ((thing, image.to_bytes()) for thing in things)
            )
            if not self.wanted_by(image):
                self._store.pin(image, Pin.MIRROR, False)

    def _mirrors(self, where: str, *values: object) -> list[Mirror]:
        rows = self._catalog.query(
            f"SELECT thing, addrs, name, added, looked, problem FROM mirrors WHERE {where} ORDER BY added, thing",
            *values,
        )
        return [Mirror(thing, tuple(addrs.split()), *rest) for thing, addrs, *rest in rows]

    def _mirrored(self, row: tuple[Any, ...]) -> Mirrored:
        key, name, size, listed, problem = row
        image = CID.from_bytes(key)
        record = self._store.record(image)
        return Mirrored(image, name, size if record is None else record.size, bool(listed), problem, record)

"""What an existing binary cache holds as images: `p2pnode cache publish`.

Every store path becomes an image of kind `store-path`, which is found by hash part and by NAR hash whatever else the
cache holds. One image of the whole cache would be another one after every addition, and a closure of each top-level
path would list the paths that they share again and again. Where roots are named, each gets an image of kind `closure`
as well, so that one link gives all of it; that costs its manifest, and is the image that the closure's own machine
would provide.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from p2pnode.errors import (
    CacheError,
    Cancelled,
    ChunkUnavailable,
    DiskFull,
    NixError,
    NodeError,
    NotFound,
    PathError,
    RemoteError,
    StoreError,
    UsageError,
    VerificationFailed,
)
from p2pnode.failures import most_telling
from p2pnode.images.importer import Imported
from p2pnode.images.nar_file import add_store_path, known_nar, land_nar, read_nar
from p2pnode.images.paths import claims_of
from p2pnode.nix.binary_cache import BinaryCache, FileCache, open_cache
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.narinfo import NarInfo
from p2pnode.nix.registered import signed_with
from p2pnode.nix.signatures import SecretKey, Signature, SignedInfo
from p2pnode.nix.storepath import DIGEST_DIGITS, STORE_DIR, StorePath
from p2pnode.nix.trust import Policy, TrustedKeys, require
from p2pnode.nix.trust_policy import Trust
from p2pnode.progress import Progress, Report, silent
from p2pnode.store import Store, claims
from p2pnode.store.imports import ImportKey
from p2pnode.store.records import FileStamp, Origin
from p2pnode.store.space import check_space, write_failure
from p2pnode.threads import in_thread
from protocols.cid import CID
from protocols.errors import ManifestError
from protocols.manifest import Chunking, Image, ImageObject, Kind, encode_image

T = TypeVar("T")

JOBS = 4  # paths at a time; each takes 15 MiB, and what its decompressor needs
LOOKUPS = 16  # narinfos at a time, where a closure is followed
MAX_PATHS = 1 << 16  # in the closures that were asked for; the largest of NixOS have some 10,000
MAX_REFERENCES = 1 << 20  # of them all; a path of nixpkgs has ten
FAILURES = 20  # of the network, in a row, after which a server is asked whether it is still there
MAX_IMAGES = 8  # that are looked at for a NAR that is here already

Root = StorePath | str
"""A store path, or the 32 digits of its hash part."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`keys` sign every path; `trust` says what must be proved; `spool` is a directory for NARs on their way; `name`
    is that of the closure's image, if one root was named."""

    chunking: Chunking
    spool: Path
    keys: Sequence[SecretKey]
    trust: Trust
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """An image that is in the store. `asked`: it was named, or everything was asked for. `new`: it or something that
    was said of it was not here before."""

    imported: Imported
    seconds: float
    asked: bool
    new: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A path of the cache that is not published, and why. `path`: as much of it as is known."""

    path: str
    error: NodeError


@dataclass(frozen=True, slots=True)
class Warned:
    """Something of a path was left out."""

    path: StorePath
    message: str


Outcome = Published | Failed | Warned
Tell = Callable[[Outcome], Awaitable[None]]
"""Called for every outcome as it comes, by several tasks."""


def parse_root(text: str) -> Root:
    """`/nix/store/HASH-NAME`, `HASH-NAME` or the 32 digits of HASH. Raises UsageError."""
    try:
        if text.startswith(STORE_DIR + "/"):
            return StorePath.parse(text.rstrip("/"))
        if len(text) == DIGEST_DIGITS:
            return StorePath.from_base_name(f"{text}-x").digest
        return StorePath.from_base_name(text)
    except NixError:
        raise UsageError(f"{text[:300]!r} is neither a store path nor the hash part of one") from None


def parse_cache(url: str, roots: Sequence[Root], name: str | None) -> BinaryCache:
    """The cache to publish `roots` from, or everything if there are none. Raises UsageError."""
    cache = open_cache(url)
    if not roots and not isinstance(cache, FileCache):
        raise UsageError(
            f"{cache.url} cannot be listed, as no cache on a server can: name what to publish with --path STOREPATH"
        )
    if name is not None and len(roots) != 1:
        raise UsageError("--name names the image of one closure: give one --path with it")
    return cache


async def publish(
    store: Store, cache: BinaryCache, roots: Sequence[Root], settings: Settings, tell: Tell, report: Report = silent
) -> None:
    """Put what `cache` holds, or the closures of `roots`, into the store, and tell of each image and each fault.

    What is here already is not read again. A path that cannot be had or does not verify is told and left out. Raises
    PathError or CacheError if this is no binary cache, RemoteError if its server is gone, StoreError if the disk is
    full or fails; what was told of until then is there.
    """
    run = _Run(store, cache, settings, tell, report)
    try:
        await run.check_cache()
        await trio.to_thread.run_sync(_make_directory, settings.spool)
        await (run.closures(list(dict.fromkeys(roots))) if roots else run.everything())
    except ExceptionGroup as group:
        error = most_telling(group)
        raise error from error.__cause__


class _TooLarge(DiskFull):
    """A path that the disk has no room for; its size may be a lie, and others may fit."""


class _Run:
    """One publication. `objects`: of the paths of closures, once they are here."""

    def __init__(self, store: Store, cache: BinaryCache, settings: Settings, tell: Tell, report: Report) -> None:
        self._store = store
        self._cache = cache
        self._settings = settings
        self._tell = tell
        self._report = report
        self._own_keys = TrustedKeys(key.public_key() for key in settings.keys)
        self._infos: dict[StorePath, NarInfo] = {}
        self._interned: dict[StorePath, StorePath] = {}
        self._found: dict[StorePath, None] = {}  # referred to by what was looked up last
        self._references = 0
        self._objects: dict[StorePath, ImageObject] = {}
        self._errors: dict[str, NodeError] = {}  # of closures only
        self._network_failures = 0
        self._done = self._total = self._paths = self._finished = 0
        self._numbers: tuple[CID | None, dict[bytes, int]] = (None, {})

    async def check_cache(self) -> None:
        try:
            await self._cache.info()
        except CacheError as error:
            raise PathError(str(error)) if self._is_directory else error from None

    @property
    def _is_directory(self) -> bool:
        return isinstance(self._cache, FileCache)

    # What there is

    async def everything(self) -> None:
        assert isinstance(self._cache, FileCache)
        parts = await self._cache.hash_parts()
        self._paths = len(parts)
        await self._each(parts, self._part)

    async def _part(self, part: str) -> None:
        narinfo = await self._cache.narinfo(part)
        if narinfo is None:
            raise CacheError("its narinfo cannot be found")
        await self._path(narinfo, asked=True)

    async def closures(self, roots: Sequence[Root]) -> None:
        await self._follow(roots)
        self._paths, self._finished = len(self._infos), 0
        self._total = sum(narinfo.info.nar_size for narinfo in self._infos.values())
        await self._each(self._infos.values(), self._member, name=lambda narinfo: str(narinfo.info.path))
        by_digest = {path.digest: path for path in self._infos}
        for root in roots:
            path = by_digest.get(root) if isinstance(root, str) else root
            if path is not None and path in self._infos:
                await self._one(path, self._closure, str(path))

    async def _follow(self, roots: Sequence[Root]) -> None:
        """Look up `roots` and all that they refer to."""
        level: list[Root] = list(roots)
        seen: set[Root] = set(level)
        while level:
            await self._each(level, self._look_up, jobs=LOOKUPS)
            if len(self._infos) > MAX_PATHS or self._references > MAX_REFERENCES:
                raise VerificationFailed(
                    f"what {self._cache.url} says to belong to it has more than {MAX_PATHS} paths or {MAX_REFERENCES} "
                    "references; publish less at a time"
                )
            found, self._found = self._found, {}
            level = [path for path in found if path not in seen and path not in self._infos]
            seen.update(level)

    async def _look_up(self, root: Root) -> None:
        if len(self._infos) > MAX_PATHS or self._references > MAX_REFERENCES:
            return  # `_follow` says so
        narinfo = await self._cache.narinfo(root)
        if narinfo is None:
            raise NotFound(f"{self._cache.url} does not have it")
        info = narinfo.info
        references = tuple(self._interned.setdefault(path, path) for path in info.references)
        self._references += len(references)
        self._found.update(dict.fromkeys(references))
        self._infos[info.path] = replace(narinfo, info=replace(info, references=references))
        self._report(Progress("looking up", note=f"{len(self._infos)} paths"))

    async def _member(self, narinfo: NarInfo) -> None:
        self._objects[narinfo.info.path] = await self._path(narinfo, asked=False)

    # Faults

    async def _each(
        self,
        items: Iterable[T],
        work: Callable[[T], Awaitable[None]],
        *,
        name: Callable[[T], str] = str,
        jobs: int = JOBS,
    ) -> None:
        pending = iter(items)

        async def worker() -> None:
            for item in pending:
                await self._one(item, work, name(item))

        async with trio.open_nursery() as nursery:
            for _ in range(jobs):
                nursery.start_soon(worker)

    async def _one(self, item: T, work: Callable[[T], Awaitable[None]], name: str) -> None:
        """Do one thing; a fault of it is told, one of the disk or of the network as a whole is raised."""
        try:
            await work(item)
            self._network_failures = 0
        except (NodeError, ManifestError) as error:
            if isinstance(error, StoreError | Cancelled) and not isinstance(error, _TooLarge):
                raise
            await self._failed(name, error)
            if isinstance(error, RemoteError) and not self._is_directory:
                self._network_failures += 1
                if self._network_failures % FAILURES == 0:
                    await self._cache.info()
        self._finished += 1
        self._show()

    async def _failed(self, name: str, error: NodeError | ManifestError) -> None:
        message = str(error) if name in str(error) else f"{name}: {error}"
        # In a directory nothing is the network's fault, and what is malformed is not the user's mistake.
        unsound = isinstance(error, NixError) or (self._is_directory and isinstance(error, RemoteError))
        kind = VerificationFailed if unsound or isinstance(error, ManifestError) else type(error)
        told = (DiskFull if kind is _TooLarge else kind)(message)
        self._errors.setdefault(name, told)
        await self._tell(Failed(name, told))

    def _show(self) -> None:
        if self._paths:
            note = f"{min(self._finished, self._paths)} of {self._paths} paths"
            self._report(Progress("publishing", self._done, self._total, note=note))

    def _advance(self, count: int) -> None:
        self._done += count
        self._show()

    # One path

    async def _path(self, narinfo: NarInfo, *, asked: bool) -> ImageObject:
        """Bring a path into the store, if it is not there, and tell of it. Raises what is wrong with it."""
        began = time.monotonic()
        info = narinfo.info
        signed = await self._judged(narinfo)
        obj = await trio.to_thread.run_sync(self._known, info)
        new_bytes, reused = 0, obj is not None
        if obj is not None:
            image, new = await trio.to_thread.run_sync(self._add, obj, info, None)
            self._advance(info.nar_size)
        else:
            image, new_bytes = await self._read(narinfo)
            new = True
        said = await trio.to_thread.run_sync(claims.merge, self._store.catalog, [claims_of(signed)])
        imported = Imported(image, info.path.name, image.size, new_bytes, len(image.chunks), reused)
        await self._tell(Published(imported, time.monotonic() - began, asked, new or bool(said)))
        return image.objects[0]

    async def _judged(self, narinfo: NarInfo) -> SignedInfo:
        """What the cache says of a path, less wrong signatures and with our own. Raises Untrusted."""
        info, trust, kept = narinfo.info, self._settings.trust, list[Signature]()
        for signature in narinfo.signatures:
            keys = self._own_keys if signature.key_name in self._own_keys.names else trust.keys
            if signature.key_name in keys.names and not keys.verifying(info, [signature]):
                message = f"the signature in the name of {signature.key_name!r} is wrong and was left out"
                await self._tell(Warned(info.path, message))
            else:
                kept.append(signature)
        # Who signs what lies on his own disk vouches for it. What a server sends must be proved before it is signed.
        if trust.demanded and not (self._is_directory and self._settings.keys):
            require(info, kept, trust.keys, Policy.ALWAYS)
        (signed,) = signed_with(self._settings.keys, [SignedInfo(info, tuple(kept))])
        return signed

    def _known(self, info: PathInfo) -> ImageObject | None:
        """The path as an object if its NAR is here, all of it, and was verified."""
        rows = self._store.catalog.query(
            "SELECT i.id FROM nars n JOIN images i ON i.id = n.image WHERE n.hash = ? AND i.complete"
            f" ORDER BY i.size LIMIT {MAX_IMAGES}",
            info.nar_hash,
        )
        for (id,) in rows:
            image = self._store.image(CID.from_bytes(id))
            number = None if image is None else self._number(image, info.nar_hash)
            if image is None or number is None:
                continue
            obj = image.objects[number]
            if obj.size == info.nar_size and self._store.look_again(obj.layout.digests, quietly=True):
                with suppress(ChunkUnavailable):
                    return known_nar(self._store, obj, info)
        return None

    def _number(self, image: Image, nar_hash: bytes) -> int | None:
        """Which object of an image has this NAR. What was provided as a closure is asked for all of its paths."""
        of, numbers = self._numbers  # several threads are here
        if of != image.id:
            numbers = {obj.nar_hash: n for n, obj in enumerate(image.objects) if obj.nar_hash is not None}
            self._numbers = image.id, numbers
        return numbers.get(nar_hash)

    def _add(self, obj: ImageObject, info: PathInfo, path: Path | None) -> tuple[Image, bool]:
        """The image of a path whose chunks are here, and whether it was not there before."""
        record = self._store.record(encode_image(Kind.STORE_PATH, {}, [obj]).id)
        provided = record is not None and record.complete and record.origin is Origin.PROVIDED
        image = self._store.image(record.id) if record is not None and provided else None
        if image is not None:
            return image, False
        where = None if path is None else str(path)
        return add_store_path(self._store, obj, info.path.name, Origin.PROVIDED, path=where, complete=True), True

    async def _read(self, narinfo: NarInfo) -> tuple[Image, int]:
        """The image of a path that is not here, and the bytes of chunks that are new."""
        if self._is_directory and narinfo.compression == "none":
            return await in_thread(
                lambda cancelled, progress: self._in_place(narinfo, cancelled, progress),
                lambda progress: self._advance(progress.done),
            )
        info, spool = narinfo.info, self._settings.spool
        try:
            await trio.to_thread.run_sync(check_space, spool, 2 * info.nar_size)
        except DiskFull as error:
            raise _TooLarge(f"{info.path}: {error}") from None
        with _nameless(spool) as fd:
            at = 0
            async with aclosing(self._cache.nar(narinfo)) as pieces:
                async for piece in pieces:
                    await trio.to_thread.run_sync(_write, fd, piece, at, spool)
                    at += len(piece)
                    self._advance(len(piece))
            chunking = self._settings.chunking
            obj = await in_thread(lambda cancelled, _: read_nar(fd, info, chunking, cancelled=cancelled), silent)
            new_bytes = await trio.to_thread.run_sync(self._new_bytes, obj)
            land = partial(land_nar, self._store, obj, fd, info.path.name, Origin.PROVIDED)
            return await trio.to_thread.run_sync(land), new_bytes

    def _in_place(self, narinfo: NarInfo, cancelled: Callable[[], bool], report: Report) -> tuple[Image, int]:
        """A NAR that lies in the cache as it is: its chunks are served from there."""
        assert isinstance(self._cache, FileCache)
        info, chunking = narinfo.info, self._settings.chunking
        fd = self._cache.descriptor(narinfo.url)
        if fd is None:
            raise CacheError(f"there is no file {narinfo.url[:200]!r}")
        try:
            stamp = FileStamp.of(os.fstat(fd))
            if stamp.size != info.nar_size or narinfo.file_size not in (None, stamp.size):
                raise VerificationFailed(f"the file of {info.path} does not have the size that its narinfo says")
            obj = read_nar(fd, info, chunking, advance=lambda count: report(Progress("", count)), cancelled=cancelled)
            if narinfo.file_hash is not None and _file_hash(fd, narinfo.file_hash[0], info) != narinfo.file_hash[1]:
                raise VerificationFailed(f"the file of {info.path} does not have the hash that its narinfo says")
            if FileStamp.of(os.fstat(fd)) != stamp:
                raise PathError(f"the file of {info.path} changed while it was read; publish it again")
        except OSError as error:
            raise CacheError(f"{narinfo.url[:200]!r} cannot be read: {error.strerror}") from error
        finally:
            os.close(fd)
        new_bytes = self._new_bytes(obj)
        path = self._cache.directory / narinfo.url
        self._store.remember_object(ImportKey(os.fsencode(path), chunking, f"nar {stamp}".encode()), obj, stamp)
        image, _ = self._add(obj, info, path)
        return image, new_bytes

    def _new_bytes(self, obj: ImageObject) -> int:
        sizes = dict(zip(obj.layout.digests, obj.layout.sizes, strict=True))
        return sum(size for size, here in zip(sizes.values(), self._store.held(sizes), strict=True) if not here)

    # A closure of them

    async def _closure(self, root: StorePath) -> None:
        """The image of a root and all that it refers to, whose paths are images already."""
        began = time.monotonic()
        members = self._requisites(root)
        lacking = sorted(path for path in members if path not in self._objects)
        if lacking:
            error = next((self._errors[str(path)] for path in lacking if str(path) in self._errors), None)
            if lacking == [root] and error is not None:
                return  # told already
            kind = VerificationFailed if error is None else type(error)
            raise kind(
                f"the closure of {root} is not whole, and not published as such: {len(lacking)} of its {len(members)} "
                f"paths could not be, among them {lacking[0]}"
            )
        image, new = await trio.to_thread.run_sync(self._add_closure, root, sorted(members, key=lambda p: p.base_name))
        name = self._settings.name or root.name
        imported = Imported(image, name, image.size, 0, len(image.chunks), True)
        await self._tell(Published(imported, time.monotonic() - began, True, new))

    def _requisites(self, root: StorePath) -> set[StorePath]:
        members, pending = {root}, [root]
        while pending:
            narinfo = self._infos.get(pending.pop())
            new = set(() if narinfo is None else narinfo.info.references) - members
            members |= new
            pending += new
        return members

    def _add_closure(self, root: StorePath, members: Sequence[StorePath]) -> tuple[Image, bool]:
        numbers = {path: number for number, path in enumerate(members)}
        objects = [
            replace(
                self._objects[path], references=tuple(sorted(numbers[ref] for ref in self._infos[path].info.references))
            )
            for path in members
        ]
        attributes = {"root": numbers[root]}
        encoded = encode_image(Kind.CLOSURE, attributes, objects)
        record = self._store.record(encoded.id)
        image = Image(encoded.id, Kind.CLOSURE, attributes, tuple(objects), tuple(encoded.blocks))
        with self._store.catalog.transaction():
            self._store.put_blocks(encoded.blocks)
            name = self._settings.name or root.name
            self._store.add_image(image, name=name, origin=Origin.PROVIDED, complete=True, path=None)
        return image, record is None or not record.complete


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(path, error) from error


@contextmanager
def _nameless(directory: Path) -> Iterator[int]:
    """A file that is gone when it is closed."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise write_failure(directory, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _write(fd: int, data: bytes, at: int, directory: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(fd, view, at)
            view, at = view[count:], at + count
    except OSError as error:
        raise write_failure(directory, error) from error


def _file_hash(fd: int, algorithm: str, info: PathInfo) -> bytes:
    """Of an uncompressed file, whose SHA-256 is that of the NAR."""
    if algorithm == "sha256":
        return info.nar_hash
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).digest()

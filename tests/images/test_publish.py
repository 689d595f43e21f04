"""Binary caches as images: good ones of every compression, and all the ways in which they can be bad."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import lzma
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
import zstandard

from p2pnode.errors import CacheError, NodeError, NotFound, PathError, Untrusted, UsageError, VerificationFailed
from p2pnode.gateway.records import PathRecords, part_of
from p2pnode.images import publish as publishing
from p2pnode.images.importer import import_path
from p2pnode.images.publish import Failed, Outcome, Published, Settings, Warned, parse_cache, parse_root, publish
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.hashes import nix32_encode
from p2pnode.nix.narinfo import NarInfo
from p2pnode.nix.narmap import dump
from p2pnode.nix.signatures import SecretKey, Signature
from p2pnode.nix.storepath import StorePath
from p2pnode.nix.trust_policy import Trust
from p2pnode.store import Store
from protocols.manifest import FASTCDC, Kind
from tests.nix.caches import KEYS, OTHER_SECRET, SECRET
from tests.nix.stores import ChrootStore
from tests.nix.test_binary_cache import Handler, files, response, serving

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
}
LAX = Trust(KEYS, demanded=False)
STRICT = Trust(KEYS, demanded=True)


class Cache:
    """A binary cache in a directory, written path by path."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "nar").mkdir(parents=True)
        (directory / "nix-cache-info").write_text("StoreDir: /nix/store\n")

    def add(
        self,
        name: str,
        size: int = 1000,
        references: Sequence[StorePath] = (),
        compression: str = "none",
        *,
        keys: Sequence[SecretKey] = (SECRET,),
        nar: bytes | None = None,
        itself: bool = False,
    ) -> NarInfo:
        data = random.Random(name).randbytes(size)
        tree = self.directory / "tree"
        tree.write_bytes(data)
        nar = b"".join(dump(tree)) if nar is None else nar
        tree.unlink()
        path = StorePath(nix32_encode(hashlib.sha256(name.encode()).digest()[:20]), name)
        referred = tuple(sorted([*references, *([path] if itself else [])]))
        info = PathInfo(path, hashlib.sha256(nar).digest(), len(nar), referred, None, None)
        file = COMPRESS[compression](nar)
        digest = hashlib.sha256(file).digest()
        url = f"nar/{nix32_encode(digest)}.nar"
        (self.directory / url).write_bytes(file)
        signatures = tuple(key.sign(info) for key in keys)
        return self.write(NarInfo(info, signatures, url, compression, ("sha256", digest), len(file)))

    def write(self, narinfo: NarInfo) -> NarInfo:
        self.narinfo(narinfo).write_text(narinfo.format())
        return narinfo

    def narinfo(self, narinfo: NarInfo) -> Path:
        return self.directory / f"{narinfo.info.path.digest}.narinfo"

    def nar(self, narinfo: NarInfo) -> Path:
        return self.directory / narinfo.url


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


class Publisher:
    """A store, and what was told of the last publication into it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store.open(home)
        self.outcomes: list[Outcome] = []

    async def __call__(
        self,
        url: object,
        *roots: StorePath | str,
        keys: Sequence[SecretKey] = (),
        trust: Trust = LAX,
        name: str | None = None,
    ) -> list[Published]:
        """Publish; the images, in the order in which they came."""
        self.outcomes = outcomes = []

        async def tell(outcome: Outcome) -> None:
            outcomes.append(outcome)

        settings = Settings(FASTCDC, self.home / "spool", keys, trust, name)
        async with parse_cache(str(url), roots, name) as opened:
            await publish(self.store, opened, roots, settings, tell)
        return self.published

    @property
    def published(self) -> list[Published]:
        return [each for each in self.outcomes if isinstance(each, Published)]

    @property
    def failed(self) -> list[Failed]:
        return [each for each in self.outcomes if isinstance(each, Failed)]

    @property
    def warned(self) -> list[Warned]:
        return [each for each in self.outcomes if isinstance(each, Warned)]

    def packs(self) -> list[Path]:
        return list((self.home / "store" / "packs").iterdir())

    def names(self) -> set[str]:
        return {record.name for record in self.store.images() if record.complete}

    def signatures(self, narinfo: NarInfo) -> tuple[Signature, ...]:
        """As the gateway of this node knows them."""
        records = PathRecords(self.store)
        for record in self.store.images():
            image = self.store.image(record.id)
            assert image is not None
            records.learn(image)
        (known, *_) = records.of_part(part_of(narinfo.info.path))
        assert known.complete and known.signed.info == narinfo.info
        assert records.of_nar(narinfo.info.nar_hash)
        return known.signed.signatures


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    made = Publisher(tmp_path / "home")
    yield made
    made.store.close()


def check_whole(store: Store) -> None:
    for record in store.images():
        assert record.complete and store.verify(record.id).ok


@pytest.mark.parametrize("compression", COMPRESS)
async def test_everything_with_its_signatures(cache: Cache, publisher: Publisher, compression: str) -> None:
    lib = cache.add("lib", 3 << 20, (), compression, keys=(SECRET, OTHER_SECRET))
    tool = cache.add("tool", 999, (lib.info.path,), compression, itself=True)
    empty = cache.add("empty", 0, (), compression, keys=())
    published = await publisher(cache.directory)
    assert {each.imported.name for each in published} == {"lib", "tool", "empty"}
    assert not publisher.failed and not publisher.warned
    assert all(each.imported.image.kind is Kind.STORE_PATH and each.asked and each.new for each in published)
    assert sum(each.imported.new_bytes for each in published) == sum(n.info.nar_size for n in (lib, tool, empty))
    for each in (lib, tool, empty):
        assert publisher.signatures(each) == tuple(sorted(each.signatures))
        assert publisher.store.catalog.query("SELECT image FROM nars WHERE hash = ?", each.info.nar_hash)
    check_whole(publisher.store)
    assert (compression == "none") == (not publisher.packs()), "what lies there uncompressed is not copied"

    for file in (cache.directory / "nar").iterdir() if compression != "none" else ():
        file.unlink()  # nothing is read again
    again = await publisher(f"file://{cache.directory}")
    assert len(again) == 3 and not publisher.failed
    assert all(each.imported.reused and not each.new and not each.imported.new_bytes for each in again)


async def test_nars_that_were_moved_are_read_where_they_are_now(cache: Cache, publisher: Publisher) -> None:
    lib = cache.add("lib", 1 << 20)
    (first,) = await publisher(cache.directory)
    moved = cache.directory.rename(cache.directory.with_name("moved"))
    (second,) = await publisher(moved)
    assert second.imported.image.id == first.imported.image.id and not second.imported.reused
    assert not publisher.store.problems()
    check_whole(publisher.store)
    assert publisher.store.catalog.sources()[0].path == moved / lib.url


async def test_what_comes_later_and_new_signatures_of_old_paths(cache: Cache, publisher: Publisher) -> None:
    lib = cache.add("lib")
    await publisher(cache.directory)
    tool = cache.add("tool", references=(lib.info.path,))
    both = (*lib.signatures, OTHER_SECRET.sign(lib.info))
    cache.write(dataclasses.replace(lib, signatures=both))
    published = await publisher(cache.directory)
    assert all(each.new for each in published)
    assert {each.imported.name: each.imported.reused for each in published} == {"lib": True, "tool": False}
    assert publisher.signatures(lib) == tuple(sorted(both))
    assert publisher.signatures(tool) == tool.signatures


async def test_one_nar_of_two_paths_is_held_once(cache: Cache, publisher: Publisher) -> None:
    nar = b"".join(dump(cache.directory / "nix-cache-info"))
    one, two = cache.add("one", nar=nar), cache.add("two", nar=nar)
    published = await publisher(cache.directory)
    assert sum(each.imported.new_bytes for each in published) in (len(nar), 2 * len(nar))  # both at the same time
    assert len(publisher.store.catalog.sources()) == 1
    assert publisher.signatures(one) and publisher.signatures(two)


async def test_what_was_provided_is_not_copied(cache: Cache, publisher: Publisher, tmp_path: Path) -> None:
    """A NAR whose chunks lie in a tree on this machine."""
    cache.add("lib", 2 << 20, (), "xz")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(random.Random("lib").randbytes(2 << 20))
    import_path(publisher.store, tmp_path / "tree", kind=Kind.DIRECTORY)
    (published,) = await publisher(cache.directory)
    assert published.imported.new_bytes < 1 << 20  # the chunks at the ends differ
    check_whole(publisher.store)


def test_roots_and_caches_that_cannot_be_meant() -> None:
    path = StorePath.from_base_name(f"{'0' * 32}-a")
    assert parse_root(str(path)) == parse_root(f"{path}/") == parse_root(path.base_name) == path
    assert parse_root("0" * 32) == "0" * 32
    for text in ("", "a", "0" * 31, "e" * 32, "/nix/store/a", f"{path}/bin", "../" + path.base_name, "0" * 32 + "-"):
        with pytest.raises(UsageError):
            parse_root(text)
    with pytest.raises(UsageError, match="--path"):
        parse_cache("https://cache.example.org", [], None)
    for roots in ([], [path, "1" * 32]):
        with pytest.raises(UsageError, match="--name"):
            parse_cache("/srv/cache", roots, "name")
    with pytest.raises(UsageError):
        parse_cache("ftp://host/x", [path], None)


async def test_no_binary_cache(tmp_path: Path, publisher: Publisher) -> None:
    with pytest.raises(PathError, match="nix-cache-info"):
        await publisher(tmp_path)
    (tmp_path / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    with pytest.raises(PathError, match="gnu"):
        await publisher(tmp_path)


# Closures


@pytest.mark.parametrize("over_http", [False, True])
@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_a_closure_is_one_image(cache: Cache, publisher: Publisher, over_http: bool, compression: str) -> None:
    lib = cache.add("lib", 700_000, (), compression, itself=True)
    data = cache.add("data", 10, (), compression)
    tool = cache.add("tool", 5000, (lib.info.path, data.info.path), compression)
    cache.add("other", 5000, (lib.info.path,), compression)
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(files(cache.directory))) if over_http else cache.directory
        published = await publisher(url, tool.info.path, name="web")
        assert [(each.imported.name, each.imported.image.kind) for each in published if each.asked] == [
            ("web", Kind.CLOSURE)
        ]
        image = published[-1].imported.image
        assert {obj.path for obj in image.objects} == {each.info.path.base_name for each in (lib, data, tool)}
        assert image.objects[int(image.attributes["root"])].path == tool.info.path.base_name
        for narinfo in (lib, data, tool):
            obj = next(obj for obj in image.objects if obj.path == narinfo.info.path.base_name)
            referred = {image.objects[index].path for index in obj.references}
            assert referred == {path.base_name for path in narinfo.info.references}
            assert publisher.signatures(narinfo) == narinfo.signatures
        check_whole(publisher.store)
        assert "other" not in publisher.names()
        again = await publisher(url, tool.info.path.digest)
        assert not any(each.new for each in again) and again[-1].imported.image.id == image.id


@pytest.mark.parametrize("what", ["narinfo", "nar"])
async def test_a_closure_that_is_not_whole(cache: Cache, publisher: Publisher, what: str) -> None:
    lib = cache.add("lib")
    data = cache.add("data")
    tool = cache.add("tool", references=(lib.info.path, data.info.path))
    (cache.narinfo(lib) if what == "narinfo" else cache.nar(lib)).unlink()
    await publisher(cache.directory, tool.info.path, "1" * 32)
    assert publisher.names() == {"tool", "data"}
    failed = {each.path: each.error for each in publisher.failed}
    assert failed.keys() == {"1" * 32, str(lib.info.path), str(tool.info.path)}
    assert str(lib.info.path) in str(failed[str(tool.info.path)])
    expected = NotFound if what == "narinfo" else VerificationFailed
    assert {type(failed[str(each.info.path)]) for each in (lib, tool)} == {expected}


async def test_a_cache_that_never_ends(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that makes up a path, which refers to two more, for whatever is asked."""
    monkeypatch.setattr(publishing, "MAX_PATHS", 100)

    async def handler(target: str, stream: trio.SocketStream) -> None:
        digest = target.strip("/").removesuffix(".narinfo")
        if target == "/nix-cache-info":
            await stream.send_all(response(b"StoreDir: /nix/store\n"))
            return
        name = "x" if digest == "0" * 32 else "y"
        further = [nix32_encode(hashlib.sha256(f"{digest}{n}".encode()).digest()[:20]) for n in range(2)]
        references = tuple(sorted(StorePath(each, "y") for each in further))
        info = PathInfo(StorePath(digest, name), bytes(32), 100, references, None, None)
        await stream.send_all(response(NarInfo(info, (), "nar/x", "none").format().encode()))

    async with serving(handler) as url:
        with pytest.raises(VerificationFailed, match="more than 100 paths"):
            await publisher(url, "0" * 32)
    assert not publisher.store.images()


async def test_a_server_that_fails_is_given_up(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "FAILURES", 3)
    asked: list[bytes] = []

    async def handler(target: str, stream: trio.SocketStream) -> None:
        good = target == "/nix-cache-info" and len(asked) == 1
        await stream.send_all(response(b"", "200 OK" if good else "500 Internal Server Error"))

    async with serving(handler, asked) as url:
        with pytest.raises(CacheError, match="500"):
            await publisher(url, *(f"{number:032}" for number in range(1000)))
    assert len(asked) < 50


# Signatures


async def test_wrong_signatures_are_left_out(cache: Cache, publisher: Publisher) -> None:
    lib, tool = cache.add("lib"), cache.add("tool")
    wrong = Signature(SECRET.name, tool.signatures[0].value)
    unknown = SecretKey.generate("somebody-1").sign(tool.info)  # of another path, but who could tell
    own = SecretKey.generate("own-1")
    forged = Signature(own.name, bytes(64))
    cache.write(dataclasses.replace(lib, signatures=(wrong, unknown, forged)))
    await publisher(cache.directory, keys=[own])
    assert sorted((each.path, each.message.split("'")[1]) for each in publisher.warned) == sorted(
        [(lib.info.path, SECRET.name), (lib.info.path, own.name)]
    )
    assert publisher.signatures(lib) == tuple(sorted([unknown, own.sign(lib.info)]))
    assert publisher.signatures(tool) == tuple(sorted([*tool.signatures, own.sign(tool.info)]))


async def test_what_must_be_proved(cache: Cache, publisher: Publisher) -> None:
    cache.add("signed")
    cache.add("unsigned", keys=())
    stranger = cache.add("stranger", keys=(OTHER_SECRET,))
    await publisher(cache.directory, trust=STRICT)
    assert publisher.names() == {"signed"}
    assert {type(each.error) for each in publisher.failed} == {Untrusted} and len(publisher.failed) == 2
    own = SecretKey.generate("own-1")
    async with serving(files(cache.directory)) as url:  # what comes over a network is not signed unseen
        await publisher(url, stranger.info.path, trust=STRICT, keys=[own])
        assert [type(each.error) for each in publisher.failed] == [Untrusted]
    await publisher(cache.directory, trust=STRICT, keys=[own])
    assert publisher.names() == {"signed", "unsigned", "stranger"} and not publisher.failed


# Interruption


async def test_an_interrupted_publication_goes_on(cache: Cache, publisher: Publisher) -> None:
    for number in range(20):
        cache.add(f"path-{number}", 300_000, (), "xz")
    settings = Settings(FASTCDC, publisher.home / "spool", (), LAX)
    count = 0
    with trio.CancelScope() as scope:

        async def tell(outcome: Outcome) -> None:
            nonlocal count
            count += 1
            if count == 6:
                scope.cancel()
            await trio.lowlevel.checkpoint()

        async with parse_cache(str(cache.directory), (), None) as opened:
            await publish(publisher.store, opened, (), settings, tell)
    assert scope.cancelled_caught
    done = len(publisher.names())
    assert 6 <= done < 20
    published = await publisher(cache.directory)
    assert len([each for each in published if each.imported.reused]) == done
    assert len(publisher.names()) == 20
    check_whole(publisher.store)


# Hostile caches

Spoil = Callable[[Cache, NarInfo], object]


def rewritten(**changes: object) -> Spoil:
    return lambda cache, narinfo: cache.write(dataclasses.replace(narinfo, **changes))  # type: ignore[arg-type]


def with_size(size: Callable[[int], int]) -> Spoil:
    def spoil(cache: Cache, narinfo: NarInfo) -> None:
        info = dataclasses.replace(narinfo.info, nar_size=size(narinfo.info.nar_size))
        cache.write(dataclasses.replace(narinfo, info=info, file_size=None))

    return spoil


def with_file(change: Callable[[bytes], bytes], *, told: bool = False) -> Spoil:
    """The NAR file changed; `told`: as the narinfo says, with no size or hash of the file."""

    def spoil(cache: Cache, narinfo: NarInfo) -> None:
        file = cache.nar(narinfo)
        file.write_bytes(change(file.read_bytes()))
        if told:
            cache.write(dataclasses.replace(narinfo, file_size=None, file_hash=None))

    return spoil


def outside(url: str) -> Spoil:
    """The right NAR, but not within the cache: it is the user's business what else lies on his disk."""

    def spoil(cache: Cache, narinfo: NarInfo) -> None:
        cache.nar(narinfo).rename(cache.directory.parent / "x.nar")
        cache.write(dataclasses.replace(narinfo, url=url.format(parent=cache.directory.parent)))

    return spoil


def huge(cache: Cache, narinfo: NarInfo) -> None:
    with cache.narinfo(narinfo).open("ab") as file:
        file.truncate(1 << 30)


def of_another(cache: Cache, narinfo: NarInfo) -> None:
    another = cache.add("another")
    cache.narinfo(another).rename(cache.narinfo(narinfo))


def link(target: str) -> Spoil:
    def spoil(cache: Cache, narinfo: NarInfo) -> None:
        cache.narinfo(narinfo).unlink()
        cache.narinfo(narinfo).symlink_to(target)

    return spoil


def instead(make: Callable[[Path], object], *, nar: bool) -> Spoil:
    def spoil(cache: Cache, narinfo: NarInfo) -> None:
        place = cache.nar(narinfo) if nar else cache.narinfo(narinfo)
        place.unlink()
        make(place)

    return spoil


def no_nar(cache: Cache, narinfo: NarInfo) -> None:
    """Right hashes of something that no Nix would unpack."""
    nar = cache.nar(narinfo)
    data = b"not a NAR at all" * 100
    nar.write_bytes(data)
    info = dataclasses.replace(narinfo.info, nar_hash=hashlib.sha256(data).digest(), nar_size=len(data))
    cache.write(dataclasses.replace(narinfo, info=info, compression="none", file_hash=None, file_size=None))


SPOILED: dict[str, Spoil] = {
    "truncated": with_file(lambda data: data[:-100]),
    "truncated, not told": with_file(lambda data: data[:-100], told=True),
    "longer": with_file(lambda data: data + b"x", told=True),
    "changed": with_file(lambda data: data[:-200] + b"changed" + data[-193:], told=True),
    "empty": with_file(lambda data: b"", told=True),
    "smaller size": with_size(lambda size: size - 8),
    "larger size": with_size(lambda size: size + 8),
    "enormous size": with_size(lambda size: 1 << 60),
    "traversal": rewritten(url="../../etc/passwd"),
    "traversal to what is right": outside("nar/../../x.nar"),
    "absolute path": rewritten(url="/etc/passwd"),
    "absolute path of what is right": outside("{parent}/x.nar"),
    "scheme of what is right": outside("file://{parent}/x.nar"),
    "another server": rewritten(url="http://127.0.0.1:9/nar/x.nar"),
    "another scheme": rewritten(url="file:///etc/passwd"),
    "not there": rewritten(url="nar/x.nar"),
    "unknown compression": rewritten(compression="br"),
    "wrong compression": rewritten(compression="gzip"),
    "wrong FileHash": rewritten(file_hash=("sha256", bytes(32))),
    "wrong FileHash of another kind": rewritten(file_hash=("md5", bytes(16))),
    "wrong FileSize": rewritten(file_size=17),
    "removed": lambda cache, narinfo: cache.nar(narinfo).unlink(),
    "no NAR": no_nar,
    "another path": of_another,
    "1 GiB narinfo": huge,
    "binary narinfo": lambda cache, narinfo: cache.narinfo(narinfo).write_bytes(bytes(range(256))),
    "narinfo leads to passwd": link("/etc/passwd"),
    "narinfo leads nowhere": link("nowhere"),
    "narinfo leads to itself": lambda cache, narinfo: link(cache.narinfo(narinfo).name)(cache, narinfo),
    "narinfo is a fifo": instead(os.mkfifo, nar=False),
    "narinfo is a directory": instead(Path.mkdir, nar=False),
    "NAR is a fifo": instead(os.mkfifo, nar=True),
    "NAR is a device": instead(lambda path: path.symlink_to("/dev/zero"), nar=True),
    "NAR is a directory": instead(Path.mkdir, nar=True),
}


@pytest.mark.parametrize("compression", ["none", "xz"])
@pytest.mark.parametrize("how", SPOILED)
async def test_a_bad_path_is_told_and_the_rest_goes_on(
    cache: Cache, publisher: Publisher, how: str, compression: str
) -> None:
    bad = cache.add("bad", 400_000, (), compression)
    SPOILED[how](cache, bad)
    cache.add("good", 1000, (bad.info.path,), compression)
    with trio.fail_after(20):
        await publisher(cache.directory)
    assert publisher.names() == {"good"}
    (failed,) = publisher.failed
    assert bad.info.path.digest in failed.path and bad.info.path.digest in str(failed.error)
    assert failed.error.exit_code == (5 if how == "enormous size" and compression != "none" else 4)
    assert "\n" not in str(failed.error) and len(str(failed.error)) < 1000
    assert [record.name for record in publisher.store.images()] == ["good"]
    assert not list((publisher.home / "spool").iterdir())
    assert len(publisher.packs()) == (compression != "none")


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_links_to_what_is_right_are_followed(cache: Cache, publisher: Publisher, compression: str) -> None:
    lib = cache.add("lib", 400_000, (), compression)
    for place in (cache.narinfo(lib), cache.nar(lib)):
        target = cache.directory.parent / f"real-{place.name}"
        place.rename(target)
        place.symlink_to(target)
    await publisher(cache.directory)
    assert publisher.signatures(lib) == lib.signatures
    check_whole(publisher.store)


@pytest.mark.parametrize("compression", ["xz", "zstd"])
async def test_a_bomb_ends_at_its_size(cache: Cache, publisher: Publisher, compression: str) -> None:
    bomb = cache.add("bomb", 1000, (), compression)
    cache.nar(bomb).write_bytes(COMPRESS[compression](bytes(200 << 20)))
    cache.write(dataclasses.replace(bomb, file_hash=None, file_size=None))
    await publisher(cache.directory)
    (failed,) = publisher.failed
    assert isinstance(failed.error, VerificationFailed) and not publisher.store.images()


@pytest.mark.parametrize(
    ("url", "works"), [("nar/x.nar", True), ("{elsewhere}/nar/x.nar", True), ("../nar/x.nar", False), ("/x", False)]
)
async def test_where_a_server_may_send_us(cache: Cache, publisher: Publisher, url: str, works: bool) -> None:
    """Anywhere on the web, as Nix lets it, for the NAR is checked; but not about its own tree."""
    lib = cache.add("lib", 400_000, (), "xz")
    cache.nar(lib).rename(cache.directory / "nar/x.nar")

    async with serving(files(cache.directory)) as elsewhere, serving(files(cache.directory)) as server:
        cache.write(dataclasses.replace(lib, url=url.format(elsewhere=elsewhere)))
        await publisher(server, lib.info.path)
    assert publisher.names() == ({"lib"} if works else set())
    assert bool(publisher.failed) != works
    if works:
        check_whole(publisher.store)


def broken(kind: str, cache: Cache, bad: NarInfo) -> Handler:
    good = files(cache.directory)

    async def handler(target: str, stream: trio.SocketStream) -> None:
        if bad.url not in target:
            await good(target, stream)
            return
        data = cache.nar(bad).read_bytes()
        match kind:
            case "500":
                await stream.send_all(response(b"", "500 Internal Server Error"))
            case "cut":
                await stream.send_all(response(data[:-1], length=len(data)))
                await stream.aclose()
            case "longer":
                await stream.send_all(response(data + bytes(1 << 20)))
            case "closed":
                await stream.aclose()

    return handler


@pytest.mark.parametrize("compression", ["none", "xz"])
@pytest.mark.parametrize("kind", ["500", "cut", "longer", "closed"])
async def test_a_server_that_breaks_off(cache: Cache, publisher: Publisher, kind: str, compression: str) -> None:
    bad = cache.add("bad", 400_000, (), compression)
    good = cache.add("good", 1000, (bad.info.path,), compression)
    async with serving(broken(kind, cache, bad)) as url:
        await publisher(url, good.info.path)
    assert publisher.names() == {"good"}
    codes: dict[str, NodeError] = {each.path: each.error for each in publisher.failed}
    assert set(codes) == {str(bad.info.path), str(good.info.path)}
    assert {error.exit_code for error in codes.values()} <= {4, 6}
    assert not list((publisher.home / "spool").iterdir())


# Against the real Nix


@pytest.mark.nix
@pytest.mark.parametrize("compression", ["none", "xz", "zstd"])
async def test_images_are_those_that_the_machine_itself_provides(
    tmp_path: Path, publisher: Publisher, compression: str
) -> None:
    store = ChrootStore(tmp_path / "n")
    (tmp_path / "text").write_text("a text")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/data").write_bytes(os.urandom(700_000))
    (tmp_path / "tree/link").symlink_to("data")
    paths = [store.add(tmp_path / "text"), store.add(tmp_path / "tree")]
    flat = StorePath.parse(store.nix_store("--add-fixed", "sha256", tmp_path / "text").strip())
    recursive = StorePath.parse(store.nix_store("--add-fixed", "--recursive", "sha1", tmp_path / "tree").strip())
    top = StorePath(nix32_encode(bytes(20)), "top")
    paths += [flat, recursive]
    store.register([(top, b"top", [*paths, top])])
    store.copy_to(f"file://{tmp_path}/cache?compression={compression}", top, *paths)
    published = await publisher(tmp_path / "cache")
    found = {each.imported.image.objects[0].path: each.imported.image.id for each in published}
    (closure,) = [each for each in await publisher(tmp_path / "cache", top) if each.asked]
    with Store.open(tmp_path / "other") as other:
        for path in (*paths, top):
            made = import_path(other, Path(str(path)), kind=Kind.STORE_PATH, nix_store=store.root)
            assert found[path.base_name] == made.image.id
        made = import_path(other, Path(str(top)), kind=Kind.CLOSURE, nix_store=store.root)
        assert closure.imported.image.id == made.image.id

"""A mirror takes over all that is known of an image, and what goes wrong with one thing stays with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pnode import link
from p2pnode.errors import NotFound, PeerUnreachable, StoreError, UsageError
from p2pnode.progress import Progress, Report, silent
from p2pnode.store import Store, mirrors
from p2pnode.store.mirrors import Mirror, Mirrors
from p2pnode.store.records import Pin
from p2pnode.swarm import mirroring
from p2pnode.swarm.mirroring import Mirroring
from p2pnode.swarm.publishing import CatalogServer
from protocols.cid import CID, Codec

from .test_exchange import Peer, World, content
from .test_records import KEY, keep_image, keep_signed, kept, provide


async def test_a_mirror_does_not_end_before_all_have_told_what_they_know(world: World, tmp_path: Path) -> None:
    """The bytes come from one peer, and the signatures from another that is found later."""
    plain, signer, hasty, mirror = [await world.peer(name) for name in ("plain", "signer", "hasty", "mirror")]
    for name, seed in (("plain", plain), ("signer", signer)):
        (tmp_path / "trees" / name).mkdir(parents=True)
        image = keep_image(seed.store, tmp_path / "trees" / name)
    keep_signed(signer.store, image, KEY)
    for leech in (hasty, mirror):

        async def slow_discovery(root: CID, leech: Peer = leech) -> int:
            await leech.exchange.join("plain")
            await trio.sleep(0.5)
            await leech.exchange.join("signer")
            return 2

        leech.fetcher._discover = slow_discovery
    await hasty.fetch(image.id)
    assert kept(hasty, image) == [(), ()]
    await mirror.fetch(image.id, mirror=True)
    assert kept(mirror, image) == kept(signer, image) != [(), ()]
    record = mirror.store.record(image.id)
    assert record is not None and record.pinned and record.complete


async def test_signatures_that_come_later_are_heard_of(world: World, tmp_path: Path) -> None:
    seed, mirror = await world.peer("seed"), await world.peer("mirror")
    image = keep_image(seed.store, tmp_path)
    provide(seed, image)
    await mirror.fetch(image.id, mirror=True)
    assert kept(mirror, image) == [(), ()]
    keep_signed(seed.store, image, KEY)
    await seed.exchange.tell(image.id)
    assert await mirror.fetcher.whole(image.id) is not None
    await mirror.fetcher.hear(image)
    assert kept(mirror, image) == kept(seed, image) != [(), ()]
    assert mirror.exchange.traffic("seed").received < image.size * 1.1
    # And nobody being there is no reason to wait.
    await world.fabric.stop("seed")
    world.registry.clear()
    began = trio.current_time()
    await mirror.fetcher.hear(image)
    assert trio.current_time() - began < 1


class Machine:
    """The mirroring of one node, whose fetches can be looked at, held, and made to fail."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.failing: set[CID] = set()
        self.held = trio.Event()
        self.held.set()
        self.active = self.most = 0
        self.kept: list[CID] = []
        self.wanted: dict[CID, link.Link] = {}
        self.looks = 0
        self.mirroring = Mirroring(peer.store, self.keep, peer.network, self.reach)
        self.mirrors = Mirrors(peer.store)

    async def keep(self, wanted: link.Link, *, timeout: float, hear: bool, report: Report) -> dict[str, Any]:
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            report(Progress("fetching", 1, 2, 1))
            await self.held.wait()
            await trio.lowlevel.checkpoint()
            if wanted.image in self.failing:
                raise NotFound(f"none of the peers knows image {wanted.image}")
            self.kept.append(wanted.image)
            self.wanted[wanted.image] = wanted
            return {"image": str(wanted.image), "received_bytes": 0}
        finally:
            self.active -= 1

    async def reach(self, peer: str, addrs: Sequence[str]) -> None:
        self.looks += 1
        await self.peer.network.connect(peer, addrs)


@pytest.fixture
async def machine(world: World) -> Machine:
    return Machine(await world.peer("b"))


async def publisher(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> list[CID]:
    """A publisher with the peer id "p", which in these tests is taken for one."""
    seed = await world.peer("p")
    CatalogServer(seed.network, seed.store, publish=True)
    found = []
    for number in range(images):
        path = tmp_path / f"image-{number}"
        path.write_bytes(content(1000, number))
        found.append(seed.provide(path).id)
    parse = link.parse_thing
    monkeypatch.setattr(link, "parse_thing", lambda text: link.Publisher(text) if len(text) == 1 else parse(text))
    return found


async def test_many_images_a_few_at_a_time_and_failures_apart(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = await publisher(world, tmp_path, monkeypatch, 12)
    machine.failing = {images[3]}
    reports: list[Progress] = []
    rows = await machine.mirroring.mirror(["p"], timeout=5, report=reports.append)
    assert machine.most == mirroring.TOGETHER
    assert {row["image"] for row in rows if "error" not in row} == {str(each) for each in images} - {str(images[3])}
    (failed,) = [row for row in rows if "error" in row]
    assert (failed["image"], failed["mirror"], failed["exit_code"]) == (str(images[3]), "p", 3)
    assert reports[-1].note == "12 of 12 images" and reports[-1].total >= 12
    mirror = machine.mirrors.get("p")
    assert mirror is not None and mirror.looked and (mirror.problem or "").startswith("1 of 12 images: none of")
    assert {each.name for each in machine.wanted.values()} == {f"image-{n}" for n in range(12) if n != 3}
    machine.failing.clear()
    await machine.mirroring.mirror(["p"], timeout=5, report=silent)
    mirror = machine.mirrors.get("p")
    assert mirror is not None and mirror.problem is None


async def test_a_publisher_that_is_gone_keeps_no_image_from_being_mended(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = await publisher(world, tmp_path, monkeypatch, 2)
    await machine.mirroring.mirror(["p"], timeout=5, report=silent)
    await world.fabric.stop("p")
    machine.kept.clear()
    rows = await machine.mirroring.mirror(["p"], timeout=5, report=silent)
    assert [row["error"] for row in rows if "error" in row] == [PeerUnreachable.__name__]
    assert set(machine.kept) == set(images)


async def test_a_daemon_looks_again_until_it_is_told_to_stop(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    images = await publisher(world, tmp_path, monkeypatch, 1)
    machine.mirrors.add("p", (), None)  # by an earlier run
    nursery.start_soon(machine.mirroring.run, 0.05)

    async def looks(count: int) -> None:
        with trio.fail_after(10):
            while machine.looks < count:
                await trio.sleep(0.01)

    await looks(3)
    assert images[0] in machine.kept
    machine.held = trio.Event()  # a fetch that does not end ...
    with trio.fail_after(10):
        while not machine.active:
            await trio.sleep(0.01)
    machine.mirroring.stop("p")
    with trio.fail_after(1):
        while machine.active:  # ... ends now
            await trio.sleep(0.01)
    machine.mirrors.stop("p")
    before = machine.looks
    await trio.sleep(0.2)
    assert machine.looks == before

    # A command that is interrupted leaves its work to the daemon.
    with trio.move_on_after(0.2):
        await machine.mirroring.mirror(["p"], timeout=5, report=silent)
    machine.held.set()
    await looks(before + 3)
    nursery.cancel_scope.cancel()


async def test_stopping_ends_a_command_that_waits(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publisher(world, tmp_path, monkeypatch, 1)
    machine.held = trio.Event()
    rows: list[dict[str, Any]] = []

    async def command() -> None:
        rows.extend(await machine.mirroring.mirror(["p"], timeout=5, report=silent))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(command)
        while not machine.active:
            await trio.sleep(0.01)
        machine.mirroring.stop("p")
    assert [row["error"] for row in rows] == ["UsageError"] and "stopped" in rows[0]["message"]


async def test_one_thing_that_is_no_thing_and_nothing_is_remembered(machine: Machine) -> None:
    image = "bafyr4ihfsrdbtbfhtqupjvfxdil7j2k5ujol2h4kirv4pq5vbqo3kz7hbu"
    with pytest.raises(UsageError, match="no link, image id, peer id or address"):
        await machine.mirroring.mirror([image, "what"], timeout=5, report=silent)
    assert machine.mirrors.all() == []


async def test_what_is_too_many_is_refused_as_a_whole(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "MAX_MIRRORS", 1)
    images = [str(CID.of(Codec.DAG_CBOR, bytes([number]))) for number in range(2)]
    with pytest.raises(UsageError, match="mirrored already"):
        await machine.mirroring.mirror(images, timeout=5, report=silent)
    assert machine.mirrors.all() == []


async def test_a_disk_that_fails_for_a_moment_ends_no_daemon(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    await publisher(world, tmp_path, monkeypatch, 1)
    machine.mirrors.add("p", (), None)
    get, failures = Mirrors.get, [StoreError("the catalog cannot be read")] * 2

    def failing(self: Mirrors, thing: str) -> Mirror | None:
        if failures:
            raise failures.pop()
        return get(self, thing)

    monkeypatch.setattr(Mirrors, "get", failing)
    nursery.start_soon(machine.mirroring.run, 0.05)
    with trio.fail_after(10):
        while machine.looks < 2:
            await trio.sleep(0.01)
    assert not failures
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("by", ["the user", "the publisher"])
async def test_no_pin_outlasts_what_it_is_for(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """An image is let go in the moment in which a thread is about to pin it, or is still in the queue of a look."""
    (image,) = await publisher(world, tmp_path, monkeypatch, 1)
    store = machine.peer.store
    (tmp_path / "mine").write_bytes((tmp_path / "image-0").read_bytes())
    machine.peer.provide(tmp_path / "mine")
    keeping, go = trio.Event(), trio.Event()

    async def keep(wanted: link.Link, *, timeout: float, hear: bool, report: Report) -> dict[str, Any]:
        with trio.CancelScope(shield=True):  # as a worker thread is
            keeping.set()
            await go.wait()
            store.pin(wanted.image, Pin.MIRROR)
        await trio.lowlevel.checkpoint()
        return {"image": str(wanted.image)}

    machine.mirroring._keep = keep
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(machine.mirroring.mirror, ["p"], timeout=5, report=silent))
        await keeping.wait()
        if by == "the user":
            machine.mirroring.stop("p")
            machine.mirrors.stop("p")
        else:
            store.catalog.drop_chunk(*_one_chunk(store, image))
            machine.mirrors.keep_list("p", [])
        go.set()
    record = store.record(image)
    assert record is not None and not record.pinned


def _one_chunk(store: Store, image: CID) -> tuple[bytes, int]:
    known = store.image(image)
    assert known is not None
    digest = next(iter(known.chunks))
    return digest, store.catalog.locations(digest)[0].source.id


async def test_one_image_of_two_things_counts_once(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = await publisher(world, tmp_path, monkeypatch, 2)
    reports: list[Progress] = []
    await machine.mirroring.mirror(["p", str(images[0])], timeout=5, report=reports.append)
    assert reports[-1].note == "2 of 2 images"


async def test_a_daemon_does_not_remember_all_that_ever_failed(
    world: World, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring, "MAX_NOTED", 3)
    images = await publisher(world, tmp_path, monkeypatch, 6)
    machine.failing = set(images[:4])
    await machine.mirroring.mirror(["p"], timeout=5, report=silent)
    assert len(machine.mirroring._rests) == 3 and len(machine.mirroring._heard) == 2


async def test_a_mirror_is_complete_when_the_disk_has_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the catalog and the metadata of the pack are looked at from then on, also after a power cut."""
    seed, mirror = await world.peer("seed"), await world.peer("mirror")
    (tmp_path / "image").write_bytes(content(1 << 20))
    image = seed.provide(tmp_path / "image")
    sync, broken, synced = os.fdatasync, [True], []

    def failing(fd: int) -> None:
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        assert not mirror.store.record(image.id).complete  # type: ignore[union-attr]

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(StoreError):
        await mirror.fetch(image.id, mirror=True)
    record = mirror.store.record(image.id)
    assert record is not None and not record.complete and record.held_chunks == record.chunks
    broken.clear()
    await mirror.fetch(image.id, mirror=True)
    record = mirror.store.record(image.id)
    assert record is not None and record.complete
    assert [Path(path).suffix for path in synced] == [".pack"]

"""A second machine keeps complete copies: publisher A, mirror B, consumer C, with real processes and a real Nix."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swarmlib.content import difference, write_random
from swarmlib.control import ask
from swarmlib.process import Daemon, Finished, Home

from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.storepath import StorePath
from tests.e2e.conftest import Nodes
from tests.e2e.test_gateway import KEY, Consumer, Publisher, closure
from tests.e2e.test_resume import sent, slow_source, wait_until_sent
from tests.e2e.test_transfer import wait_announced
from tests.nix.stores import ChrootStore

MIB = 1 << 20
IN_FLIGHT = 12 * MIB  # what may be on its way, or received and not committed yet (8 MiB), when the power goes
KEYS = {"image", "kind", "path", "bytes", "received_bytes", "duplicate_bytes", "from", "banned", "relayed_bytes"}
KEYS |= {"connections", "seconds", "pinned", "mirror"}


def mirrors(node: Daemon) -> dict[str, dict[str, Any]]:
    """What a daemon mirrors, by image id or peer id."""
    return {row["mirror"]: row for row in ask(node.home.path, "mirrors") or []}


def wait_for(node: Daemon, thing: str, so: Callable[[dict[str, Any]], object], seconds: float = 60) -> dict[str, Any]:
    """What a daemon says of a thing that it mirrors, once `so` is true of it."""
    deadline = time.monotonic() + seconds
    while True:
        row = mirrors(node).get(thing)
        if row is not None and so(row):
            return row
        assert time.monotonic() < deadline, (row, node.log)
        time.sleep(0.05)


def names(row: dict[str, Any], *, listed: bool = True) -> set[str]:
    return {each["name"] for each in row["images"] if each["complete"] and each["listed"] == listed}


def packs(node: Daemon) -> list[Path]:
    return list((node.home.path / "store" / "packs").glob("*.pack"))


def rows(finished: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in finished.stdout.splitlines()]


def provide(node: Daemon, path: Path, size: int) -> dict[str, Any]:
    write_random(path, size, path.name)
    return node.run("provide", str(path)).check().json


@pytest.mark.slow
@pytest.mark.nix
def test_the_publisher_goes_and_consumers_go_on(nodes: Nodes, tmp_path: Path) -> None:
    meeting_point = nodes.daemon("m")
    parts = closure(11, *[4 * MIB] * 10)
    publisher = Publisher(nodes, "a", parts, meeting_point, faults=["--rate", "16M"])
    link, image, size = (publisher.said[key] for key in ("link", "image", "bytes"))
    mirror = nodes.daemon("b", via=meeting_point)  # has no key: signatures are handed on by those who cannot judge them
    command = mirror.begin("mirror", link)
    wait_until_sent(publisher.daemon, size // 2, command)
    mirror.kill()
    assert command.wait(10).code == 6

    mirror = nodes.daemon("b", via=meeting_point)  # goes on without being told
    row = wait_for(mirror, image, lambda row: row["complete"] and row["looked"])
    assert row["problem"] is None and row["images"][0]["pinned"]
    transferred = sent(publisher.daemon)
    print(f"{transferred / MIB:.1f} MiB sent for {size / MIB:.1f} MiB, with a kill -9 in the middle")
    assert size <= transferred <= size + IN_FLIGHT
    again = mirror.run("mirror", link).check().json
    assert again.keys() == KEYS
    assert (again["received_bytes"], again["pinned"], again["bytes"]) == (0, True, size)
    assert sent(publisher.daemon) == transferred
    wait_announced(mirror)

    publisher.daemon.run("rm", image).check()
    assert publisher.daemon.run("images").check().stdout == ""
    publisher.daemon.stop()
    assert mirror.run("verify", image).check().json["ok"]

    # By the publisher's own link: who has it now is found.
    home = nodes.home("c", bootstrap=meeting_point.addrs[:1])
    trusting = ["--require-signatures", "always", "--trusted-key", str(KEY.public_key())]
    fetched = nodes.begin("fetch", link, *trusting, "-o", tmp_path / "out", home=home).wait(60).check().json
    assert fetched["from"].keys() == {mirror.peer_id}
    for path, data, _ in parts:
        assert (tmp_path / "out" / path.base_name).read_bytes() == data
    consumer = Consumer(nodes, "d", meeting_point)
    done = consumer.copy(publisher.top)
    assert done.returncode == 0, done.stderr
    consumer.verify(publisher.top)


@pytest.mark.slow
def test_a_publisher_is_followed(nodes: Nodes, tmp_path: Path) -> None:
    publisher = nodes.daemon("a", extra={"publish": True})
    for name in ("one", "two"):
        provide(publisher, tmp_path / name, 3 * MIB)
    settings = {"mirror_interval": 1}
    mirror = nodes.daemon("b", extra=settings)
    done = mirror.run("mirror", publisher.addrs[0]).check()
    assert {row["bytes"] for row in rows(done)} == {3 * MIB} and len(rows(done)) == 2
    assert all(row["pinned"] and row["mirror"] == publisher.peer_id for row in rows(done))
    assert names(mirrors(mirror)[publisher.peer_id]) == {"one", "two"}

    third = provide(publisher, tmp_path / "three", MIB)
    wait_for(mirror, publisher.peer_id, lambda row: names(row) == {"one", "two", "three"})
    refused = mirror.run("rm", "three")
    assert refused.code == 2 and f"mirror --stop {publisher.peer_id}" in refused.json["message"]
    assert mirror.run("unpin", "three").code == 2

    # What the publisher removes is kept, until somebody here lets it go.
    publisher.run("rm", "one").check()
    wait_for(mirror, publisher.peer_id, lambda row: names(row, listed=False) == {"one"})
    mirror.stop()
    mirror.start()
    mirror.ready()
    before = wait_for(mirror, publisher.peer_id, lambda row: row["looked"])
    assert names(before, listed=False) == {"one"} and before["complete"]
    refused = mirror.run("rm", "one")
    assert refused.code == 2 and "p2pnode unpin" in refused.json["message"]
    assert mirror.run("unpin", "one").check().json["pinned"] is False
    mirror.run("rm", "one").check()
    looked = mirrors(mirror)[publisher.peer_id]["looked"]
    row = wait_for(mirror, publisher.peer_id, lambda row: row["looked"] > looked)
    assert names(row) == {"two", "three"} and names(row, listed=False) == set()

    # A publisher that is gone is a problem that is told; what is here stays.
    publisher.stop()
    row = wait_for(mirror, publisher.peer_id, lambda row: row["problem"])
    assert names(row) == {"two", "three"}
    assert mirror.run("pin", "two").check().json["pinned"] is True
    assert mirror.run("mirror", "--stop", publisher.addrs[0]).check().json["mirror"] == publisher.peer_id
    assert mirrors(mirror) == {}
    assert mirror.run("rm", "three").check().json["image"] == third["image"]
    assert mirror.run("rm", "two").code == 2  # the user's own pin
    mirror.run("unpin", "two").check()
    mirror.run("rm", "two").check()


@pytest.mark.slow
def test_without_a_daemon(nodes: Nodes, tmp_path: Path) -> None:
    source, original, link = slow_source(nodes, 24 * MIB)
    small = provide(source, tmp_path / "small", 2 * MIB)
    home = nodes.home("b")

    # Ctrl-C, and again.
    command = nodes.begin("mirror", link, small["link"], home=home)
    wait_until_sent(source, 12 * MIB, command)
    command.signal(signal.SIGINT)
    interrupted = command.wait(10)
    assert interrupted.code == 130 and "Traceback" not in interrupted.stderr
    listed = rows(nodes.begin("mirror", home=home).wait())
    assert len(listed) == 2 and not all(row["complete"] for row in listed)
    done = rows(nodes.begin("mirror", link, small["link"], home=home).wait(60).check())
    assert {row["image"] for row in done} == {link[8:67], small["image"]} and all(row["pinned"] for row in done)
    assert sum(row["received_bytes"] for row in done) <= 26 * MIB
    assert sent(source) <= 26 * MIB + IN_FLIGHT
    done = rows(nodes.begin("mirror", link, small["link"], home=home).wait(60).check())
    assert [row["received_bytes"] for row in done] == [0, 0]
    assert all(row["complete"] for row in rows(nodes.begin("mirror", home=home).wait()))

    # What vanished is fetched again, and nothing else.
    packs = sorted((home.path / "store" / "packs").iterdir(), key=lambda path: path.stat().st_size)
    packs[0].unlink()
    done = rows(nodes.begin("mirror", link, small["link"], home=home).wait(60).check())
    assert sum(row["received_bytes"] for row in done) == pytest.approx(2 * MIB, rel=0.05)

    # A daemon on this home keeps on with it, and serves it.
    source.stop()
    daemon = nodes.daemon("b")
    assert all(row["complete"] for row in mirrors(daemon).values()) and len(mirrors(daemon)) == 2
    out = tmp_path / "copy"
    fetch = nodes.begin("fetch", link, "--peer", daemon.addrs[0], "-o", out, home=nodes.home("c")).wait(60)
    assert fetch.check().json["from"].keys() == {daemon.peer_id}
    assert difference(original, out) is None


@pytest.mark.slow
def test_a_file_that_vanished_on_the_mirror_is_mended(nodes: Nodes, tmp_path: Path) -> None:
    source, mirror = nodes.daemon("a"), nodes.daemon("b", extra={"mirror_interval": 1})
    said = provide(source, tmp_path / "one", 3 * MIB)
    taken = tmp_path / "taken"
    mirror.run("fetch", said["link"], "-o", str(taken)).check()
    assert mirror.run("mirror", said["link"]).check().json["received_bytes"] == 0
    assert packs(mirror) == []
    taken.unlink()
    wait_for(mirror, said["image"], lambda row: packs(mirror) and row["complete"])
    assert mirror.run("verify", said["image"]).check().json["ok"]
    assert not taken.exists()


@pytest.mark.slow
@pytest.mark.nix
def test_a_store_path_that_was_collected_on_the_mirror_is_mended(
    nodes: Nodes, tmp_path: Path, nix_store_command: str
) -> None:
    path = StorePath("1" * 32, "tool")
    stores = [ChrootStore(tmp_path / f"{name}-nix") for name in "ab"]
    for store in stores:
        store.register([(path, bytes(range(256)) * 8000, [])])
    key = tmp_path / "key"
    key.write_text(str(SecretKey.generate("k-1")))
    source, mirror = (
        nodes.daemon(name, extra={"nix_store": str(store.root), "mirror_interval": 1})
        for name, store in zip("ab", stores, strict=True)
    )
    said = source.run("provide", "--sign-key", str(key), str(path)).check().json
    mirror.run("provide", str(path)).check()
    assert mirror.run("mirror", said["link"]).check().json["received_bytes"] == 0
    stores[1].nix_store("--delete", path)
    wait_for(mirror, said["image"], lambda row: packs(mirror) and row["complete"])
    assert mirror.run("verify", said["image"]).check().json["ok"]


@pytest.mark.slow
def test_what_cannot_be_mirrored_is_told(nodes: Nodes, tmp_path: Path) -> None:
    silent = nodes.daemon("a")  # publishes nothing
    said = provide(silent, tmp_path / "one", MIB)
    home = nodes.home("b")

    def failing(*things: str) -> tuple[int, dict[str, Any]]:
        done = nodes.begin("mirror", "--timeout", "2", *things, home=home).wait(60)
        assert "Traceback" not in done.stderr
        return done.code, done.json

    code, row = failing(silent.addrs[0])
    assert (code, row["error"], row["mirror"]) == (3, "NotPublishing", silent.peer_id)
    assert "--publish" in row["message"]
    gone = f"/ip4/127.0.0.1/tcp/1/p2p/{silent.peer_id[:-4]}AAAA"
    code, row = failing(gone)
    assert (code, row["error"]) == (6, "PeerUnreachable")
    for thing in ("nonsense", "/ip4/127.0.0.1/tcp/1", "p2pnode:x", "--stop"):
        assert failing(thing)[0] == 2
    code, row = failing("--stop", "nonsense")
    assert (code, row["error"]) == (3, "NotFound")

    # One that fails does not keep another from its end; both are remembered.
    unknown = said["image"][:-2] + "aa"
    done = nodes.begin("mirror", "--timeout", "2", unknown, said["link"], home=home).wait(60)
    failed, good = sorted(rows(done), key=lambda row: "error" not in row)
    assert done.code == failed["exit_code"] == 3 and failed["image"] == unknown
    assert good["image"] == said["image"] and good["pinned"]
    listed = {row["mirror"]: row for row in rows(nodes.begin("mirror", home=home).wait())}
    assert listed[unknown]["problem"] and not listed[unknown]["complete"]
    assert listed[said["image"]]["complete"] and listed[said["image"]]["problem"] is None


@pytest.mark.slow
def test_a_publisher_is_found_by_its_id(nodes: Nodes, tmp_path: Path) -> None:
    meeting_point = nodes.daemon("m")
    publisher = nodes.daemon("a", via=meeting_point, extra={"publish": True})
    provide(publisher, tmp_path / "one", MIB)
    wait_announced(publisher)
    home: Home = nodes.home("b", bootstrap=meeting_point.addrs[:1])
    done = nodes.begin("mirror", publisher.peer_id, home=home).wait(60).check()
    assert [row["bytes"] for row in rows(done)] == [MIB]

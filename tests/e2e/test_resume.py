"""What a fetch had before it died is not fetched again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from swarmlib.content import difference, write_random
from swarmlib.control import ask
from swarmlib.process import Command, Daemon

from tests.e2e.conftest import Nodes

MIB = 1 << 20
SIZE = 128 * MIB
SLACK = 32 * MIB  # what may be in flight, or received and not committed yet, when the power goes


def sent(source: Daemon) -> int:
    """Block bytes that a provider has sent to those connected to it."""
    return sum(row["sent_bytes"] for row in ask(source.home.path, "peers") or [])


def wait_until_sent(source: Daemon, size: int, command: Command) -> int:
    deadline = time.monotonic() + 120
    while (now := sent(source)) < size:
        assert command.poll() is None, f"the fetch was over too soon: {command.finished()}"
        assert time.monotonic() < deadline, command.stderr
        time.sleep(0.02)
    return now


def slow_source(nodes: Nodes, size: int, rate: str = "24M") -> tuple[Daemon, Path, str]:
    """A provider with a slow line, its original, and a link to it."""
    original = nodes.directory / "original"
    write_random(original, size)
    source = nodes.daemon("a", faults=["--rate", rate])
    return source, original, source.run("provide", str(original)).check().json["link"]


@pytest.mark.slow
def test_kill_9_of_the_fetcher_at_half(nodes: Nodes, tmp_path: Path) -> None:
    source, original, link = slow_source(nodes, SIZE)
    home = nodes.home("b")
    fetch = nodes.begin("fetch", link, "-o", tmp_path / "copy", home=home)
    before = wait_until_sent(source, SIZE // 2, fetch)
    fetch.kill()
    assert not (tmp_path / "copy").exists()

    result = nodes.begin("fetch", link, "-o", tmp_path / "copy", home=home).wait(120).check().json
    assert result["received_bytes"] <= SIZE - before + SLACK
    assert difference(original, tmp_path / "copy") is None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_kill_9_of_the_daemon_at_half(nodes: Nodes, tmp_path: Path) -> None:
    source, original, link = slow_source(nodes, SIZE)
    reader = nodes.daemon("b")
    fetch = reader.begin("fetch", link, "-o", str(tmp_path / "copy"))
    before = wait_until_sent(source, SIZE // 2, fetch)
    reader.kill()
    failed = fetch.wait(10)
    assert failed.code not in (0, 1), failed
    assert "Traceback" not in failed.stderr

    reader = nodes.daemon("b")
    result = reader.run("fetch", link, "-o", str(tmp_path / "copy")).check().json
    assert result["received_bytes"] <= SIZE - before + SLACK
    assert difference(original, tmp_path / "copy") is None


@pytest.mark.slow
def test_kill_9_at_half_of_a_gigabyte(nodes: Nodes, tmp_path: Path) -> None:
    size = 1 << 30
    source, original, link = slow_source(nodes, size, "80M")
    home = nodes.home("b")
    fetch = nodes.begin("fetch", link, "-o", tmp_path / "copy", home=home)
    before = wait_until_sent(source, size // 2, fetch)
    fetch.kill()
    result = nodes.begin("fetch", link, "-o", tmp_path / "copy", home=home).wait(300).check().json
    assert result["received_bytes"] <= size - before + SLACK
    assert difference(original, tmp_path / "copy") is None


@pytest.mark.slow
@pytest.mark.root
def test_too_small_a_disk_is_noticed_before_anything_is_fetched(
    nodes: Nodes, tmp_path: Path, tmpfs: Callable[[str], Path]
) -> None:
    disk = tmpfs("24M")
    _, _, link = slow_source(nodes, 64 * MIB)
    failed = nodes.begin("fetch", link, "-o", disk / "copy", home=nodes.home("b")).wait(60)
    assert (failed.code, failed.json["error"]) == (5, "DiskFull")
    assert list(disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.root
def test_a_disk_that_fills_up_on_the_way(nodes: Nodes, tmp_path: Path, tmpfs: Callable[[str], Path]) -> None:
    disk = tmpfs("160M")
    size = 96 * MIB
    source, original, link = slow_source(nodes, size)
    home = nodes.home("disk/home")  # the catalog's disk fills up too
    fetch = nodes.begin("fetch", link, "-o", disk / "copy", home=home)
    wait_until_sent(source, size // 4, fetch)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
    failed = fetch.wait(60)
    assert (failed.code, failed.json["error"]) == (5, "DiskFull"), failed
    assert not (disk / "copy").exists()

    filler.unlink()
    result = nodes.begin("fetch", link, "-o", disk / "copy", home=home).wait(120).check().json
    assert result["received_bytes"] <= size * 3 // 4 + SLACK
    assert difference(original, disk / "copy") is None

"""Ctrl-C and SIGTERM: at once, with the right exit code, without a traceback, and with a goodbye to peers."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from swarmlib.control import ask
from swarmlib.process import Command, Daemon

from tests.e2e.conftest import Nodes
from tests.e2e.test_resume import slow_source, wait_until_sent

MIB = 1 << 20
SECONDS = 2.0


def interrupt(command: Command) -> None:
    """Ctrl-C, once; the command must end in time, as a shell expects it."""
    began = time.monotonic()
    command.signal(signal.SIGINT)
    finished = command.wait(20)
    seconds = time.monotonic() - began
    # Before Python has a handler, the signal itself ends it: 130 for a shell all the same.
    assert finished.code in (130, -signal.SIGINT), finished
    assert "Traceback" not in finished.stderr, finished.stderr
    assert "Exception ignored" not in finished.stderr, finished.stderr
    assert seconds < SECONDS, f"took {seconds:.1f} s"


@pytest.mark.parametrize("moment", [0.2, 0.6, 1.2, 1.8, 2.5])
def test_the_daemon_as_it_starts(nodes: Nodes, moment: float) -> None:
    command = nodes.begin("run", home=nodes.home("a"))
    time.sleep(moment)  # the moment is what is tested
    interrupt(command)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.4, 1.5, 3.0])
def test_a_fetch_without_a_daemon(nodes: Nodes, tmp_path: Path, moment: float) -> None:
    _, _, link = slow_source(nodes, 64 * MIB, "4M")
    command = nodes.begin("fetch", link, "-o", tmp_path / "copy", home=nodes.home("b"))
    time.sleep(moment)
    interrupt(command)
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_a_fetch_in_the_middle_and_through_a_daemon(nodes: Nodes, tmp_path: Path) -> None:
    source, _, link = slow_source(nodes, 64 * MIB, "8M")
    reader = nodes.daemon("b")
    command = reader.begin("fetch", link, "-o", str(tmp_path / "copy"))
    wait_until_sent(source, 4 * MIB, command)
    interrupt(command)
    assert reader.running
    deadline = time.monotonic() + 5
    while (ask(reader.home.path, "status") or [{}])[0].get("fetching") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reader.run("status").check().json["fetching"] == []
    assert not (tmp_path / "copy").exists()


def test_an_import(nodes: Nodes, tmp_path: Path) -> None:
    original = tmp_path / "large"
    with original.open("wb") as file:
        file.truncate(16 << 30)  # sparse: reading it takes long, making it does not
    home = nodes.home("a")
    command = nodes.begin("provide", "--no-serve", original, home=home)
    time.sleep(1.5)
    interrupt(command)
    assert nodes.begin("images", home=home).wait(20).check().stdout == ""


@pytest.mark.slow
def test_an_import_through_a_daemon_which_goes_on(nodes: Nodes, tmp_path: Path) -> None:
    original = tmp_path / "large"
    with original.open("wb") as file:
        file.truncate(16 << 30)
    daemon = nodes.daemon("a")
    command = daemon.begin("provide", str(original))
    time.sleep(1.5)
    interrupt(command)
    assert daemon.run("images").check().stdout == ""
    assert daemon.running


def connected(node: Daemon, peer: str) -> bool:
    return any(row["peer"] == peer for row in ask(node.home.path, "peers") or [])


def wait_for(condition: bool, node: Daemon, peer: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while connected(node, peer) is not condition:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_to_the_daemon(nodes: Nodes, tmp_path: Path, busy: bool) -> None:
    source, _, link = slow_source(nodes, 64 * MIB, "4M")
    reader = nodes.daemon("b", via=source)
    wait_for(True, source, reader.peer_id, 10)
    fetch = None
    if busy:
        fetch = reader.begin("fetch", link, "-o", str(tmp_path / "copy"))
        wait_until_sent(source, 2 * MIB, fetch)

    assert reader.stop() < 5.0
    assert reader.command is not None and reader.command.poll() in (0, 128 + signal.SIGTERM)
    assert "Traceback" not in reader.log, reader.log
    wait_for(False, source, reader.peer_id, 3.0)  # long before a silent peer is given up
    if fetch is not None:
        failed = fetch.wait(5)
        assert failed.code not in (0, 1)
        assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_the_ports_and_locks_of_a_stopped_daemon_are_free_at_once(nodes: Nodes) -> None:
    first = nodes.daemon("a")
    address = first.addrs[0].rpartition("/p2p/")[0]
    first.stop()
    again = nodes.daemon("a", listen=(address,))
    assert again.peer_id == first.peer_id
    assert again.addrs == first.addrs

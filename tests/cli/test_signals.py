"""Ctrl-C at any moment, SIGTERM, and commands that go through a running node. Real processes."""

import os
import random
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.conftest import CLI

LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0")
UNKNOWN = "bafyr4ihfsrdbtbfhtqupjvfxdil7j2k5ujol2h4kirv4pq5vbqo3kz7hbu"
MOMENTS = 5


def interrupt_until_it_ends(process: "subprocess.Popen[str]", after: float) -> float:
    """SIGINT once `after` s, and again until one is heard: before the first line of ours it is ignored (see below).

    Seconds from the last signal to the end.
    """
    time.sleep(after)  # the moment is the point of the test, nothing is waited for
    began = time.monotonic()
    deadline = began + 30
    while process.poll() is None:
        assert time.monotonic() < deadline, "it hears no signal"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        try:
            process.wait(2.5)
        except subprocess.TimeoutExpired:
            continue
    return time.monotonic() - began


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("command", ["images", "run", "fetch", "provide"])
def test_interrupt_while_starting(cli: CLI, disk: Path, command: str, moment: int) -> None:
    """The process starts with SIGINT ignored, so a signal before the program's first line is without effect; without
    that it would be the interpreter's own KeyboardInterrupt, which nobody can prevent."""
    args = {
        "images": ["images"],
        "run": ["run", *LISTEN],
        "fetch": ["fetch", UNKNOWN, *LISTEN, "--timeout", "100"],
        "provide": ["provide", *LISTEN, str(disk)],
    }[command]
    longest = 0.15 if command == "images" else 2.0
    after = random.Random(f"{command}{moment}").uniform(0.01, longest)
    process = cli.start("-q", *args, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    took = interrupt_until_it_ends(process, after)
    _, stderr = process.communicate()
    if command == "fetch" and process.returncode in (3, 6):
        return  # with nobody to ask it may have ended before the signal came
    if command == "images" and process.returncode == 0:
        return
    assert (process.returncode, stderr) == (130, "")
    assert took < 2


def test_interrupt_while_serving(cli: CLI, disk: Path) -> None:
    process, result = cli.started("-q", "provide", *LISTEN, disk)
    assert result["name"] == "disk.img"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert (process.returncode, stderr) == (130, "")
    assert time.monotonic() - began < 2


def test_terminate_daemon(cli: CLI) -> None:
    process, result = cli.started("run", *LISTEN)
    assert result["peer_id"] in result["addrs"][0]
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert (process.returncode, stderr) == (0, "")
    assert time.monotonic() - began < 5
    assert not (cli.home / "control.sock").exists()


@pytest.mark.parametrize("place", ["path", "abstract"])
def test_systemd_is_told_when_the_daemon_is_ready(cli: CLI, tmp_path: Path, place: str) -> None:
    """As with Type=notify: once, and only when commands can reach it."""
    name = str(tmp_path / "notify") if place == "path" else f"@p2pnode-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1) if place == "abstract" else name)
        manager.settimeout(30)
        cli.environ["NOTIFY_SOCKET"] = name
        process = cli.start("run", *LISTEN)
        assert manager.recv(100) == b"READY=1"
        assert process.poll() is None
        assert "peer_id" in cli.json("status")
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_a_service_manager_that_is_gone_stops_nothing(cli: CLI, tmp_path: Path) -> None:
    cli.environ["NOTIFY_SOCKET"] = str(tmp_path / "nobody")
    process, running = cli.started("run", *LISTEN)
    assert cli.json("status")["peer_id"] == running["peer_id"]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "systemd cannot be told" in stderr


@pytest.mark.slow
def test_commands_go_through_the_daemon(cli: CLI, disk: Path) -> None:
    daemon, running = cli.started("run", *LISTEN)
    provided = cli.json("provide", disk)
    assert running["addrs"][0] in provided["link"]
    assert [cli.json("images")["image"], cli.json("show", "disk.img")["image"]] == [provided["image"]] * 2
    assert cli.json("verify", "disk.img")["ok"] is True
    assert cli.json("status")["peer_id"] == running["peer_id"]
    assert cli("peers").returncode == 0
    assert cli.json("show", "nothing")["exit_code"] == 3

    second = cli("run", *LISTEN)
    assert second.returncode == 2
    assert "running" in second.stderr
    refused = cli("provide", *LISTEN, disk)
    assert refused.returncode == 2
    assert "--listen" in refused.stderr

    assert cli.json("rm", "disk.img")["image"] == provided["image"]
    assert daemon.poll() is None


def test_interrupted_client_leaves_the_daemon_running(cli: CLI) -> None:
    daemon, _ = cli.started("run", *LISTEN)
    client = cli.start("-q", "fetch", UNKNOWN, "--timeout", "100")
    assert any(cli.json("status")["fetching"] == [UNKNOWN] for _ in range(20))
    client.send_signal(signal.SIGINT)
    _, stderr = client.communicate(timeout=5)
    assert (client.returncode, stderr) == (130, "")
    assert any(cli.json("status")["fetching"] == [] for _ in range(3))
    assert daemon.poll() is None


def test_bar_on_a_terminal_is_cleaned_up(cli: CLI) -> None:
    ours, theirs = os.openpty()
    args = cli.command("fetch", UNKNOWN, *LISTEN, "--timeout", "100")
    process = subprocess.Popen(args, env=cli.environ | {"TERM": "xterm"}, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b""
    while b"\x1b[?25l" not in seen:  # the cursor is hidden once the bar is drawn
        seen += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    with suppress(OSError):  # EIO: the terminal's other end is closed
        while data := os.read(ours, 4096):
            seen += data
    os.close(ours)
    assert b"\x1b[?25h" in seen
    assert b"Traceback" not in seen


def test_fetch_from_another_node(cli: CLI, disk: Path, tmp_path: Path) -> None:
    _, provided = cli.started("-q", "provide", *LISTEN, disk)
    other = CLI(tmp_path / "other")
    out = tmp_path / "out.img"
    fetched = other.json("fetch", provided["link"], "-o", out, *LISTEN)
    assert fetched["path"] == str(out)
    assert out.read_bytes() == disk.read_bytes()
    assert sum(fetched["from"].values()) == fetched["received_bytes"] >= disk.stat().st_size
    assert other.json("fetch", provided["link"], "-o", out, *LISTEN)["error"] == "OutputExists"
    assert other.json("images")["complete"] is True


def test_home_is_locked_by_another_command(cli: CLI, disk: Path) -> None:
    from p2pnode.home import lock

    with lock(cli.home):
        done = cli("images")
    assert done.returncode == 2
    assert "in use by process" in done.stderr

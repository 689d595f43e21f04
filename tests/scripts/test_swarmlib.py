"""What the scripts are made of, where a mistake would make the end-to-end tests lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from swarmlib import namespaces, report
from swarmlib.content import difference, parse_rate, parse_size, write_random
from swarmlib.namespaces import Namespaces
from swarmlib.process import REPOSITORY, Command, SwarmError, Usage
from swarmlib.split import shares

MIB = 1 << 20


def test_sizes_and_rates() -> None:
    assert [parse_size(text) for text in ("64M", "1.5GiB", "4096", "2k")] == [64 * MIB, 3 << 29, 4096, 2048]
    assert parse_rate("100mbit") == 12.5e6
    for text in ("", "M", "-1M", "64X", "1e9"):
        with pytest.raises(ValueError):
            parse_size(text)
    with pytest.raises(ValueError):
        parse_rate("100")


def test_random_content_is_the_same_each_time_and_another_for_another_seed(tmp_path: Path) -> None:
    for name, seed in (("a", "x"), ("b", "x"), ("c", "y")):
        write_random(tmp_path / name, 2 * MIB + 5, seed)
    assert (tmp_path / "a").stat().st_size == 2 * MIB + 5
    assert difference(tmp_path / "a", tmp_path / "b") is None
    assert difference(tmp_path / "a", tmp_path / "c") is not None


def trees(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        root = tmp_path / name
        (root / "sub").mkdir(parents=True)
        (root / "sub" / "file").write_bytes(b"content")
        (root / "link").symlink_to("sub/file")
    return tmp_path / "a", tmp_path / "b"


def test_equal_trees_do_not_differ(tmp_path: Path) -> None:
    a, b = trees(tmp_path)
    (b / "sub" / "file").chmod(0o604)  # a NAR keeps the owner's x bit only
    assert difference(a, b) is None


def test_every_difference_that_a_nar_keeps_is_found(tmp_path: Path) -> None:
    def content(b: Path) -> None:
        (b / "sub" / "file").write_bytes(b"conteNt")

    def executable(b: Path) -> None:
        (b / "sub" / "file").chmod(0o755)

    def target(b: Path) -> None:
        (b / "link").unlink()
        (b / "link").symlink_to("sub")

    def kind(b: Path) -> None:
        (b / "link").unlink()
        (b / "link").write_bytes(b"content")

    def extra(b: Path) -> None:
        (b / "sub" / "more").mkdir()

    def missing(b: Path) -> None:
        (b / "sub" / "file").unlink()

    for change in (content, executable, target, kind, extra, missing):
        a, b = trees(tmp_path / change.__name__)
        change(b)
        assert difference(a, b) is not None, change.__name__


def test_shares_cover_everything_and_nobody_has_it_all() -> None:
    for chunks, nodes, copies in ((100, 4, 1), (101, 6, 5), (7, 3, 2)):
        parts = shares(chunks, nodes, copies)
        for chunk in range(chunks):
            assert sum(chunk in part for part in parts) == copies
        assert all(len(part) < chunks for part in parts)
    with pytest.raises(SwarmError):
        shares(10, 4, 4)


def test_the_bound_of_a_distribution() -> None:
    # One seed and eight leechers: the seed's one copy and a leecher's line take as long; all uplinks together less.
    assert report.lower_bound(100, 10, providers=1, leechers=8) == 10
    assert report.lower_bound(100, 10, providers=4, leechers=1) == 10


def test_a_report_says_who_failed() -> None:
    nodes = [
        report.NodeReport(1, "provider", uploaded_bytes=MIB),
        report.NodeReport(2, "leecher", seconds=1.0, verified=True, sources={"1": MIB}),
        report.NodeReport(3, "leecher", error="exit code 6: nobody there"),
    ]
    swarm = report.SwarmReport("id", "file", MIB, 4, nodes, seconds=1.0)
    assert not swarm.ok
    assert "nobody there" in report.text(swarm)
    assert "1 of 2 fetches" in report.summary(swarm)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    node = report.NodeReport(2, "leecher", samples=[(0.0, 0), (0.5, 3), (1.0, 4)])
    report.plot(report.SwarmReport("id", "file", MIB, 4, [node], rate_bytes=1.0, bound_seconds=0.7), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_commands_are_ended_and_measured(tmp_path: Path) -> None:
    command = Command(["sleep", "60"], tmp_path / "log")
    assert Usage.of(command.pid).peak_bytes > 0
    assert command.stop() < 5
    assert command.poll() == -signal.SIGTERM
    assert Usage.of(command.pid) == Usage()


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path\n"
        "from swarmlib.process import Command\n"
        "command = Command(['sleep', '60'], Path(sys.argv[2]))\n"
        "print(command.pid, flush=True)\n"
        "command.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(REPOSITORY / "scripts"), str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_wrong_options_are_refused() -> None:
    for args in (["--nodes", "2", "--seeds", "2"], ["--kill", "2"], ["--rate", "100mbit"], ["--split"]):
        command = [sys.executable, str(REPOSITORY / "scripts" / "swarm.py"), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, args
        assert "Traceback" not in done.stderr


@pytest.mark.root
def test_a_line_has_the_rate_it_was_given() -> None:
    reason = namespaces.available()
    if reason is not None:
        pytest.skip(reason)
    size = 4 * MIB
    with Namespaces("100mbit") as hosts:
        (_, sender), (address, receiver) = hosts.add(0), hosts.add(1)
        receive = (
            "import socket, time\n"
            f"server = socket.create_server(('{address}', 4000))\n"
            "print('ready', flush=True)\n"
            "peer = server.accept()[0]; began = time.monotonic(); got = 0\n"
            "while data := peer.recv(1 << 20): got += len(data)\n"
            "print(got, time.monotonic() - began)\n"
        )
        send = f"import socket; socket.create_connection(('{address}', 4000)).sendall(bytes({size}))"
        server = subprocess.Popen([*receiver, sys.executable, "-c", receive], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        subprocess.run([*sender, sys.executable, "-c", send], check=True)
        got, seconds = server.communicate(timeout=20)[0].split()
    assert int(got) == size
    assert 0.8 < float(seconds) / (size / 12.5e6) < 1.5
    assert (
        str(os.getpid())
        not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    )

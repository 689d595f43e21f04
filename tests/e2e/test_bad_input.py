"""Bad input: one sentence, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from swarmlib.content import difference, write_random
from swarmlib.process import NODE, Finished

from tests.e2e.conftest import Nodes

MIB = 1 << 20
UNKNOWN = "bafyr4if7cfh3crkcwleedaferf5pgjyfcopzuogobrcp5lbbbvgeeginki"


def assert_refused(finished: Finished, code: int, error: str | None = None) -> str:
    """The command ended as it must; returns the sentence."""
    assert finished.code == code, finished
    assert "Traceback" not in finished.stderr
    said = finished.json
    assert said.keys() >= {"error", "message", "exit_code"}
    assert said["exit_code"] == code
    if error is not None:
        assert said["error"] == error
    assert said["message"].strip() and "\n" not in said["message"]
    return str(said["message"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output path in a directory of its own, in which nothing may appear."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "copy"


@pytest.mark.slow
def test_an_image_that_nobody_has(nodes: Nodes, out: Path) -> None:
    other = nodes.daemon("a")
    home = nodes.home("b", bootstrap=other.addrs[:1])
    finished = nodes.begin("fetch", "--timeout", "10", UNKNOWN, "-o", out, home=home).wait(60)
    assert UNKNOWN in assert_refused(finished, 3, "NotFound")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    "spec",
    [
        UNKNOWN[:-1],
        UNKNOWN[:-1] + "1",
        UNKNOWN.replace("bafyr", "qafyr"),
        f"p2pnode:{UNKNOWN}?peer=/ip4/127.0.0.1/tcp/99999/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA",
        f"p2pnode:{UNKNOWN}?peer=/ip4/127.0.0.1/tcp/4747",
        f"p2pnode:{UNKNOWN}?peer=nonsense",
        f"p2pnode:{UNKNOWN}?color=red",
        "p2pnode:",
    ],
)
def test_a_mistyped_id_or_link(nodes: Nodes, out: Path, spec: str) -> None:
    home = nodes.home("b")
    finished = nodes.begin("fetch", spec, "-o", out, home=home).wait(20)
    assert finished.code in (2, 3)
    assert_refused(finished, finished.code)
    assert finished.code == 2 or not spec.startswith("p2pnode:")  # a text that is no link could be a name
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_a_peer_that_cannot_be_reached(nodes: Nodes, out: Path) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        peer = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
        link = f"p2pnode:{UNKNOWN}?peer=/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"
        finished = nodes.begin("fetch", "--timeout", "15", link, "-o", out, home=nodes.home("b")).wait(60)
    assert_refused(finished, 6)
    assert list(out.parent.iterdir()) == []


def test_a_path_that_does_not_exist(nodes: Nodes, tmp_path: Path) -> None:
    finished = nodes.begin("provide", "--no-serve", tmp_path / "no such", home=nodes.home("a")).wait(20)
    assert "no such" in assert_refused(finished, 2, "PathError")


@pytest.mark.parametrize("what", ["fifo", "socket", "device"])
def test_something_that_no_image_can_hold(nodes: Nodes, tmp_path: Path, what: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(bytes(MIB))
    with socket.socket(socket.AF_UNIX) as listener:
        if what == "fifo":
            os.mkfifo(tree / "odd")
        elif what == "socket":
            listener.bind(str(tree / "odd"))
        elif os.geteuid() == 0:
            os.mknod(tree / "odd", 0o600 | 0o020000, os.makedev(1, 3))
        else:
            pytest.skip("needs root to make a device")
        home = nodes.home("a")
        finished = nodes.begin("provide", "--no-serve", tree, home=home).wait(20)
        assert "odd" in assert_refused(finished, 2, "PathError")
    assert nodes.begin("images", home=home).wait(20).check().stdout == ""


def test_an_unreadable_file(nodes: Nodes, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    secret = tree / "secret"
    secret.write_bytes(b"x")
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root without the right to read everything
        rights = "-dac_override,-dac_read_search"
        prefix = ("setpriv", "--bounding-set", rights, "--inh-caps", rights)
        os.chown(secret, 12345, 12345)
    secret.chmod(0)
    home = nodes.home("a")
    finished = nodes.begin("provide", "--no-serve", tree, home=home, prefix=prefix).wait(20)
    assert "secret" in assert_refused(finished, 2, "PathError")
    assert nodes.begin("images", home=home).wait(20).check().stdout == ""


def test_an_output_that_exists(nodes: Nodes, tmp_path: Path, out: Path) -> None:
    original = tmp_path / "image"
    write_random(original, 2 * MIB)
    source, reader = nodes.daemon("a"), nodes.daemon("b")
    link = source.run("provide", str(original)).check().json["link"]
    out.write_text("precious")
    assert_refused(reader.run("fetch", link, "-o", str(out)), 2, "OutputExists")
    assert out.read_text() == "precious"
    assert list(out.parent.iterdir()) == [out]
    assert reader.run("images").check().stdout == ""
    reader.run("fetch", "--force", link, "-o", str(out)).check()
    assert difference(original, out) is None


@pytest.mark.slow
@pytest.mark.root
def test_an_output_on_a_read_only_disk(nodes: Nodes, tmp_path: Path, tmpfs: Callable[[str], Path]) -> None:
    original = tmp_path / "image"
    write_random(original, 2 * MIB)
    disk = tmpfs("8M")
    source = nodes.daemon("a")
    link = source.run("provide", str(original)).check().json["link"]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    finished = nodes.begin("fetch", link, "-o", disk / "copy", home=nodes.home("b")).wait(60)
    assert_refused(finished, 5, "OutputUnwritable")


def test_a_home_that_is_in_use(nodes: Nodes) -> None:
    first = nodes.daemon("a")
    finished = nodes.begin("run", home=first.home).wait(20)
    assert str(first.home.path) in assert_refused(finished, 2, "HomeLocked")
    assert first.running


def test_a_port_that_is_in_use(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        home = nodes.home("a", listen=(f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}",))
        assert_refused(nodes.begin("run", home=home).wait(20), 6, "NotListening")


def test_a_bad_configuration(nodes: Nodes) -> None:
    home = nodes.home("a", extra={"lissten": []})
    assert "lissten" in assert_refused(nodes.begin("images", home=home).wait(20), 2, "ConfigError")


def test_a_corrupt_catalog(nodes: Nodes, tmp_path: Path) -> None:
    original = tmp_path / "image"
    write_random(original, MIB)
    home = nodes.home("a")
    nodes.begin("provide", "--no-serve", original, home=home).wait(30).check()
    (catalog,) = [path for path in home.path.rglob("catalog*") if path.suffix in (".sqlite", ".db")]
    for path in home.path.rglob("*-wal"):
        path.unlink()
    catalog.write_bytes(b"this is not a database" * 1000)
    assert_refused(nodes.begin("images", home=home).wait(20), 5, "CatalogCorrupt")
    assert_refused(nodes.begin("run", home=home).wait(20), 5, "CatalogCorrupt")


@pytest.mark.slow
def test_corrupt_chunks_are_neither_served_nor_believed(nodes: Nodes, tmp_path: Path, out: Path) -> None:
    original = tmp_path / "image"
    write_random(original, 8 * MIB)
    source, middle, reader = nodes.daemon("a"), nodes.daemon("b"), nodes.daemon("c")
    said = source.run("provide", str(original)).check().json
    middle.run("fetch", said["link"]).check()
    packs = [
        path for path in (middle.home.path / "store").rglob("*") if path.is_file() and path.stat().st_size >= 4 * MIB
    ]
    assert packs
    for pack in packs:
        with pack.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"rotten")
    link = f"{said['link']}&peer={middle.addrs[0]}"
    result = reader.run("fetch", link, "-o", str(out)).check().json
    assert difference(original, out) is None
    assert result["banned"] == []
    assert_refused(middle.run("verify", said["image"]), 4)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["--lie", "--lie-manifest"])
def test_a_sole_peer_that_lies(nodes: Nodes, tmp_path: Path, out: Path, fault: str) -> None:
    original = tmp_path / "image"
    write_random(original, 4 * MIB)
    source = nodes.daemon("a", faults=[fault])
    said = source.run("provide", str(original)).check().json
    finished = nodes.begin("fetch", "--timeout", "8", said["link"], "-o", out, home=nodes.home("b")).wait(60)
    assert_refused(finished, 4, "VerificationFailed")
    assert not out.exists()


@pytest.mark.parametrize(
    "args",
    [
        ["frobnicate"],
        ["fetch"],
        ["fetch", UNKNOWN, "--no-such-option"],
        ["show", "no such image"],
        ["rm", "no such image"],
        ["verify", "no such image"],
    ],
)
def test_a_wrong_command_line(nodes: Nodes, args: list[str]) -> None:
    finished = nodes.begin(*args, home=nodes.home("a")).wait(20)
    assert finished.code == (3 if args[-1] == "no such image" else 2), finished
    assert_refused(finished, finished.code)


def test_help_and_version_answer_at_once(tmp_path: Path) -> None:
    for option in ("--help", "--version"):
        done = subprocess.run([*NODE, option], capture_output=True, text=True, timeout=10, check=True)
        assert done.stdout.strip()

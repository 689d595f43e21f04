"""Every command as a real process, with a store and without a network."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import CLI

COMMANDS = (
    *("run", "provide", "fetch", "mirror", "images", "show", "verify"),
    *("pin", "unpin", "rm", "status", "peers"),
)
UNKNOWN = "bafyr4ihfsrdbtbfhtqupjvfxdil7j2k5ujol2h4kirv4pq5vbqo3kz7hbu"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(cli: CLI, command: str) -> None:
    done = cli(command, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert f"p2pnode {command}" in done.stdout or f"p2pnode --json {command}" in done.stdout


def test_life_of_an_image(cli: CLI, disk: Path) -> None:
    provided = cli.json("provide", "--no-serve", disk)
    assert provided.keys() == {"image", "link", "kind", "name", "bytes", "new_bytes", "chunks", "seconds"}
    assert (provided["kind"], provided["name"], provided["bytes"]) == ("file", "disk.img", disk.stat().st_size)
    assert provided["link"].startswith(f"p2pnode:{provided['image']}")

    assert cli.json("images")["image"] == provided["image"]
    for spec in (provided["image"], provided["image"][:20], provided["link"], "disk.img"):
        shown = cli.json("show", spec)
        assert shown["image"] == provided["image"]
        assert shown["objects"][0]["bytes"] == provided["bytes"]
    assert cli.json("verify", "disk.img")["ok"] is True
    assert cli.json("status")["store"]["images"] == 1
    for command in ("images", "status"):
        human = cli(command)
        assert (human.returncode, human.stderr) == (0, "")
    assert provided["image"] in cli("show", "disk.img").stdout

    assert cli.json("pin", "disk.img") == {"image": provided["image"], "name": "disk.img", "pinned": True}
    assert "pinned" in cli("show", "disk.img").stdout
    refused = cli("rm", "disk.img")
    assert refused.returncode == 2 and f"p2pnode unpin {provided['image']}" in refused.stderr
    assert cli("unpin", "disk.img").stdout == "unpinned disk.img\n"
    assert cli("--json", "mirror").stdout == "" and "nothing is mirrored" in cli("mirror").stdout
    assert cli.json("rm", "disk.img")["image"] == provided["image"]
    assert disk.exists()
    assert cli("--json", "images").stdout == ""
    assert "provide" in cli("images").stdout  # an empty list says what to do


def test_damage_is_found(cli: CLI, disk: Path) -> None:
    cli.json("provide", "--no-serve", disk)
    stamp = disk.stat()
    with disk.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    os.utime(disk, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    done = cli("--json", "verify", "disk.img")
    failure = json.loads(done.stdout)
    assert done.returncode == failure["exit_code"] == 4
    assert failure["error"] == "VerificationFailed"


@pytest.mark.parametrize(
    ("args", "error", "exit_code", "words"),
    [
        (["show", "nothing"], "NotFound", 3, "no image 'nothing'"),
        (["show", UNKNOWN], "NotFound", 3, "no image"),
        (["show", UNKNOWN[:-1]], "UsageError", 2, "58 characters"),
        (["verify", UNKNOWN], "NotFound", 3, "no image"),
        (["rm", UNKNOWN], "NotFound", 3, "no image"),
        (["fetch", "bafy"], "UsageError", 2, "not an image id"),
        (["fetch", f"p2pnode:{UNKNOWN}?peer=/ip4/1.2.3.4/udp/1"], "UsageError", 2, "udp"),
        (["fetch", UNKNOWN, "--peer", "/ip4/192.0.2.1/tcp/1"], "UsageError", 2, "/p2p/"),
        (["fetch", UNKNOWN, "--timeout", "soon"], "UsageError", 2, "soon"),
        (["fetch", UNKNOWN, "-o", "/etc"], "OutputExists", 2, "--force"),
        (["mirror", "what"], "UsageError", 2, "no link, image id, peer id or address"),
        (["mirror", "/ip4/192.0.2.1/tcp/1"], "UsageError", 2, "/p2p/"),
        (["mirror", "--stop"], "UsageError", 2, "--stop needs to know what"),
        (["mirror", "--stop", UNKNOWN], "NotFound", 3, "is not mirrored"),
        (["pin", UNKNOWN], "NotFound", 3, "no image"),
        (["unpin", "nothing"], "NotFound", 3, "no image"),
        (["provide", "/does/not/exist"], "PathError", 2, "does not exist"),
        (["provide", "--no-serve", "/dev/null"], "PathError", 2, "device"),
        (["provide", "--kind", "spaceship", "/etc"], "UsageError", 2, "spaceship"),
        (["provide", "--name", "x", "/etc", "/usr"], "UsageError", 2, "--name"),
        (["provide"], "UsageError", 2, "PATH"),
        (["explode"], "UsageError", 2, "No such command"),
        (["images", "--wrong"], "UsageError", 2, "--wrong"),
        (["run", "--listen", "nowhere"], "ConfigError", 2, "listen"),
        (["run", "--bootstrap", "/ip4/192.0.2.1/tcp/1"], "ConfigError", 2, "/p2p/"),
        (["peers"], "NotRunning", 3, "p2pnode run"),
        (["--log-level", "loud", "images"], "UsageError", 2, "loud"),
    ],
)
def test_one_sentence_per_error(cli: CLI, args: list[str], error: str, exit_code: int, words: str) -> None:
    done = cli("--json", *args)
    failure = json.loads(done.stdout)
    assert failure.keys() == {"error", "message", "exit_code"}
    assert (failure["error"], failure["exit_code"], done.returncode) == (error, exit_code, exit_code)
    assert words in failure["message"]
    assert done.stderr == ""
    human = cli(*args)
    assert (human.stdout, human.returncode) == ("", exit_code)
    assert human.stderr == f"p2pnode: {failure['message']}\n"


def test_bad_configuration_names_file_and_key(cli: CLI) -> None:
    cli.home.mkdir()
    (cli.home / "config.toml").write_text("lisen = []\n")
    done = cli("images")
    assert done.returncode == 2
    assert done.stderr == f"p2pnode: {cli.home}/config.toml: unknown key 'lisen'; did you mean 'listen'?\n"


def test_home_that_cannot_be(cli: CLI, disk: Path) -> None:
    done = cli("--home", disk, "images")
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a directory" in done.stderr


def test_escapes_in_names_do_not_reach_the_terminal(cli: CLI, tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\x07b.img"
    path.write_bytes(b"x" * 5000)
    provided = cli("provide", "--no-serve", path)
    assert provided.returncode == 0
    name = cli.json("images")["name"]
    outputs = [provided, cli("images"), cli("show", name), cli("verify", name), cli("provide", "/no/\x1b[2Jthing")]
    for done in outputs:
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr


def test_no_traceback_unless_debugging(cli: CLI) -> None:
    (cli.home / "store").mkdir(parents=True)
    (cli.home / "store" / "catalog.sqlite").write_bytes(b"this is no database" * 1000)
    done = cli("images")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


def test_closed_stdout(cli: CLI, disk: Path) -> None:
    cli.json("provide", "--no-serve", disk)
    for shell in ("true", "head -c 1"):
        done = subprocess.run(
            f'"{sys.executable}" -m p2pnode --json show disk.img | {shell}',
            shell=True,
            env=cli.environ,
            capture_output=True,
            timeout=30,
        )
        assert done.stderr == b""
    done = subprocess.run(
        f'"{sys.executable}" -m p2pnode images >&-', shell=True, env=cli.environ, capture_output=True, timeout=30
    )
    assert done.stderr == b""


def test_what_needs_no_network_is_quick(cli: CLI, disk: Path) -> None:
    """0.4 s is the promise. Processor time, of which these commands are made, as the machine that tests may be busy."""
    cli.json("provide", "--no-serve", disk)
    for args in (["--help"], ["images"], ["show", "disk.img"]):
        best = min(_processor_seconds(cli, args) for _ in range(5))
        assert best < 0.4, args


def _processor_seconds(cli: CLI, args: list[str]) -> float:
    before = os.times()
    assert cli(*args).returncode == 0
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("args", [["--help"], ["images"], ["show", "disk.img"], ["verify", "disk.img"]])
def test_what_needs_no_network_imports_none(cli: CLI, disk: Path, args: list[str]) -> None:
    cli.json("provide", "--no-serve", disk)
    done = cli(*args, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"trio", "libp2p", "rich", "zeroconf", "multiaddr"}


def test_status_shows_the_gateway(cli: CLI) -> None:
    _, running = cli.started("run", "--listen", "/ip4/127.0.0.1/tcp/0", "--gateway", "127.0.0.1:0")
    (url,) = running["gateway"]
    for path, code in (("nix-cache-info", 200), ("0" * 32 + ".narinfo", 404), ("nar/" + "z" * 52 + ".nar", 404)):
        try:
            answer = urllib.request.urlopen(f"{url}/{path}", timeout=30).status
        except urllib.error.HTTPError as error:
            answer = error.code
        assert answer == code
    counted = cli.json("status")["gateway"]
    assert counted["urls"] == [url] and counted["requests"] == 3 and counted["narinfo_misses"] == 1
    assert counted["store"] == {"nars": 0, "bytes": 0}
    human = cli("status").stdout
    assert url in human and "3 times: 0 paths found, 1 not" in human


@pytest.mark.slow
def test_status_shows_what_is_mirrored(cli: CLI, disk: Path) -> None:
    image = cli.json("provide", "--no-serve", disk)["image"]
    assert cli.json("status")["mirrors"] == [] and "mirrors" not in cli("status").stdout
    cli("mirror", "--timeout", "1", "--no-mdns", image)  # it is here
    _, running = cli.started("run", "--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns")
    assert running
    (row,) = cli.json("status")["mirrors"]
    assert (row["mirror"], row["kind"], row["images"], row["complete_images"]) == (image, "image", 1, 1)
    assert ["mirrors", f"{disk.name}: complete"] in [
        line.split(maxsplit=1) for line in cli("status").stdout.splitlines()
    ]

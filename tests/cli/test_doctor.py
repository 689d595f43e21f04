"""`p2pnode doctor` as a user sees it, through a daemon and without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import CLI

LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0")


@pytest.mark.slow
def test_through_the_daemon(cli: CLI, disk: Path, tmp_path: Path) -> None:
    cli.started("run", *LISTEN)
    other = CLI(tmp_path / "other")
    try:
        _, here = other.started("run", *LISTEN)
        peer, addr = here["peer_id"], here["addrs"][0]
        image = other.json("provide", disk)

        row = cli.json("doctor", addr)
        assert (row["target"], row["ok"], row["exit_code"], row["causes"]) == (peer, True, 0, [])
        done = cli("doctor", image["link"])
        assert done.returncode == 0, done
        lines = done.stdout.splitlines()
        assert lines[-1] == "No problem was found."
        assert all(line.startswith(("ok ", "warn ", "FAIL ")) for line in lines[:-2]), lines
        assert any(f"has {image['chunks']} of {image['chunks']} chunks" in line for line in lines)

        for process in other.running:
            process.kill()
            process.wait()
        done = cli("doctor", addr)
        assert done.returncode == 6
        assert any(line.startswith("FAIL ") and "connection refused" in line for line in done.stdout.splitlines())
        assert "The likely cause:" in done.stdout and "[peer-gone]" in done.stdout
    finally:
        for process in other.running:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_without_a_daemon(cli: CLI, tmp_path: Path) -> None:
    dead = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWHv3vZJhGVfB4U5wti88ozDHZnvRYmr1DNH64egFQcKtD"
    done = cli("--json", "doctor", *LISTEN, "--bootstrap", dead)
    assert done.returncode == 6, done
    [line] = done.stdout.splitlines()
    row = json.loads(line)
    assert row["target"] == "self"
    assert [cause["code"] for cause in row["causes"]] == ["bootstrap-unreachable"]


def test_an_argument_that_is_nothing(cli: CLI) -> None:
    done = cli("--json", "doctor", *LISTEN, "/ip4/127.0.0.1/tcp/1")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "UsageError"

"""`p2pnode cache publish` as a process, without a network."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import SecretKey
from tests.cli.conftest import CLI
from tests.images.test_publish import Cache


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_help(cli: CLI) -> None:
    for command in (("cache", "--help"), ("cache", "publish", "--help")):
        done = cli(*command)
        assert done.returncode == 0
        assert "Examples:" in done.stdout and "p2pnode cache publish" in done.stdout


def test_a_directory(cli: CLI, cache: Cache, tmp_path: Path) -> None:
    lib = cache.add("lib", 300_000)
    tool = cache.add("tool", 1000, (lib.info.path,), "xz")
    done = cli("--json", "cache", "publish", "--no-serve", cache.directory)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    keys = {"image", "link", "kind", "name", "bytes", "new_bytes", "chunks", "seconds"}
    assert all(row.keys() == keys and row["kind"] == "store-path" for row in rows)
    assert {row["name"]: row["bytes"] for row in rows} == {
        "lib": lib.info.nar_size,
        "tool": tool.info.nar_size,
    }
    for row in rows:
        assert cli.json("verify", row["image"])["ok"] is True

    human = cli("cache", "publish", "--no-serve", f"file://{cache.directory}")
    assert human.stdout.startswith("2 store paths published") and human.stderr == ""

    (tmp_path / "key").write_text(str(SecretKey.generate("own-1")))
    closure = cli.json(
        *("cache", "publish", "--no-serve", "--name", "web", "--sign-key", tmp_path / "key"),
        *("--path", tool.info.path, cache.directory),
    )
    assert (closure["kind"], closure["name"]) == ("closure", "web")
    assert closure["bytes"] == lib.info.nar_size + tool.info.nar_size
    human = cli("cache", "publish", "--no-serve", "--path", tool.info.path.digest, cache.directory)
    assert human.stdout.splitlines()[1].startswith(f"p2pnode:{closure['image']}")


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_paths(cli: CLI, cache: Cache, as_json: bool) -> None:
    bad, forged = cache.add("bad", 1000), cache.add("forged", 1000)
    cache.add("good", 1000)
    cache.nar(bad).unlink()
    key = SecretKey.generate("own-1")
    wrong = dataclasses.replace(key.sign(forged.info), value=bytes(64))
    cache.write(dataclasses.replace(forged, signatures=(wrong,)))
    command = ["cache", "publish", "--no-serve", str(cache.directory)]
    lax = {"P2PNODE_TRUSTED_PUBLIC_KEYS": str(key.public_key()), "P2PNODE_REQUIRE_SIGNATURES": "off"}
    done = cli(*["--json"][:as_json], *command, **lax)
    assert done.returncode == 4
    if as_json:
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        (failure,) = [row for row in rows if "error" in row]
        assert failure.keys() == {"path", "error", "message", "exit_code"}
        assert (failure["error"], failure["exit_code"]) == ("VerificationFailed", 4)
        assert bad.info.path.digest in failure["path"]
        (warning,) = [row for row in rows if "warning" in row]
        assert warning["path"] == str(forged.info.path) and "own-1" in warning["warning"]
        assert {row["name"] for row in rows if "image" in row} == {"good", "forged"}
    else:
        lines = done.stderr.splitlines()
        assert len(lines) == 2 and all(line.startswith("p2pnode: ") for line in lines)
        assert "2 store paths published" in done.stdout and "1 could not be" in done.stdout
    strict = {"P2PNODE_TRUSTED_PUBLIC_KEYS": str(key.public_key()), "P2PNODE_REQUIRE_SIGNATURES": "always"}
    done = cli(*["--json"][:as_json], *command, **strict)
    assert done.returncode == 7  # of all faults the gravest


@pytest.mark.parametrize("daemon", [False, True])
def test_what_must_be_proved_is_said_on_the_command_line_as_for_a_fetch(cli: CLI, cache: Cache, daemon: bool) -> None:
    key = SecretKey.generate("own-1")
    cache.add("signed", keys=(key,))
    stranger = cache.add("stranger")
    process = cli.start("--json", "run", "--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns") if daemon else None
    if process is not None and process.stdout is not None:
        process.stdout.readline()
    publish = ("--json", "cache", "publish", *(() if daemon else ("--no-serve",)), cache.directory)
    try:
        for options in (("--trusted-key", key.public_key()), ("--require-signatures", "always")):
            done = cli(*publish, *options)
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            failed = [row for row in rows if "error" in row]
            assert done.returncode == 7 and len(rows) == 2
            assert all(row["exit_code"] == 7 and row["path"] in row["message"] for row in failed)
            (of_stranger,) = [row for row in failed if stranger.info.path.digest in row["path"]]
            assert "lab-1" in of_stranger["message"]
            assert len(failed) == (1 if "--trusted-key" in options else 2)
        assert cli(*publish, "--trusted-key", key.public_key(), "--require-signatures", "off").returncode == 0
    finally:
        if process is not None:
            process.terminate()
            process.wait(20)


def test_back_into_a_cache_that_is_signed(cli: CLI, cache: Cache, tmp_path: Path) -> None:
    key = SecretKey.generate("mine-1")
    (tmp_path / "key").write_text(str(key))
    lib = cache.add("lib", 300_000)
    image = cli.json("cache", "publish", "--no-serve", cache.directory)["image"]
    signing = ("--no-mdns", "--sign-key", tmp_path / "key")
    done = cli("--json", "fetch", image, *signing)
    assert done.returncode == 2 and "--to-cache" in json.loads(done.stdout)["message"]
    assert cli.json("fetch", image, *signing, "--to-cache", tmp_path / "out")["cache"]["added"] == 1
    narinfo = parse((tmp_path / "out" / f"{lib.info.path.digest}.narinfo").read_bytes(), expect=lib.info.path)
    assert set(narinfo.signatures) == {*lib.signatures, key.sign(lib.info)}


def test_file_names_that_nobody_gave_in_good_faith(cli: CLI, cache: Cache) -> None:
    cache.add("good")
    for name in ("a\nfake: line\x1b[31m".ljust(32, "!"), "\udcff" * 32, "0" * 31 + "e"):
        (cache.directory / f"{name}.narinfo").write_text("StorePath: \x1b[2J\n")
    done = cli("cache", "publish", "--no-serve", cache.directory)
    assert done.returncode == 4 and done.stdout.startswith("1 store path published")
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("p2pnode: ") and line.isprintable() for line in lines), lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["https://cache.example.org"], "--path"),
        (["ftp://cache.example.org", "--path", "0" * 32], "is not the URL of a binary cache"),
        (["/nowhere"], "is not a directory"),
        (["/etc"], "nix-cache-info"),
        (["/etc", "--path", "glibc"], "neither a store path nor"),
        (["/etc", "--path", "./result"], "nor a link to one"),
        (["/etc", "--name", "web"], "--path"),
        (["/etc", "--sign-key", "/nowhere"], "signing key"),
        ([], "cache publish --help"),
    ],
)
def test_mistakes(cli: CLI, arguments: list[str], words: str) -> None:
    done = cli("--json", "cache", "publish", *arguments)
    failure = json.loads(done.stdout)
    assert done.returncode == failure["exit_code"] == 2
    assert words in failure["message"]


def test_serving_until_told_to_stop(cli: CLI, cache: Cache) -> None:
    bad, good = cache.add("bad", 1000), cache.add("good", 300_000)
    cache.nar(bad).unlink()
    process = cli.start("--json", "cache", "publish", cache.directory)
    assert process.stdout is not None
    rows = [json.loads(process.stdout.readline()) for _ in range(2)]
    (served,) = [row for row in rows if "image" in row]
    assert served["name"] == "good" and "?peer=" in served["link"]
    # Other commands on this home go through the node meanwhile.
    done = cli("--json", "cache", "publish", "--path", good.info.path, cache.directory)
    assert (done.returncode, json.loads(done.stdout)["kind"]) == (0, "closure")
    done = cli("--json", "cache", "publish", cache.directory)
    assert done.returncode == 4 and len(done.stdout.splitlines()) == 2
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 4

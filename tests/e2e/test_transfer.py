"""Provide, link, fetch: what a user does, with real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from swarmlib.content import difference, write_random
from swarmlib.control import ask
from swarmlib.process import Daemon

from tests.e2e.conftest import Nodes

MIB = 1 << 20


def make_tree(root: Path) -> Path:
    """A directory with everything that a NAR keeps."""
    (root / "bin").mkdir(parents=True)
    (root / "empty").mkdir()
    write_random(root / "data", 3 * MIB, "tree")
    write_random(root / "copy of data", 3 * MIB, "tree")
    (root / "bin" / "run").write_text("#!/bin/sh\n")
    (root / "bin" / "run").chmod(0o755)
    (root / "bin" / "link").symlink_to("../data")
    (root / "bin" / "dangling").symlink_to("/nowhere")
    (root / "ünïcode").write_bytes(b"")
    os.link(root / "bin" / "run", root / "hard")
    (Path(os.fsdecode(os.fsencode(root) + b"/\xff"))).write_bytes(b"not UTF-8")
    return root


def wait_announced(node: Daemon) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status = ask(node.home.path, "status")
        if status and status[0]["dht"]["announced"] and not status[0]["dht"]["pending"]:
            return
        time.sleep(0.1)
    pytest.fail("the provider's records did not get out")


def test_a_file_by_link(nodes: Nodes, tmp_path: Path) -> None:
    original = tmp_path / "web.img"
    write_random(original, 20 * MIB + 17)
    source, reader = nodes.daemon("a"), nodes.daemon("b")

    provided = source.run("provide", str(original)).check()
    assert len(provided.stdout.splitlines()) == 1
    said = provided.json
    assert said.keys() >= {"image", "link", "kind", "name", "bytes", "new_bytes", "chunks", "seconds"}
    assert (said["kind"], said["name"], said["bytes"]) == ("file", "web.img", original.stat().st_size)
    assert said["new_bytes"] == said["bytes"]
    assert said["link"].startswith(f"p2pnode:{said['image']}?peer=/ip4/127.0.0.1/tcp/")
    assert said["link"].endswith("&name=web.img")

    out = tmp_path / "copy.img"
    fetched = reader.run("fetch", said["link"], "-o", str(out)).check()
    assert len(fetched.stdout.splitlines()) == 1
    result = fetched.json
    assert result["image"] == said["image"]
    assert result["path"] == str(out)
    assert result["bytes"] == original.stat().st_size
    assert result["from"].keys() == {source.peer_id}
    assert result["from"][source.peer_id] + result["duplicate_bytes"] == result["received_bytes"]
    assert result["received_bytes"] < result["bytes"] + MIB  # the manifest comes on top, and little else
    assert (result["banned"], result["relayed_bytes"]) == ([], 0)
    assert result["seconds"] > 0
    assert difference(original, out) is None
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.slow
def test_a_directory_by_id_with_only_a_bootstrap_address(nodes: Nodes, tmp_path: Path) -> None:
    original = make_tree(tmp_path / "tree")
    meeting_point = nodes.daemon("m")
    source = nodes.daemon("a", via=meeting_point)
    readers = [nodes.daemon(name, via=meeting_point) for name in "bc"]
    said = source.run("provide", str(original)).check().json
    assert said["kind"] == "directory"
    wait_announced(source)

    commands = [
        reader.begin("fetch", said["image"], "-o", str(tmp_path / f"out-{i}")) for i, reader in enumerate(readers)
    ]
    for i, command in enumerate(commands):
        result = command.wait(60).check().json
        assert difference(original, tmp_path / f"out-{i}") is None
        assert sum(result["from"].values()) + result["duplicate_bytes"] == result["received_bytes"]
        assert meeting_point.peer_id not in result["from"]
        # One of two equal files is enough.
        assert result["received_bytes"] < 4 * MIB


def test_without_any_daemon(nodes: Nodes, tmp_path: Path) -> None:
    original = tmp_path / "image"
    write_random(original, 5 * MIB)
    provide = nodes.begin("provide", original, home=nodes.home("a"))
    deadline = time.monotonic() + 30
    while not provide.stdout.endswith("\n"):
        assert provide.poll() is None and time.monotonic() < deadline, provide.stderr
        time.sleep(0.05)
    link = json.loads(provide.stdout)["link"]

    result = nodes.begin("fetch", link, "-o", tmp_path / "copy", home=nodes.home("b")).wait(60).check().json
    assert difference(original, tmp_path / "copy") is None
    assert result["bytes"] == 5 * MIB

    provide.signal(signal.SIGINT)
    assert provide.wait(5).code == 130


@pytest.mark.slow
def test_only_importing_needs_no_network_and_the_image_is_there_later(nodes: Nodes, tmp_path: Path) -> None:
    original = make_tree(tmp_path / "tree")
    home = nodes.home("a")
    said = nodes.begin("provide", "--no-serve", original, home=home).wait(60).check().json
    again = nodes.begin("provide", "--no-serve", original, home=home).wait(60).check().json
    assert again["image"] == said["image"]
    assert again["new_bytes"] == 0
    shown = nodes.begin("images", home=home).wait(30).check().json
    assert shown["image"] == said["image"]

    source, reader = nodes.daemon("a"), nodes.daemon("b")
    link = f"p2pnode:{said['image']}?peer={source.addrs[0]}"
    reader.run("fetch", link, "-o", str(tmp_path / "out")).check()
    assert difference(original, tmp_path / "out") is None


@pytest.mark.slow
def test_without_output_it_stays_in_the_store_and_is_served_from_there(nodes: Nodes, tmp_path: Path) -> None:
    original = tmp_path / "image"
    write_random(original, 6 * MIB)
    source, middle, reader = nodes.daemon("a"), nodes.daemon("b"), nodes.daemon("c")
    said = source.run("provide", str(original)).check().json
    result = middle.run("fetch", said["link"]).check().json
    assert result["path"] is None
    assert middle.run("verify", said["image"]).check().code == 0
    source.stop()

    link = f"p2pnode:{said['image']}?peer={middle.addrs[0]}"
    fetched = reader.run("fetch", link, "-o", str(tmp_path / "copy")).check().json
    assert fetched["from"].keys() == {middle.peer_id}
    assert difference(original, tmp_path / "copy") is None


@pytest.mark.slow
def test_a_new_version_transfers_only_what_is_new(nodes: Nodes, tmp_path: Path) -> None:
    old, new = tmp_path / "v1", tmp_path / "v2"
    write_random(old, 32 * MIB)
    write_random(tmp_path / "insertion", 100_000, "other")
    data = old.read_bytes()
    new.write_bytes(data[: 11 * MIB] + (tmp_path / "insertion").read_bytes() + data[11 * MIB :])
    source, reader = nodes.daemon("a"), nodes.daemon("b")
    first = source.run("provide", str(old)).check().json
    reader.run("fetch", first["link"], "-o", str(tmp_path / "copy1")).check()

    second = source.run("provide", str(new)).check().json
    # The insertion, and the rest of the chunk it fell into; at most a few chunks until the cuts meet again.
    assert 100_000 <= second["new_bytes"] < 3 * MIB
    result = reader.run("fetch", second["link"], "-o", str(tmp_path / "copy2")).check().json
    assert 100_000 <= result["received_bytes"] < 3 * MIB
    assert difference(new, tmp_path / "copy2") is None
    assert difference(old, tmp_path / "copy1") is None


@pytest.mark.slow
def test_a_changed_original_is_not_served_but_reported(nodes: Nodes, tmp_path: Path) -> None:
    original = tmp_path / "image"
    write_random(original, 4 * MIB)
    source, reader = nodes.daemon("a"), nodes.daemon("b")
    said = source.run("provide", str(original)).check().json
    with original.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"changed")
    out = tmp_path / "out" / "copy"
    out.parent.mkdir()
    failed = reader.begin("fetch", "--timeout", "5", said["link"], "-o", str(out)).wait(60)
    assert failed.code == 6, failed
    assert not out.exists()
    assert any("image" in problem["path"] for problem in source.run("status").check().json["problems"])

"""A binary cache that Nix wrote, published: others get all of it from the swarm, through their gateways and by link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from swarmlib.process import Daemon

from tests.e2e.conftest import Nodes
from tests.e2e.test_gateway import KEY, Consumer, closure, http_server, received
from tests.e2e.test_transfer import wait_announced
from tests.nix.stores import ChrootStore

pytestmark = pytest.mark.nix


@pytest.fixture
def meeting_point(nodes: Nodes) -> Daemon:
    return nodes.daemon("m")


class Written:
    """A signed closure in a cache of Nix's own making; the store that it came from is gone."""

    def __init__(self, directory: Path, compression: str) -> None:
        parts = closure(11, 3 << 20, 100, 600_000, 2000)
        self.contents = {path: data for path, data, _ in parts}
        self.paths = list(self.contents)
        self.top = self.paths[-1]
        store = ChrootStore(directory / "origin")
        store.register(parts)
        (directory / "key").write_text(str(KEY))
        self.directory = directory / "cache"
        options = f"compression={compression}&secret-key={directory / 'key'}"
        store.copy_to(f"file://{self.directory}?{options}", self.top)


def installs(consumer: Consumer, written: Written) -> None:
    """Stock Nix behind the consumer's gateway gets the whole closure, and finds nothing wrong with it."""
    done = consumer.copy(written.top)
    assert done.returncode == 0, done.stderr
    assert consumer.store.valid() == set(written.paths)
    consumer.verify(written.top)
    for path, data in written.contents.items():
        assert consumer.store.real(path).read_bytes() == data


@pytest.mark.parametrize(
    "compression", ["none", pytest.param("xz", marks=pytest.mark.slow), pytest.param("zstd", marks=pytest.mark.slow)]
)
def test_a_directory(nodes: Nodes, meeting_point: Daemon, tmp_path: Path, compression: str) -> None:
    written = Written(tmp_path, compression)
    publisher = nodes.daemon("p", via=meeting_point)
    done = publisher.run("cache", "publish", str(written.directory)).check()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(written.paths)
    total = sum(row["bytes"] for row in rows)
    assert sum(row["new_bytes"] for row in rows) == total
    owned = publisher.run("status").check().json["store"]["owned_bytes"]
    assert (owned < 1 << 16) if compression == "none" else (total <= owned < 1.1 * total)
    wait_announced(publisher)
    consumer = Consumer(nodes, "c", meeting_point)
    installs(consumer, written)
    assert sum(received(consumer.daemon).values()) > 3 << 20

    again = publisher.run("cache", "publish", str(written.directory)).check()
    assert not any(json.loads(line)["new_bytes"] for line in again.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "xz"])
def test_a_closure_of_a_server(nodes: Nodes, meeting_point: Daemon, tmp_path: Path, compression: str) -> None:
    written = Written(tmp_path, compression)
    publisher = nodes.daemon("p", via=meeting_point)
    with http_server(written.directory) as url:
        said = publisher.run("cache", "publish", url, "--path", str(written.top)).check().json
    assert said["kind"] == "closure" and said["bytes"] > 3 << 20
    wait_announced(publisher)  # the server is gone
    consumer = Consumer(nodes, "c", meeting_point)
    installs(consumer, written)
    # One link gives all of it to whom needs no Nix, and the signatures travel with it.
    reader = nodes.daemon("r", extra={"trusted_public_keys": [str(KEY.public_key())]})
    reader.run("fetch", said["link"], "--require-signatures", "always", "-o", str(tmp_path / "out")).check()
    for path, data in written.contents.items():
        assert (tmp_path / "out" / path.base_name).read_bytes() == data

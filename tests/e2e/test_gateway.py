"""A machine with stock Nix whose only substituter is our gateway: closures come from other machines' Nix stores."""

from __future__ import annotations

import concurrent.futures
import hashlib
import http.client
import http.server
import json
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from swarmlib.process import Daemon

from p2pnode.nix.hashes import nix32_encode
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import SecretKey, SignedInfo
from p2pnode.nix.storepath import StorePath
from tests.e2e.conftest import Nodes
from tests.e2e.test_transfer import wait_announced
from tests.nix.stores import NIX, ChrootStore, signed_infos

pytestmark = pytest.mark.nix

KEY = SecretKey.generate("publisher-1")


def closure(seed: int, *sizes: int) -> list[tuple[StorePath, bytes, list[StorePath]]]:
    """Paths that each refer to the one before, as if they had been built; the last one is the top."""
    made: list[tuple[StorePath, bytes, list[StorePath]]] = []
    for number, size in enumerate(sizes):
        data = random.Random(f"{seed}/{number}").randbytes(size)
        path = StorePath(nix32_encode(hashlib.sha256(data).digest()[:20]), f"part-{seed}-{number}")
        made.append((path, data, [made[-1][0]] if made else []))
    return made


class Publisher:
    """A Nix store with a signed closure, and a node that provides it."""

    def __init__(
        self,
        nodes: Nodes,
        name: str,
        parts: Any,
        via: Daemon | None,
        *,
        sign: bool = True,
        faults: Sequence[str] = (),
    ) -> None:
        self.store = ChrootStore(nodes.directory / f"{name}-nix")
        self.store.register(parts)
        self.top = parts[-1][0]
        self.paths = [path for path, _, _ in parts]
        self.daemon = nodes.daemon(name, via=via, faults=faults, extra={"nix_store": str(self.store.root)})
        arguments = []
        if sign:
            key = nodes.directory / "key"
            key.write_text(str(KEY))
            arguments = ["--sign-key", str(key)]
        self.said = self.daemon.run("provide", "--kind", "closure", *arguments, str(self.top)).check().json
        wait_announced(self.daemon)


class Consumer:
    """An empty Nix store, and a node with a gateway that is its only substituter."""

    def __init__(self, nodes: Nodes, name: str, via: Daemon | None, **settings: Any) -> None:
        extra = {"gateway": "127.0.0.1:0", "trusted_public_keys": [str(KEY.public_key())], **settings}
        self.daemon = nodes.daemon(name, via=via, extra=extra)
        (self.url,) = gateway_urls(self.daemon)
        self.store = ChrootStore(
            nodes.directory / f"{name}-nix", f"trusted-public-keys = {KEY.public_key()}", f"substituters = {self.url}"
        )

    def copy(self, path: StorePath) -> subprocess.CompletedProcess[str]:
        command = [*NIX, "copy", "--from", self.url, "--to", str(self.store.root), str(path)]
        return subprocess.run(
            command, env=self.store.environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )

    def realise(self, path: StorePath) -> subprocess.CompletedProcess[str]:
        """What Nix does for a build: substitutes, in parallel."""
        command = ["nix-store", "--store", str(self.store.root), "-r", str(path), "--option", "max-jobs", "4"]
        return subprocess.run(
            command, env=self.store.environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )

    def verify(self, path: StorePath) -> None:
        trusted = ["--option", "trusted-public-keys", str(KEY.public_key())]
        self.store.run(*NIX, "store", "verify", "-r", "--store", str(self.store.root), *trusted, str(path))


def gateway_urls(daemon: Daemon) -> list[str]:
    assert daemon.command is not None
    first = next(line for line in daemon.command.stdout.splitlines() if line.startswith("{"))
    urls: list[str] = json.loads(first)["gateway"]
    return urls


@pytest.fixture
def meeting_point(nodes: Nodes) -> Iterator[Daemon]:
    yield nodes.daemon("m")


@pytest.mark.parametrize("how", ["copy", pytest.param("realise", marks=pytest.mark.slow)])
def test_nix_installs_a_closure_that_only_another_machine_has(nodes: Nodes, meeting_point: Daemon, how: str) -> None:
    parts = closure(1, 3 << 20, 100, 600_000, 2000)
    publisher = Publisher(nodes, "p", parts, meeting_point)
    consumer = Consumer(nodes, "c", meeting_point)
    done = consumer.copy(publisher.top) if how == "copy" else consumer.realise(publisher.top)
    assert done.returncode == 0, done.stderr
    assert consumer.store.valid() == set(publisher.paths)
    consumer.verify(publisher.top)
    for path, data, _ in parts:
        assert consumer.store.real(path).read_bytes() == data
    counted = consumer.daemon.run("status").check().json["gateway"]
    assert counted["urls"] == [consumer.url] and counted["in_progress"] == 0
    assert counted["nars"] == counted["swarm"]["nars"] == len(parts)
    assert counted["bytes"] == sum(each.info.nar_size for each in consumer.store.info(*publisher.paths))
    assert counted["narinfo_hits"] >= len(parts) and counted["nar_misses"] == 0
    assert publisher.daemon.run("status").check().json["gateway"] is None


@pytest.mark.slow
def test_nix_takes_a_narinfo_that_names_a_dag(nodes: Nodes, meeting_point: Daemon) -> None:
    """Stock Nix reads the rest of it as ever, and installs the path."""
    parts = closure(6, 2 << 20, 1000)
    publisher = Publisher(nodes, "p", parts, meeting_point)
    consumer = Consumer(nodes, "c", meeting_point, gateway_ipfs_cid=True)
    for name in ("swarm", "store"):  # where the NARs are; roots are named of those that are here
        consumer.store = ChrootStore(nodes.directory / name, f"trusted-public-keys = {KEY.public_key()}")
        done = consumer.copy(publisher.top)
        assert done.returncode == 0, done.stderr
        consumer.verify(publisher.top)
        texts = [httpx.get(f"{consumer.url}/{path.digest}.narinfo", trust_env=False).text for path in publisher.paths]
        assert all("\nIpfsCid: b" in text for text in texts)
    consumer.store = ChrootStore(nodes.directory / "asking")
    command = [*NIX, "path-info", "--json", "--store", consumer.url, *map(str, publisher.paths)]
    said = signed_infos(json.loads(consumer.store.run(*command)))
    assert {each.info.path: each for each in said} == {each.info.path: each for each in map(signed, texts)}


def signed(text: str) -> SignedInfo:
    return parse(text).signed


@pytest.mark.slow
def test_an_unsigned_closure_is_refused(nodes: Nodes, meeting_point: Daemon) -> None:
    publisher = Publisher(nodes, "p", closure(2, 1000, 2000), meeting_point, sign=False)
    consumer = Consumer(nodes, "c", meeting_point)
    done = consumer.copy(publisher.top)
    assert done.returncode != 0
    assert str(publisher.top) in done.stderr
    assert publisher.top not in consumer.store.valid()
    # Where the gateway lets everything through, Nix refuses, and says why.
    lax = Consumer(nodes, "d", meeting_point, require_signatures="off")
    done = lax.copy(publisher.top)
    assert done.returncode != 0 and "lacks a valid signature" in done.stderr, done.stderr
    assert publisher.top not in lax.store.valid()


@pytest.mark.slow
def test_three_publishers_one_of_which_is_killed(nodes: Nodes, meeting_point: Daemon) -> None:
    parts = closure(3, *[4 << 20] * 8)
    publishers = [Publisher(nodes, name, parts, meeting_point) for name in ("p", "q", "r")]
    consumer = Consumer(nodes, "c", meeting_point)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        running = threads.submit(consumer.copy, publishers[0].top)
        deadline = time.monotonic() + 60
        while not received(consumer.daemon):
            assert time.monotonic() < deadline, "nothing came"
            time.sleep(0.02)
        publishers[2].daemon.kill()
        done = running.result()
    assert done.returncode == 0, done.stderr
    consumer.verify(publishers[0].top)
    assert len([peer for peer, size in received(consumer.daemon).items() if size]) >= 2


def received(daemon: Daemon) -> dict[str, int]:
    lines = daemon.run("peers").check().stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return {row["peer"]: row["received_bytes"] for row in rows if row["received_bytes"]}


@pytest.mark.slow
def test_a_file_that_changed_in_the_publishers_store_never_reaches_nix(nodes: Nodes, meeting_point: Daemon) -> None:
    parts = closure(4, 2 << 20)
    publisher = Publisher(nodes, "p", parts, meeting_point)
    real = publisher.store.real(publisher.top)
    real.chmod(0o644)
    with real.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"changed")
    consumer = Consumer(nodes, "c", meeting_point)
    done = consumer.copy(publisher.top)
    assert done.returncode != 0
    assert publisher.top not in consumer.store.valid()


@contextmanager
def http_server(directory: Path) -> Iterator[str]:
    """A binary cache's directory over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_upstream_narinfos_and_upstream_nars(nodes: Nodes, meeting_point: Daemon, tmp_path: Path) -> None:
    parts = closure(5, 2 << 20, 1000, 400_000)
    publisher = Publisher(nodes, "p", parts, meeting_point, sign=False)
    cache = tmp_path / "cache"
    (tmp_path / "key").write_text(str(KEY))
    publisher.store.copy_to(f"file://{cache}?secret-key={tmp_path / 'key'}", publisher.top)
    (cache / "nar").rename(tmp_path / "nars")  # signed narinfos, and nothing else
    with http_server(cache) as url:
        consumer = Consumer(nodes, "c", meeting_point, gateway_upstreams=[url])
        done = consumer.copy(publisher.top)
        assert done.returncode == 0, done.stderr
        consumer.verify(publisher.top)
        assert sum(received(consumer.daemon).values()) > 2 << 20
        # Now the other way round: the swarm is empty, and the NARs are back.
        publisher.daemon.stop()
        consumer.daemon.stop()
        (tmp_path / "nars").rename(cache / "nar")
        second = Consumer(nodes, "d", meeting_point, gateway_upstreams=[url])
        done = second.copy(publisher.top)
        assert done.returncode == 0, done.stderr
        second.verify(publisher.top)
    # The server is gone; what it gave is served to the next.
    wait_announced(second.daemon)
    third = Consumer(nodes, "e", meeting_point)
    done = third.copy(publisher.top)
    assert done.returncode == 0, done.stderr
    third.verify(publisher.top)
    assert list(received(third.daemon))


def misses(host: str, count: int, seed: int) -> list[float]:
    """Seconds of each of so many look-ups of paths that nobody has, one after the other."""
    connection = http.client.HTTPConnection(host, timeout=30)
    seconds = []
    for number in range(count):
        part = nix32_encode(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:20])
        began = time.perf_counter()
        connection.request("GET", f"/{part}.narinfo")
        response = connection.getresponse()
        response.read()
        seconds.append(time.perf_counter() - began)
        assert response.status == 404
    connection.close()
    return seconds


@pytest.mark.slow
def test_misses_are_quick(nodes: Nodes, meeting_point: Daemon) -> None:
    consumer = Consumer(nodes, "c", meeting_point)
    host = consumer.url.removeprefix("http://")
    misses(host, 20, 0)
    seconds = misses(host, 1000, 1)
    p99 = statistics.quantiles(seconds, n=100)[98]
    print(f"1,000 misses: median {statistics.median(seconds) * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms")
    assert p99 < 0.05


@pytest.mark.slow
def test_a_storm_of_misses_leaves_memory_where_it_was(nodes: Nodes, meeting_point: Daemon) -> None:
    consumer = Consumer(nodes, "c", meeting_point)
    host = consumer.url.removeprefix("http://")
    process = psutil.Process(consumer.daemon.pid)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda seed: misses(host, 100, seed), range(16)))
        before = process.memory_info().rss
        list(threads.map(lambda seed: misses(host, 625, seed), range(16, 32)))
    grown = process.memory_info().rss - before
    print(f"10,000 misses on 16 connections: {grown / 1e6:.1f} MB more")
    assert grown < 16 << 20

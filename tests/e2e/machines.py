"""Machines in network namespaces, each with a Nix of its own and a node: those that publish, and those that consume."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmlib.crossing import Node, Site, until
from swarmlib.lab import Host
from swarmlib.process import Command

from p2pnode.nix.hashes import nix32_encode
from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.storepath import StorePath
from tests.nix.stores import NIX, ChrootStore, Contents

KEY = SecretKey.generate("publisher-1")
GATEWAY = "127.0.0.1:5080"
HTTP_PORT = 8080
RATE = "200mbit"

Part = tuple[StorePath, Contents, list[StorePath]]


def closure(seed: str, count: int, size: int) -> list[Part]:
    """So many paths of about `size` bytes in all, as if they had been built; the last one is the top and refers to all.

    Some are single files and most are directories; some are large and most are small; some refer to themselves.
    """
    chance = random.Random(seed)
    weights = [chance.paretovariate(0.8) for _ in range(count)]
    made: list[Part] = []
    for number, weight in enumerate(weights):
        data = chance.randbytes(1 + int(size * weight / sum(weights)))
        path = StorePath(nix32_encode(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:20]), f"part-{number}")
        contents: Contents = data
        if number % 4:
            middle = len(data) // 2
            contents = {
                f"bin/part-{number}": f"#!/bin/sh\nexec {path}/lib/a\n".encode(),
                "lib/a": data[:middle],
                "lib/b": data[middle:],
                "lib/c": "b",
                "share/empty": b"",
            }
        earlier = [each for each, _, _ in made]
        references = earlier if number == count - 1 else chance.sample(earlier, min(3, len(earlier)))
        made.append((path, contents, [*references, path] if number % 3 == 1 else references))
    return made


@dataclass(frozen=True)
class Publisher:
    """A machine whose Nix store holds a closure, which its node provides."""

    node: Node
    nix: ChrootStore
    parts: Sequence[Part]

    @property
    def top(self) -> StorePath:
        return self.parts[-1][0]

    @property
    def paths(self) -> list[StorePath]:
        return [path for path, _, _ in self.parts]


def publisher(
    site: Site,
    label: str,
    parts: Sequence[Part],
    *,
    via: Sequence[Node] = (),
    key: SecretKey | None = KEY,
    rate: str = RATE,
) -> Publisher:
    """The closure's signatures are Nix's own, made with `key`."""
    nix = ChrootStore(site.directory / f"{label}-nix")
    nix.register(parts)
    top = parts[-1][0]
    if key is not None:
        file = nix.base / "key"
        file.write_text(str(key))
        nix.nix("store", "sign", "-k", str(file), "-r", str(top))
    node = site.node(label, via=via, rate=rate, nix_store=str(nix.root))
    node.daemon.run("provide", "--kind", "closure", str(top)).check()
    wait_announced(node)
    return Publisher(node, nix, parts)


def wait_announced(node: Node) -> None:
    """Until what the node has can be found by others."""

    def announced() -> bool:
        told = node.status()["dht"]
        return bool(told["announced"]) and not told["pending"]

    until(announced, 30, f"the records of {node.host.label} are out")


@dataclass(frozen=True)
class Consumer:
    """A machine with an empty Nix store and a stock Nix, which knows the gateway of its own node and one key."""

    node: Node
    nix: ChrootStore

    def command(self, how: str, path: StorePath) -> list[str]:
        """`copy`: one path after the other; `realise`: what Nix does for a build, in parallel."""
        if how == "copy":
            nix = [*NIX, "copy", "--from", f"http://{GATEWAY}", "--to", str(self.nix.root), str(path)]
        else:
            nix = ["nix-store", "--store", str(self.nix.root), "-r", str(path), "--option", "max-jobs", "4"]
        environ = [f"{name}={self.nix.environ[name]}" for name in ("HOME", "NIX_CONF_DIR", "NIX_USER_CONF_FILES")]
        return [*self.node.host.prefix, "env", *environ, *nix]

    def install(self, path: StorePath, how: str = "realise") -> subprocess.CompletedProcess[str]:
        """Ask Nix for a path, and wait until it has it or has given up."""
        command = self.command(how, path)
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, env=self.nix.environ
        )

    def begin(self, path: StorePath) -> Command:
        """Let Nix begin; its output goes to files."""
        return Command(self.command("realise", path), self.nix.base / "realise")

    def check(self, publisher: Publisher) -> None:
        """The whole closure is valid, byte by byte, and so are the signatures that came with it."""
        assert self.nix.valid() == set(publisher.paths)
        trusted = ["--option", "trusted-public-keys", str(KEY.public_key()), "--sigs-needed", "1"]
        self.nix.nix("store", "verify", "-r", *trusted, str(publisher.top))
        for had, has in zip(publisher.nix.info(*publisher.paths), self.nix.info(*publisher.paths), strict=True):
            assert has.info == had.info
            assert set(has.signatures) >= set(had.signatures)

    def received(self) -> dict[str, int]:
        """Bytes of blocks from each peer that is connected."""
        return {row["peer"]: row["received_bytes"] for row in self.node.peers() if row["received_bytes"]}


def consumer(site: Site, label: str, *, via: Sequence[Node] = (), **settings: Any) -> Consumer:
    lines = [f"trusted-public-keys = {KEY.public_key()}", f"substituters = http://{GATEWAY}"]
    nix = ChrootStore(site.directory / f"{label}-nix", *lines, "narinfo-cache-negative-ttl = 0")
    # The node finds its keys where this machine's Nix has them.
    environ = {name: nix.environ[name] for name in ("NIX_CONF_DIR", "NIX_USER_CONF_FILES")}
    node = site.node(label, via=via, rate=RATE, environ=environ, gateway=GATEWAY, **settings)
    return Consumer(node, nix)


@dataclass(frozen=True)
class HttpServer:
    """A directory over HTTP. `url` is reachable for all machines of the lab."""

    url: str
    command: Command

    @property
    def requests(self) -> list[str]:
        """What was asked for, as `GET /nar/...`."""
        return [line.split('"')[1].rpartition(" ")[0] for line in self.command.stderr.splitlines() if '"' in line]


@contextmanager
def http_server(host: Host, directory: Path) -> Iterator[HttpServer]:
    program = [sys.executable, "-m", "http.server", "--protocol", "HTTP/1.1", "--directory", str(directory)]
    log = directory.with_name(f"{directory.name}-server")
    command = Command([*program, "--bind", host.address, str(HTTP_PORT)], log, prefix=host.prefix)
    with ExitStack() as stack:
        stack.callback(command.kill)
        until(lambda: "Serving HTTP" in command.stdout, 20, "the server of the cache listens")
        yield HttpServer(f"http://{host.address}:{HTTP_PORT}", command)

#!/usr/bin/env python3
"""What the Nix binary cache of a node costs those who ask it: misses, storms of misses, and large NARs.

    scripts/bench/gateway.py                     a table
    scripts/bench/gateway.py --json              one JSON object instead
    scripts/bench/gateway.py --size 4G --runs 3 --only nars

Everything runs in processes of this machine, on loopback; needs nix-store, curl, and for a comparison nginx.

figures
  misses   narinfos that nobody has, one after the other on one connection, of a node with --peers neighbours: ms
  frozen   the same while one neighbour is connected but answers nothing (SIGSTOP): the longest look-up, in seconds,
           against the configured bound (gateway_lookup_seconds), and how long it is until misses are quick again
  storm    --storm look-ups on --connections at once: their rate, and the node's resident memory before the first
           storm, after it, and after a second one, in MiB
  nars     one NAR of --size random bytes to `curl -o /dev/null`, the median of --runs: MB/s (10^6 bytes) and CPU
           seconds per 2^30 bytes of the server's process: out of the node's own store, where the hash of every chunk is
           checked before it is sent; through the swarm, from another node, which is verified and kept too; and from
           nginx, the same bytes as a file, not encrypted and not checked

Exit code 0: misses have a p99 below 50 ms, frozen neighbours keep nobody longer than 0.5 s over the bound, and the
second storm takes less than 16 MiB more than the first.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1]))

from swarmlib.content import parse_size, write_random
from swarmlib.control import ask
from swarmlib.crossing import until
from swarmlib.process import Command, Daemon, Home, SwarmError, Usage
from transferlib import installation

MIB, GIB, MB = 1 << 20, 1 << 30, 10**6
BOUND = 3.0  # s, the default of gateway_lookup_seconds
PARTS = ("misses", "frozen", "storm", "nars")
_ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    add("--peers", type=int, default=2, help="neighbours that have nothing (default 2)")
    add("--misses", type=int, default=1000, help="in a row (default 1000)")
    add("--storm", type=int, default=10_000, help="look-ups (default 10000)")
    add("--connections", type=int, default=200, help="at once in a storm (default 200)")
    add("--size", type=parse_size, default=parse_size("1G"), help="of the NAR (default 1G)")
    add("--runs", type=int, default=3, help="downloads of the NAR each way (default 3)")
    add("--tmp", type=Path, help="where the temporary directory is made; takes three times the size")
    options = parser.parse_args(argv)
    unknown = set(options.only) - set(PARTS)
    if unknown or not options.only:
        parser.error(f"--only: {', '.join(sorted(unknown)) or 'nothing'} is none of {', '.join(PARTS)}")
    if min(options.misses, options.storm) < 100 or min(options.connections, options.runs) < 1 or options.peers < 0:
        parser.error("too few: at least 100 look-ups, one connection and one run")
    directory = Path(tempfile.mkdtemp(prefix="p2pnode-bench-", dir=options.tmp))
    try:
        with ExitStack() as stack:
            figures = measure(stack, directory, options)
    except SwarmError as error:
        print(f"gateway.py: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(figures) if options.json else text(figures))
    return 0 if figures["ok"] else 1


def measure(stack: ExitStack, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures that were asked for. Raises SwarmError."""
    figures: dict[str, Any] = {}
    good = True
    if {"misses", "frozen", "storm"} & set(options.only):
        meeting = stack.enter_context(Daemon(Home(directory / "meeting")))
        peers = [stack.enter_context(neighbour(directory / f"peer{n}", meeting)) for n in range(options.peers)]
        node, host = gateway(stack, directory / "node", meeting)
        until(lambda: connected(node) >= {each.peer_id for each in (meeting, *peers)}, 30, "all are connected")
        list(look_up(host, 50))  # what is imported or opened only once
    if "misses" in options.only:
        seconds = list(look_up(host, options.misses))
        quantiles = statistics.quantiles(seconds, n=100)
        named = {"median": statistics.median(seconds), "p99": quantiles[98], "max": max(seconds)}
        figures["misses"] = {"count": len(seconds)} | {f"{name}_ms": each * 1000 for name, each in named.items()}
        good &= quantiles[98] < 0.05
    if "storm" in options.only:
        figures["storm"] = storms(node, host, options)
        good &= figures["storm"]["after_second_mib"] - figures["storm"]["after_first_mib"] < 16
    if "frozen" in options.only:
        figures["frozen"] = frozen(host, peers[0] if peers else meeting)
        good &= figures["frozen"]["max_seconds"] < BOUND + 0.5
    if "nars" in options.only:
        figures["nars"] = nars(stack, directory, options)
    return {"ok": good, **figures}


def neighbour(home: Path, meeting: Daemon) -> Daemon:
    """A node that others know of from `meeting`."""
    return Daemon(Home(home, bootstrap=meeting.addrs[:1]))


def gateway(stack: ExitStack, home: Path, meeting: Daemon | None, **settings: Any) -> tuple[Daemon, str]:
    """A node with a gateway, and the gateway's HOST:PORT."""
    bootstrap = meeting.addrs[:1] if meeting else ()
    extra = {"gateway": "127.0.0.1:0", "require_signatures": "off", **settings}
    node = stack.enter_context(Daemon(Home(home, bootstrap=bootstrap, extra=extra)))
    assert node.command is not None
    (url,) = json.loads(node.command.stdout.partition("\n")[0])["gateway"]
    return node, url.removeprefix("http://")


def connected(node: Daemon) -> set[str]:
    return {row["peer"] for row in ask(node.home.path, "peers") or []}


# Look-ups

_numbers = itertools.count()


def look_up(host: str, count: int) -> Iterator[float]:
    """Seconds of each of so many look-ups of paths that nobody has, one after the other."""
    connection = http.client.HTTPConnection(host, timeout=60)
    chance = random.Random(next(_numbers))
    try:
        for _ in range(count):
            part = "".join(chance.choices(_ALPHABET, k=32))
            began = time.perf_counter()
            connection.request("GET", f"/{part}.narinfo")
            response = connection.getresponse()
            response.read()
            yield time.perf_counter() - began
            if response.status != 404:
                raise SwarmError(f"a narinfo that nobody has was answered with status {response.status}")
    except (OSError, http.client.HTTPException) as error:
        raise SwarmError(f"the gateway does not answer: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def storms(node: Daemon, host: str, options: argparse.Namespace) -> dict[str, float]:
    """Two storms of the same size: what the second one adds is lost for good, the first one also fills caches."""
    process = psutil.Process(node.pid)
    before = process.memory_info().rss
    first, rate = storm(host, options.storm, options.connections), 0.0
    after_first = process.memory_info().rss
    rate = options.storm / min(first, storm(host, options.storm, options.connections))
    after_second = process.memory_info().rss
    named = {"before": before, "after_first": after_first, "after_second": after_second}
    sizes = {f"{name}_mib": size / MIB for name, size in named.items()}
    return {"count": options.storm, "connections": options.connections, "per_second": rate, **sizes}


def storm(host: str, count: int, connections: int) -> float:
    """So many look-ups, spread over connections that are all open at once; the seconds it took."""
    failures: list[SwarmError] = []

    def one(share: int) -> None:
        try:
            for _ in look_up(host, share):
                pass
        except SwarmError as error:
            failures.append(error)

    shares = [count // connections + (number < count % connections) for number in range(connections)]
    threads = [threading.Thread(target=one, args=(share,)) for share in shares]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SwarmError(f"{len(failures)} of {connections} connections failed; {failures[0]}")
    return time.perf_counter() - began


def frozen(host: str, victim: Daemon) -> dict[str, float]:
    os.kill(victim.pid, signal.SIGSTOP)
    began = time.perf_counter()
    longest, quick = 0.0, 0
    try:
        for seconds in look_up(host, 1000):
            longest = max(longest, seconds)
            quick = quick + 1 if seconds < 0.05 else 0
            if quick == 20:
                return {"bound_seconds": BOUND, "max_seconds": longest, "until_quick": time.perf_counter() - began}
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    raise SwarmError("with a frozen neighbour the gateway never became quick again")


# NARs


def nars(stack: ExitStack, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A path that its own content proves, so nobody has to sign it."""
    for program in ("nix-store", "curl"):
        if shutil.which(program) is None:
            raise SwarmError(f"{program} is not installed; --only misses,frozen,storm needs none")
    original = directory / "large"
    write_random(original, options.size)
    root = directory / "nix"
    environ = {"NIX_CONF_DIR": str(directory), "HOME": str(directory), "PATH": os.environ["PATH"]}
    added = subprocess.run(
        ["nix-store", "--store", root, "--add", original], env=environ, capture_output=True, text=True, check=False
    )
    if added.returncode:
        raise SwarmError(f"nix-store --add failed: {added.stderr.strip()}")
    original.unlink()
    path = added.stdout.strip()
    owner, own = gateway(stack, directory / "owner", None, nix_store=str(root))
    owner.run("provide", "--kind", "store-path", path).check()
    url = nar_url(own, path)
    rows = {"store": [download(f"http://{own}/{url}", owner.pid) for _ in range(options.runs)]}
    rows["swarm"] = []
    for number in range(options.runs):
        with ExitStack() as inner:
            reader, host = gateway(inner, directory / f"reader{number}", owner)
            until(lambda reader=reader: connected(reader), 30, "the two are connected")  # type: ignore[misc]
            rows["swarm"].append(download(f"http://{host}/{nar_url(host, path)}", reader.pid))
        shutil.rmtree(directory / f"reader{number}")
    nginx = installation.program("nginx")
    if nginx is not None:
        with (directory / "large.nar").open("wb") as file:
            subprocess.run(["nix-store", "--dump", f"{root}{path}"], stdout=file, check=True)
        with file_server(directory, nginx) as (base, pid):
            rows["nginx"] = [download(f"{base}/large.nar", pid) for _ in range(options.runs)]
    return {"bytes": options.size} | {
        name: {
            "mb_per_second": statistics.median(size / MB / seconds for size, seconds, _ in runs),
            "cpu_seconds_per_gib": statistics.median(cpu / size * GIB for size, _, cpu in runs),
        }
        for name, runs in rows.items()
    }


def nar_url(host: str, path: str) -> str:
    """Where a gateway says that the NAR of a store path is."""
    digest = path.rpartition("/")[2][:32]
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/{digest}.narinfo")
    response = connection.getresponse()
    lines = response.read().decode().splitlines()
    connection.close()
    if response.status != 200:
        raise SwarmError(f"the gateway does not know {path}")
    return next(line.partition(": ")[2] for line in lines if line.startswith("URL: "))


def download(url: str, server: int) -> tuple[int, float, float]:
    """Bytes, seconds, and CPU seconds of the server."""
    before = Usage.of(server).cpu_seconds
    command = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--output", "/dev/null"]
    form = "%{size_download} %{time_total}"
    done = subprocess.run([*command, "--write-out", form, url], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SwarmError(f"curl failed: {done.stderr.strip()}")
    size, seconds = done.stdout.split()
    return int(size), float(seconds), Usage.of(server).cpu_seconds - before


@contextmanager
def file_server(directory: Path, nginx: str) -> Iterator[tuple[str, int]]:
    """nginx for the files of a directory: its URL and process."""
    probe = socket.create_server(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    configuration = directory / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    paths = "".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi"))
    configuration.write_text(
        f"daemon off; master_process off; {user} pid {directory}/nginx.pid; events {{ }} http {{ access_log off;"
        f" sendfile on; {paths} scgi_temp_path {directory}/scgi;"
        f" server {{ listen 127.0.0.1:{port}; root {directory}; }} }}"
    )
    args = [nginx, "-p", str(directory), "-c", str(configuration), "-e", str(directory / "error.log")]
    server = Command(args, directory / "server")
    try:
        until(lambda: (directory / "nginx.pid").exists() or server.poll() is not None, 10, "nginx listens")
        if server.poll() is not None:
            raise SwarmError(f"nginx ended: {server.stderr.strip()}")
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        with suppress(ProcessLookupError):
            server.kill()


def text(figures: dict[str, Any]) -> str:
    lines = []
    if (row := figures.get("misses")) is not None:
        lines.append(
            f"{row['count']} misses in a row: median {row['median_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms,"
            f" longest {row['max_ms']:.1f} ms"
        )
    if (row := figures.get("storm")) is not None:
        lines.append(
            f"{row['count']} look-ups on {row['connections']} connections: {row['per_second']:.0f} per second; memory"
            f" {row['before_mib']:.0f} MiB, {row['after_first_mib']:.0f} after it,"
            f" {row['after_second_mib']:.0f} after a second storm"
        )
    if (row := figures.get("frozen")) is not None:
        lines.append(
            f"with a frozen neighbour: longest look-up {row['max_seconds']:.2f} s (bound {row['bound_seconds']:.1f} s),"
            f" quick again after {row['until_quick']:.1f} s"
        )
    if (rows := figures.get("nars")) is not None:
        lines.append(f"a NAR of {rows['bytes'] / MIB:.0f} MiB to curl:")
        for name, title in (("store", "the node's store"), ("swarm", "through the swarm"), ("nginx", "a file, nginx")):
            if name in rows:
                row = rows[name]
                speed, cpu = row["mb_per_second"], row["cpu_seconds_per_gib"]
                lines.append(f"  {title:<18} {speed:>7.0f} MB/s  {cpu:>5.2f} CPU s/GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

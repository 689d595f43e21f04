#!/usr/bin/env python3
"""How long `p2pnode fetch --into-store` takes, against `nix copy --from file://` of the same closure.

    scripts/bench/into_store.py                             300 MB in 10,000 files and four store paths, once
    scripts/bench/into_store.py --runs 5 --json figures.json    five rounds, medians
    scripts/bench/into_store.py --paths 1 --split           one large path; and fetch and import one after the other
    scripts/bench/into_store.py --profile                   where the time goes (py-spy)

Both go through a nix-daemon of their own into an empty chroot store each, and both check signatures. Nix reads the
closure from a binary cache on the same disk, not compressed unless --compression says so; p2pnode from a node that
provides it out of another chroot store, over loopback. In each round they run in turn, with fresh processes and stores.

figures, medians over the rounds
  wall s      of the whole command; the nodes and daemons are up before
  CPU s       user and system seconds of each process that took part, of what the command added to it
  disk        what the home of the fetching node takes up afterwards, as a part of the closure
  ratio       of the wall times of one round; at most 1.5, with at most 2 % of disk: else the exit code is 1

--split: another fetch, in two steps: into the node, and from there into the store. Nothing overlaps then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2]))

from swarmlib.content import difference, parse_size
from swarmlib.process import Daemon, Home, SwarmError
from transferlib import profiling
from transferlib.measure import cpu_seconds
from transferlib.report import table

from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.storepath import StorePath
from tests.nix.stores import NIX, ChrootStore, NixDaemon

MB = 10**6
WALL_LIMIT, DISK_LIMIT = 1.5, 0.02
FILES_IN_DIRECTORY = 100
TOUCHED = 4  # times the closure
TOP = StorePath("3" * 32, "top")


@dataclass(frozen=True, slots=True)
class Closure:
    """A signed closure in a store, and in a binary cache beside it. `size`: bytes of its files."""

    store: ChrootStore
    cache: Path
    key: SecretKey
    paths: tuple[StorePath, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Run:
    """One measured command: wall seconds, and processor seconds by process."""

    seconds: float
    cpu: Mapping[str, float]


@dataclass(slots=True)
class Round:
    nix: Run
    p2pnode: Run
    disk: int  # bytes
    split: dict[str, Run] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.p2pnode.seconds / self.nix.seconds


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        missing = [name for name in ("nix", "nix-daemon", "nix-store") if shutil.which(name) is None]
        if missing:
            raise SwarmError(f"there is no {missing[0]} to compare with")
        if options.profile and (problem := profiling.missing()):
            raise SwarmError(problem)
        with ExitStack() as stack:
            directory = Path(tempfile.mkdtemp(prefix="p2pnode-bench-", dir=options.tmp))
            stack.callback(remove, directory)
            closure = made(directory, options.size, options.files, options.paths, options.compression)
            if options.profile:
                profiled(directory, closure)
                return 0
            rounds = []
            for number in range(options.runs):
                rounds.append(one(directory, closure, split=options.split))
                last = rounds[-1]
                say(
                    f"round {number + 1}: nix copy {last.nix.seconds:.2f} s, p2pnode {last.p2pnode.seconds:.2f} s, "
                    f"{last.ratio:.2f} x"
                )
    except SwarmError as error:
        say(f"into_store.py: {error}")
        return 1
    except KeyboardInterrupt:
        say("into_store.py: interrupted")
        return 130
    figures = summary(rounds, closure)
    print(text(figures))
    if options.json is not None:
        machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
        settings = {name: getattr(options, name) for name in ("size", "files", "paths", "compression", "runs")}
        everything = {"machine": machine, "settings": settings, **figures, "rounds": [asdict(each) for each in rounds]}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0 if figures["ok"] else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=parse_size, default=300 * MB, help="of all files (default 300 MB)")
    add("--files", type=int, default=10_000, help="default 10000")
    add("--paths", type=int, default=4, help="store paths that the files are in, beside a small one (default 4)")
    kinds = ("none", "xz", "zstd")
    add("--compression", choices=kinds, default="none", help="of Nix's cache; nix copy --to makes xz (default none)")
    add("--runs", type=int, default=1, metavar="N", help="rounds (default 1)")
    add("--split", action="store_true", help="measure fetch and import one after the other too")
    add("--profile", action="store_true", help="profile the nodes and the daemon instead")
    add("--json", type=Path, metavar="FILE", help="write all figures there too, those of each round included")
    add("--tmp", type=Path, help="where the temporary directory is made; takes six times the size")
    options = parser.parse_args(argv)
    if not (options.runs >= 1 and 1 <= options.paths <= options.files and options.size >= options.files):
        parser.error("at least one run, one path, a file in each, and a byte in each of those")
    return options


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def remove(directory: Path) -> None:
    """Of a store all directories are read-only."""
    subprocess.run(["chmod", "-R", "u+w", str(directory)], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(directory, ignore_errors=True)


def made(directory: Path, size: int, files: int, paths: int, compression: str) -> Closure:
    """A closure of `paths` trees of random files, with a small path above that refers to all of them."""
    key = SecretKey.generate("bench-1")
    (directory / "key").write_text(str(key))
    store = ChrootStore(directory / "source")
    added, written = [], 0
    for path in range(paths):
        tree = directory / f"tree{path}"
        for number in range(path, files, paths):
            place = tree / f"{number // paths // FILES_IN_DIRECTORY:04d}"
            place.mkdir(parents=True, exist_ok=True)
            until = size * (number + 1) // files - size * number // files
            (place / f"{number:06d}").write_bytes(os.urandom(until))
            written += until
        added.append(store.add(tree))
        remove(tree)
    store.register([(TOP, b"top", added)])
    store.nix("store", "sign", "-k", str(directory / "key"), "-r", str(TOP))
    cache = directory / "cache"
    store.copy_to(f"file://{cache}?compression={compression}", TOP)
    return Closure(store, cache, key, (*added, TOP), written)


def settle(size: int) -> None:
    """Have as many pages free and known to the host as either way takes, and nothing left to be written to the disk.

    A virtual machine gets its memory when it first touches it, and may give back what it freed: the page cache of one
    run would be paid for by whoever came first.
    """
    os.sync()
    touch = f"data = bytearray({size}); data[::4096] = b'x' * len(data[::4096])"
    subprocess.run([sys.executable, "-c", touch], check=True)


def one(directory: Path, closure: Closure, *, split: bool) -> Round:
    """Both ways, each into a store of its own."""
    nix = nix_copy(directory / "nix", closure)
    ours, disk = p2pnode(directory / "p2pnode", closure, [("fetch", "--into-store")])
    result = Round(nix, ours[0], disk)
    if split:
        steps, _ = p2pnode(directory / "split", closure, [("fetch",), ("fetch", "--into-store")])
        result.split = dict(zip(("only fetch", "only import"), steps, strict=True))
    return result


def nix_copy(directory: Path, closure: Closure) -> Run:
    directory.mkdir()
    with ExitStack() as stack:
        stack.callback(remove, directory)
        daemon = stack.enter_context(nix_daemon(directory / "store", closure))
        settle(TOUCHED * closure.size)
        watch = Watch({"nix-daemon": daemon_pid(daemon)})
        command = [*NIX, "copy", "--from", f"file://{closure.cache}", "--to", "daemon", str(TOP)]
        environ = daemon.store.environ | {"NIX_DAEMON_SOCKET_PATH": str(daemon.socket)}
        before = os.times()
        done = subprocess.run(command, env=environ, capture_output=True, check=False)
        seconds = time.monotonic() - watch.began
        after = os.times()
        if done.returncode:
            raise SwarmError(f"nix copy failed: {done.stderr.decode(errors='replace').strip()}")
        own = after.children_user + after.children_system - before.children_user - before.children_system
        run = Run(seconds, {"nix copy": own} | watch.spent())
        check(closure, daemon.store)
    return run


def p2pnode(directory: Path, closure: Closure, commands: Sequence[Sequence[str]]) -> tuple[list[Run], int]:
    """`commands` one after the other, each with the link of the closure; and the disk the node takes after."""
    directory.mkdir()
    with ExitStack() as stack:
        stack.callback(remove, directory)
        pids, fetcher, link, daemon = nodes(stack, directory, closure)
        runs = []
        for command, *rest in commands:
            settle(TOUCHED * closure.size)
            watch = Watch(pids)
            done = fetcher.run(command, link, *rest).check()
            runs.append(Run(done.seconds, watch.spent()))
        check(closure, daemon.store)
        home = directory / "fetcher"
        disk = sum(each.lstat().st_blocks * 512 for each in home.rglob("*"))
    return runs, disk


def nodes(stack: ExitStack, directory: Path, closure: Closure) -> tuple[dict[str, int], Daemon, str, NixDaemon]:
    """A provider, and a fetcher beside a nix-daemon: their process ids, the fetcher, the link, the daemon."""
    daemon = stack.enter_context(nix_daemon(directory / "store", closure))
    environ = ["env", f"NIX_CONF_DIR={daemon.store.base}", f"NIX_DAEMON_SOCKET_PATH={daemon.socket}"]
    provider = Daemon(Home(directory / "provider", extra={"nix_store": str(closure.store.root)}))
    fetcher = Daemon(Home(directory / "fetcher", extra={"nix_store": str(daemon.store.root)}), prefix=environ)
    for node in (provider, fetcher):
        stack.enter_context(node)
    link = provider.run("provide", str(TOP)).check().json["link"]
    return {"provider": provider.pid, "fetcher": fetcher.pid, "nix-daemon": daemon_pid(daemon)}, fetcher, link, daemon


def nix_daemon(base: Path, closure: Closure) -> NixDaemon:
    return NixDaemon(ChrootStore(base, f"trusted-public-keys = {closure.key.public_key()}"))


def daemon_pid(daemon: NixDaemon) -> int:
    """Of the process that listens; it has one child for each connection."""
    listening = [each for each in psutil.Process().children() if each.name() == "nix-daemon"]
    (process,) = [each for each in listening if str(daemon.store.root) in each.cmdline()]
    return int(process.pid)


class Watch:
    """Processor seconds that processes and those of their children that end meanwhile use from now on."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        self.began = time.monotonic()

    def spent(self) -> dict[str, float]:
        """Waits for the daemon's child, whose time counts when it has ended."""
        deadline = time.monotonic() + 10
        while psutil.Process(self._pids["nix-daemon"]).children():
            if time.monotonic() > deadline:
                raise SwarmError("the nix-daemon still serves a connection that should be closed")
            time.sleep(0.02)
        return {name: cpu_seconds(pid) - self._before[name] for name, pid in self._pids.items()}


def check(closure: Closure, store: ChrootStore) -> None:
    """Everything is valid there and equal to the original."""
    if store.valid() != set(closure.paths):
        raise SwarmError("not all paths of the closure are valid")
    for path in closure.paths:
        if (found := difference(closure.store.real(path), store.real(path))) is not None:
            raise SwarmError(found)


def profiled(directory: Path, closure: Closure) -> None:
    for kind in ("cpu", "gil"):
        here = directory / kind
        here.mkdir()
        with ExitStack() as stack:
            stack.callback(remove, here)
            pids, fetcher, link, _ = nodes(stack, here, closure)
            settle(TOUCHED * closure.size)
            recorder = profiling.Recorder(stack, {role: pids[role] for role in ("fetcher", "provider")}, kind, here)
            done = fetcher.run("fetch", link, "--into-store").check()
            profiles = recorder.stop()
        say(f"{kind}: {done.seconds:.2f} s while being profiled")
        for role, profile in profiles.items():
            print(f"{profiling.text(role, kind, profile)}\n")


def summary(rounds: Sequence[Round], closure: Closure) -> dict[str, Any]:
    """Medians."""

    def of(run: Callable[[Round], Run]) -> dict[str, Any]:
        runs = [run(each) for each in rounds]
        cpu = {name: round(median(each.cpu[name] for each in runs), 2) for name in runs[0].cpu}
        return {"seconds": round(median(each.seconds for each in runs), 3), "cpu": cpu}

    ways = {"nix copy": of(lambda each: each.nix), "p2pnode": of(lambda each: each.p2pnode)}
    for name in rounds[0].split:
        ways[name] = of(lambda each, name=name: each.split[name])  # type: ignore[misc]
    ratio = median(each.ratio for each in rounds)
    disk = median(each.disk for each in rounds) / closure.size
    ok = ratio <= WALL_LIMIT and disk <= DISK_LIMIT
    return {"ok": ok, "ratio": round(ratio, 3), "disk": round(disk, 4), "bytes": closure.size, "ways": ways}


def text(figures: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{way['seconds']:.2f}", f"{sum(way['cpu'].values()):.2f}", describe(way["cpu"]))
        for name, way in figures["ways"].items()
    ]
    return (
        f"{table(('into a Nix store', 'wall s', 'CPU s', 'of which'), rows)}\n\n"
        f"wall: {figures['ratio']:.2f} x nix copy (limit {WALL_LIMIT:g} x); "
        f"disk of the node: {100 * figures['disk']:.1f} % of the closure (limit {100 * DISK_LIMIT:g} %)"
    )


def describe(cpu: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in cpu.items())


if __name__ == "__main__":
    sys.exit(main())

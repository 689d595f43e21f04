#!/usr/bin/env python3
"""Run a swarm of real nodes on this machine: some provide an image, the others fetch it at the same time.

    scripts/swarm.py                                     five nodes, one provides 64 MiB, four fetch
    scripts/swarm.py --nodes 9 --netns --rate 100mbit    nine hosts of their own with 100 Mbit/s lines (root)
    scripts/swarm.py --nodes 8 --seeds 6 --split --copies 5 --kill 2 --stall 1 --liar 1
    scripts/swarm.py --image /srv/web.img --plot held.png

Every node is a process with a home of its own and knows nothing but the address of node 0, which neither provides
nor fetches. What was fetched is compared with the original. Exit code 0: every fetch completed and was equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmlib.content import difference, parse_rate, parse_size, write_random
from swarmlib.control import ask
from swarmlib.namespaces import Namespaces
from swarmlib.process import FAULTY, LOOPBACK, NODE, Command, Daemon, Home, SwarmError
from swarmlib.report import NodeReport, SwarmReport, lower_bound, plot, summary, text

PORT = 4747
POLL = 0.05
SAMPLE = 0.5  # s; a sample asks every node: more often, and asking would be what is measured
SPARSE_SAMPLE = 2.0  # when nobody needs them
ANNOUNCED_SECONDS = 20.0
STORE_DIR = "/nix/store/"


@dataclass
class Member:
    """A node of the swarm, and what is known about it."""

    daemon: Daemon
    report: NodeReport
    lines: Namespaces | None = None
    fetch: Command | None = None
    out: Path | None = None
    ended: float = 0.0

    @property
    def number(self) -> int:
        return self.report.number

    def measure(self) -> None:
        """Note what the process has used, while it is still there to be asked."""
        if self.daemon.running:
            usage = self.daemon.usage()
            self.report.cpu_seconds, self.report.peak_memory_bytes = usage.cpu_seconds, usage.peak_bytes
            if self.lines is not None:
                self.report.line_sent_bytes = self.lines.sent(self.number)


@dataclass
class Run:
    """One run: its directory, members and clock."""

    options: argparse.Namespace
    directory: Path
    members: list[Member] = field(default_factory=list)
    began: float = 0.0

    def role(self, role: str) -> list[Member]:
        return [member for member in self.members if member.report.role == role]

    def say(self, words: str) -> None:
        if not self.options.quiet:
            print(words, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with contextlib.ExitStack() as stack:
            directory = Path(tempfile.mkdtemp(prefix="p2pnode-swarm-", dir=options.tmp))
            if options.keep:
                print(f"files stay in {directory}", file=sys.stderr)
            else:
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
            run = Run(options, directory)
            stack.callback(end, run)
            report = swarm(run, stack)
        if options.plot is not None:
            plot(report, options.plot)
    except SwarmError as error:
        if options.json:
            print(json.dumps({"ok": False, "error": str(error)}))
        print(f"swarm.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("swarm.py: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(report.to_json()))
        run.say(summary(report))
    else:
        print(text(report))
    return 0 if report.ok else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--nodes", type=int, default=5, metavar="N", help="providers and leechers together (default 5)")
    add("--seeds", type=int, default=1, metavar="K", help="how many of them provide; the others fetch (default 1)")
    add("--image", type=Path, help="a file, directory or store path (default: a generated file)")
    add("--size", type=parse_size, default=parse_size("64M"), help="of the generated file (default 64M)")
    add("--kind", help="image kind, as p2pnode provide --kind takes it")
    add("--nix-store", type=Path, metavar="DIR", help="root of a chroot store that --image is in")
    add("--split", action="store_true", help="each provider holds only a part of the chunks, none holds all")
    add("--copies", type=int, default=1, metavar="C", help="with --split: providers that hold a chunk (default 1)")
    add("--kill", type=int, default=0, metavar="K", help="kill -9 so many providers when the leechers hold half")
    add("--stall", type=int, default=0, metavar="K", help="so many providers stop answering but keep the connection")
    add("--liar", type=int, default=0, metavar="K", help="so many providers send corrupted chunks")
    add("--slow", type=int, default=0, metavar="K", help="so many providers are slow (--slow-rate)")
    add("--slow-rate", type=parse_size, default=parse_size("1M"), metavar="B/S", help="of a slow one (default 1M)")
    add("--seed-rate", type=parse_size, metavar="B/S", help="limit every honest provider to this, without --netns")
    add("--netns", action="store_true", help="one network namespace for each node (root)")
    add("--rate", metavar="RATE", help="with --netns: each node's line, both ways, such as 100mbit")
    add("--fetch-timeout", type=float, default=600.0, metavar="S", help="give up after so long (default 600)")
    add("--json", action="store_true", help="print the report as one JSON object")
    add("--plot", type=Path, metavar="FILE.png", help="draw the chunks held by each node over time")
    add("--tmp", type=Path, help="where the temporary directory is made")
    add("--keep", action="store_true", help="keep the temporary directory, with logs")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(argv)
    faults = options.kill + options.stall + options.liar + options.slow
    if not 1 <= options.seeds < options.nodes:
        parser.error("--seeds must be at least 1 and leave somebody to fetch")
    if faults > options.seeds:
        parser.error("--kill, --stall, --liar and --slow together exceed --seeds")
    if options.rate is not None and not options.netns:
        parser.error("--rate needs --netns")
    if options.split and not 1 <= options.copies < options.seeds:
        parser.error("--split needs at least two seeds, and --copies below --seeds")
    if options.rate is not None:
        try:
            parse_rate(options.rate)
        except ValueError as error:
            parser.error(str(error))
    return options


def swarm(run: Run, stack: contextlib.ExitStack) -> SwarmReport:
    """The run itself. Raises SwarmError if it could not even begin."""
    options = run.options
    original = content(run)
    lines = stack.enter_context(Namespaces(options.rate)) if options.netns else None
    create(run, lines)
    image = split(run, original) if options.split else None
    start(run)
    image = image or provide(run, original)
    report = SwarmReport(
        image["image"], image["kind"], image["bytes"], image["chunks"], [m.report for m in run.members]
    )
    announced(run)
    fetch(run, report)
    watch(run, report)
    collect(run, report, original)
    return report


def content(run: Run) -> Path:
    image = run.options.image
    if image is None:
        path = run.directory / "image.bin"
        write_random(path, run.options.size)
        return path
    if not image.exists():
        raise SwarmError(f"{image} does not exist")
    return Path(image).absolute()


def create(run: Run, lines: Namespaces | None) -> None:
    """Make the members, none started yet."""
    options = run.options
    faults: list[str | None] = (
        ["killed"] * options.kill + ["stalled"] * options.stall + ["liar"] * options.liar + ["slow"] * options.slow
    )
    faults = [*[None] * (options.seeds - len(faults)), *faults]
    for number in range(options.nodes + 1):
        role = "bootstrap" if number == 0 else "provider" if number <= options.seeds else "leecher"
        report = NodeReport(number, role, fault=faults[number - 1] if role == "provider" else None)
        listen, prefix = LOOPBACK, ()
        if lines is not None:
            address, prefix = lines.add(number)
            listen = f"/ip4/{address}/tcp/{PORT}"
        extra = {} if options.nix_store is None else {"nix_store": str(options.nix_store.absolute())}
        home = Home(run.directory / f"node{number}", listen=(listen,), extra=extra)
        run.members.append(Member(Daemon(home, program=program(options, report), prefix=prefix), report, lines))


def program(options: argparse.Namespace, report: NodeReport) -> tuple[str, ...]:
    if report.role != "provider":
        return NODE
    rate = options.slow_rate if report.fault == "slow" else options.seed_rate
    faults = {"stalled": ["--stall"], "liar": ["--lie"]}.get(report.fault or "", [])
    faults += [] if rate is None else ["--rate", str(rate)]
    return (*FAULTY, *faults, "--") if faults else NODE


def split(run: Run, original: Path) -> dict[str, Any]:
    """Import the original once, and give each provider a part of its chunks."""
    from swarmlib.split import give

    source = Daemon(Home(run.directory / "original", mdns=False))
    source.home.write()
    imported = source.run("provide", "--no-serve", *kind(run), str(original)).check().json
    homes = [member.daemon.home.path for member in run.role("provider")]
    give(source.home.path, imported["image"], homes, run.options.copies)
    return imported


def kind(run: Run) -> list[str]:
    return ["--kind", run.options.kind] if run.options.kind else []


def start(run: Run) -> None:
    """Start node 0, then all others at once with its address."""
    first, *others = run.members
    first.daemon.start()
    first.daemon.ready()
    for member in others:
        home = member.daemon.home
        member.daemon.home = Home(home.path, home.listen, first.daemon.addrs[:1], home.mdns, home.extra)
        member.daemon.start()
    for member in others:
        member.daemon.ready()
    for member in run.members:
        member.report.peer_id = member.daemon.peer_id
    run.say(f"{len(run.members)} nodes are up")


def provide(run: Run, original: Path) -> dict[str, Any]:
    commands = [member.daemon.begin("provide", *kind(run), str(original)) for member in run.role("provider")]
    results = [command.wait().check().json for command in commands]
    if len({result["image"] for result in results}) != 1:
        raise SwarmError("the providers made different images of the same content")
    return results[0]


def announced(run: Run) -> None:
    """Wait until node 0 keeps the records of who has the image: a fetch that knows no more than it finds them there."""
    deadline = time.monotonic() + ANNOUNCED_SECONDS
    while time.monotonic() < deadline:
        waiting = [member for member in run.role("provider") if not published(ask(member.daemon.home.path, "status"))]
        if not waiting:
            return
        time.sleep(POLL)


def published(status: list[dict[str, Any]] | None) -> bool:
    """Whether a node has told the network about all that it has."""
    if not status:
        return False
    dht = status[0]["dht"]
    return bool(dht["announced"] and not dht["pending"])


def fetch(run: Run, report: SwarmReport) -> None:
    run.began = time.monotonic()
    for member in run.role("leecher"):
        member.out = run.directory / f"out{member.number}"
        member.fetch = member.daemon.begin("fetch", report.image, "-o", str(member.out))


def watch(run: Run, report: SwarmReport) -> None:
    """Until all fetches ended: note what everybody holds, and kill whom we were told to."""
    victims = [member for member in run.role("provider") if member.report.fault == "killed"]
    deadline = run.began + run.options.fetch_timeout
    interval = SAMPLE if victims or run.options.plot is not None else SPARSE_SAMPLE
    next_sample = run.began
    while running := [member for member in run.role("leecher") if not ended(member)]:
        now = time.monotonic()
        if now > deadline:
            for member in running:
                member.ended = now
                member.report.error = f"did not complete within {run.options.fetch_timeout:.0f} s"
            break
        if now >= next_sample:
            sample(run, report)
            next_sample = max(now, next_sample + interval)
            if victims and halfway(run, report):
                for member in victims:
                    member.measure()
                    member.daemon.kill()
                    run.say(f"killed node {member.number}")
                victims = []
        time.sleep(POLL)
    sample(run, report)
    if victims:
        run.say("the fetches were over before anybody was killed: take a larger image or a slower --seed-rate")


def ended(member: Member) -> bool:
    """Whether the fetch is over; notes when."""
    if not member.ended and (member.fetch is None or member.fetch.poll() is not None):
        member.ended = time.monotonic()
    return bool(member.ended)


def sample(run: Run, report: SwarmReport) -> None:
    for member in run.members:
        if member.report.role == "bootstrap" or not member.daemon.running:
            continue
        images = ask(member.daemon.home.path, "images")
        if images is not None:
            held = next((row["held_chunks"] for row in images if row["image"] == report.image), 0)
            member.report.samples.append((round(time.monotonic() - run.began, 2), held))


def halfway(run: Run, report: SwarmReport) -> bool:
    held = [member.report.samples[-1][1] if member.report.samples else 0 for member in run.role("leecher")]
    return sum(held) * 2 >= report.chunks * len(held)


def collect(run: Run, report: SwarmReport, original: Path) -> None:
    """Read the results, compare what arrived, and measure.

    A fetch's time is its daemon's own; the swarm's is from the first of these beginnings to the last end. Starting a
    Python for each command at the same instant is our doing, and no part of either.
    """
    numbers = {member.report.peer_id: member.number for member in run.members}
    for member in run.members:
        member.measure()
    began: list[float] = []
    for member in run.role("leecher"):
        assert member.fetch is not None
        if member.fetch.poll() is None:
            member.fetch.stop()
            continue
        finished = member.fetch.finished()
        if finished.code:
            error = next(iter(finished.stderr.strip().splitlines()[-1:]), "")
            member.report.error = f"exit code {finished.code}: {error}"
            continue
        result = finished.json
        member.report.seconds = result["seconds"]
        began.append(member.ended - result["seconds"])
        member.report.received_bytes = result["received_bytes"]
        member.report.duplicate_bytes = result["duplicate_bytes"]
        member.report.sources = {str(numbers.get(peer, peer)): size for peer, size in result["from"].items()}
        member.report.banned = [str(numbers.get(peer, peer)) for peer in result["banned"]]
        assert member.out is not None
        member.report.error = compare(run, report.kind, original, member.out)
        member.report.verified = member.report.error is None
    report.seconds = round(max(member.ended for member in run.role("leecher")) - min(began, default=run.began), 3)
    for giver in run.members:
        giver.report.uploaded_bytes = sum(node.sources.get(str(giver.number), 0) for node in report.nodes)
    if run.options.rate is not None:
        report.rate_bytes = parse_rate(run.options.rate)
        report.bound_seconds = lower_bound(
            report.bytes, report.rate_bytes, len(run.role("provider")), len(run.role("leecher"))
        )


def compare(run: Run, kind: str, original: Path, out: Path) -> str | None:
    """The first difference between original and result. Of a closure, each path that arrived with the one here."""
    if kind != "closure":
        return difference(original, out)
    arrived = sorted(path for path in out.iterdir())
    if original.name not in {path.name for path in arrived}:
        return f"{original.name} is missing in {out}"
    return next(filter(None, (difference(original.parent / path.name, path) for path in arrived)), None)


def end(run: Run) -> None:
    """End every process of ours, all at once, by pid."""
    commands = [member.fetch for member in run.members if member.fetch is not None]
    commands += [member.daemon.command for member in run.members if member.daemon.command is not None]
    for command in commands:
        command.signal(signal.SIGTERM)
    deadline = time.monotonic() + 8.0
    for command in commands:
        while command.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        command.kill()


if __name__ == "__main__":
    sys.exit(main())

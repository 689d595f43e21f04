#!/usr/bin/env python3
"""How fast `p2pnode fetch` is, against other ways to move the same file between processes of this machine.

    scripts/bench/transfer.py --install                          install what is compared with, then run everything
    scripts/bench/transfer.py --runs 3 --json figures.json       three rounds, medians
    scripts/bench/transfer.py --only p2pnode,stock --size 256M
    scripts/bench/transfer.py --only p2pnode --link 100mbit      hosts with 100 Mbit/s lines, and pings (root)
    scripts/bench/transfer.py --only p2pnode --profile           where the time goes (py-spy)

contenders
  p2pnode     `p2pnode run` and `provide` at each provider, `p2pnode fetch -o` with a node of its own
  stock       py-libp2p as its authors ship it, its Noise and Yamux: one raw stream, length-prefixed, no hashes
  https       curl from nginx over TLS 1.3 with a certificate made for the run, no hashes
  libtorrent  its defaults, TCP only (uTP, DHT and discovery off), not encrypted; piece hashes checked, SHA-1
  kubo        `ipfs add` at each provider, `ipfs get` from them over Bitswap; no routing, connected directly

What is missing is left out with a line saying so. --install puts libtorrent, kubo-python and py-spy into a venv below
~/.cache/p2pnode-bench, and nginx and curl onto the system with apt-get (root). Stock and https have one provider
always; the others run with every number of --providers.

figures, medians over the rounds; in each round the contenders run in turn, every time with fresh processes
  MB/s            10^6 bytes per second, from the fetcher's first connection to the complete file on disk, verified as
                  far as the contender verifies; as the fetcher itself measured it. Reading the file back and comparing
                  it with the original, which follows for all, is not in it. Nobody is asked to sync the disk
  with start      the same over the wall time of the whole command, which includes loading the program
  CPU s/GiB       user and system seconds per 2^30 bytes. Fetcher: of the whole process less what only loading its
                  program takes (measured once, `its start`), and without that subtraction. Providers: what the
                  transfer added, all of them together
  MiB             peak resident memory (VmHWM): of the fetcher in its life, of the largest provider during the
                  transfer. Pages of mapped files count, which is most of libtorrent's
  least share     bytes of the provider that gave least, as a fraction of an equal share

With --link each node is in a network namespace whose line tc limits both ways, and the p2pnode fetch goes through a
daemon that is connected before; pings run beside it (see transferlib/link.py). With --profile likewise, once for each
kind of profile, with one provider; the transfer is slower under it and its figures are not printed.

Exit code 0: every transfer arrived and was equal to the original.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from swarmlib.content import parse_rate, parse_size, write_random
from swarmlib.namespaces import Namespaces
from swarmlib.process import SwarmError
from transferlib import installation, link, measure, profiling, report
from transferlib.contender import Contender, Place
from transferlib.contenders import CONTENDERS, P2PNode

LOOPBACK = Place("127.0.0.1")
NAMES = tuple(contender.name for contender in CONTENDERS)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    directory: Path | None = None
    try:
        if options.install:
            installation.install(set(options.only), profiler=options.profile is not None)
        if options.profile is not None and (problem := profiling.missing()):
            raise SwarmError(problem)
        with ExitStack() as stack:
            directory = Path(tempfile.mkdtemp(prefix="p2pnode-bench-", dir=options.tmp))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            original = directory / "original" / "image.bin"
            original.parent.mkdir()
            write_random(original, options.size)
            if options.profile is not None:
                profiled(options, directory, original)
                return 0
            rows = rounds(options, directory, original)
    except SwarmError as error:
        print(f"transfer.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("transfer.py: interrupted", file=sys.stderr)
        return 130
    figures = [row.to_json() for row in rows if row.runs]
    print(report.text(figures))
    if options.link is not None:
        print(f"\n{link.text(options.link, figures)}")
    write_json(options, {"rows": figures, "ratios": report.ratios(figures)})
    return 0 if all(len(row.runs) == options.runs for row in rows) else 1


def interrupted(number: int, _: object) -> NoReturn:
    """The first Ctrl-C or SIGTERM ends the run; further ones do not disturb the cleaning up, which takes seconds."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=parse_size, default=parse_size("1G"), help="of the file, random bytes (default 1G)")
    add("--providers", type=numbers, default=[1, 4], metavar="N,...", help="how many provide (default 1,4)")
    add("--runs", type=int, default=1, metavar="N", help="rounds (default 1)")
    add("--only", type=names, default=list(NAMES), metavar="NAME,...", help=f"of {', '.join(NAMES)}")
    add("--install", action="store_true", help="install what is missing first")
    add("--link", metavar="RATE", help="network namespaces with lines of this rate, such as 100mbit (root)")
    add("--profile", nargs="?", const=["cpu", "gil"], type=kinds, metavar="KIND,...", help="of cpu, gil, wall")
    add("--json", type=Path, metavar="FILE", help="write all figures there too, those of each run included")
    add("--tmp", type=Path, help="where the temporary directory is made; takes up to ten times the size with kubo")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.link is not None:
        try:
            parse_rate(options.link)
        except ValueError as error:
            parser.error(str(error))
    if options.profile is not None and options.link is not None:
        parser.error("--profile and --link do not go together")
    return options


def numbers(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if not all(1 <= number <= 64 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r}: from 1 to 64")
    return found


def chosen(text: str, known: Sequence[str]) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return found


def names(text: str) -> list[str]:
    return chosen(text, NAMES)


def kinds(text: str) -> list[str]:
    return chosen(text, tuple(profiling.KINDS))


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def rounds(options: argparse.Namespace, directory: Path, original: Path) -> list[report.Row]:
    """Every contender with every number of providers it takes, `--runs` times in turn."""
    pairs: list[tuple[Contender, report.Row]] = []
    for kind in CONTENDERS:
        if kind.name not in options.only:
            continue
        contender = P2PNode(daemon=options.link is not None) if kind is P2PNode else kind()
        if (problem := contender.missing()) is not None:
            say(f"{contender.name} is left out: {problem} here; --install would install it")
            continue
        for count in sorted({min(count, contender.most_providers) for count in options.providers}):
            daemon = contender.name == "p2pnode" and options.link is not None
            pairs.append((contender, report.Row(contender.name, contender.title, count, daemon)))
    for number in range(options.runs):
        for contender, row in pairs:
            what = f"round {number + 1}: {contender.name}, {row.providers} provider{'s' * (row.providers > 1)}"
            try:
                one(options, directory / f"{contender.name}-{row.providers}", original, contender, row)
            except SwarmError as error:
                say(f"{what}: failed: {error}")
            else:
                run = row.runs[-1]
                say(f"{what}: {run.size / report.MB / run.seconds:.1f} MB/s, {run.seconds:.2f} s")
    for contender in {row.name: contender for contender, row in pairs if row.runs}.values():
        cost = measure.startup_cpu(contender.startup(), directory / f"{contender.name}-startup")
        for _, row in pairs:
            if row.name == contender.name:
                row.startup_cpu = cost
    return [row for _, row in pairs]


def one(options: argparse.Namespace, directory: Path, original: Path, contender: Contender, row: report.Row) -> None:
    """One measured transfer, added to `row`. Raises SwarmError."""
    with ExitStack() as stack:
        directory.mkdir()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        fetcher, *places = hosts(stack, options.link, 1 + row.providers + (options.link is not None))
        pinger = places.pop() if options.link is not None else LOOPBACK
        ready = contender.provide(stack, directory, original, places, fetcher)
        settle()
        if options.link is None:
            row.runs.append(measure.fetch(ready, directory / "out", original))
        else:
            with link.Beside(parse_rate(options.link), ready, places, pinger, directory) as beside:
                run = measure.fetch(ready, directory / "out", original)
                row.extra.append(beside.figures(run))
            row.runs.append(run)


def hosts(stack: ExitStack, rate: str | None, count: int) -> list[Place]:
    if rate is None:
        return [LOOPBACK] * count
    lines = stack.enter_context(Namespaces(rate))
    return [Place(*lines.add(number)) for number in range(count)]


def settle() -> None:
    """Nothing of what was written before shall reach the disk while the transfer runs."""
    os.sync()


def profiled(options: argparse.Namespace, directory: Path, original: Path) -> None:
    """A transfer with one provider for each kind of profile; prints them."""
    found: list[dict[str, Any]] = []
    for kind in options.profile:
        here = directory / kind
        here.mkdir()
        with ExitStack() as stack:
            ready = P2PNode(daemon=True).provide(stack, here, original, [LOOPBACK], LOOPBACK)
            assert ready.daemon is not None
            settle()
            pids = {"fetcher": ready.daemon, "provider": ready.providers[0]}
            recorder = profiling.Recorder(stack, pids, kind, here)
            run = measure.fetch(ready, here / "out", original)
            profiles = recorder.stop()
        say(f"{kind}: {run.size / report.MB / run.seconds:.1f} MB/s while being profiled")
        for role, profile in profiles.items():
            print(f"{profiling.text(role, kind, profile)}\n")
            found.append({"role": role, "kind": kind, "seconds": run.seconds, **profile.to_json()})
        shutil.rmtree(here, ignore_errors=True)
    write_json(options, {"profiles": found})


def write_json(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    if options.json is None:
        return
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    settings = {"size": options.size, "runs": options.runs, "link": options.link}
    options.json.write_text(json.dumps({"machine": machine, "settings": settings, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

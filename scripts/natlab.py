#!/usr/bin/env python3
"""Two real nodes behind NATs of your choice, and how they get an image across. Needs root, iproute2 and nftables.

    scripts/natlab.py                                                 both port restricted, ten tries
    scripts/natlab.py --left port-restricted --right symmetric --size 64M --tries 3
    scripts/natlab.py --left symmetric --right symmetric --relay-rate 50mbit
    scripts/natlab.py --left symmetric --right symmetric --relay-set relay_circuit_seconds=2
    scripts/natlab.py --left double --right none --refuse --delay 0.02

Each try has two new nodes on new hosts behind new NATs, which know nothing but the public relay: the left one provides,
the right one fetches. Exit code 0: every fetch completed and was equal to the original.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from swarmlib.content import difference, parse_rate, parse_size, write_random
from swarmlib.crossing import RESERVED_SECONDS, Crossing, Node, Site, until, watch
from swarmlib.lab import Lab, Nat, Router
from swarmlib.process import SwarmError

NONE, DOUBLE = "none", "double"
KINDS = [NONE, *(kind.value for kind in Nat), DOUBLE]
MOVE_SECONDS = 15.0  # a small image may be over before the connection has moved: that is waited for


@dataclass(frozen=True, slots=True)
class Try:
    """One try. Bytes of the relay are those its interface received, headers included; rates are of payload."""

    number: int
    error: str | None = None
    path: str | None = None  # at the end: direct or relayed
    direct_after: float | None = None  # s from the beginning of the fetch
    punched: bool = False  # connected directly within MOVE_SECONDS, if not before the end
    reserved_seconds: float | None = None  # until the provider was reachable through the relay
    seconds: float | None = None
    bytes_per_second: float | None = None
    relayed_bytes: int | None = None  # by the fetcher's own account
    relay_received: int | None = None
    relay_received_after_move: int | None = None
    duplicate_bytes: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        with ExitStack() as stack:
            directory = Path(tempfile.mkdtemp(prefix="p2pnode-nat-"))
            if options.keep:
                print(f"files stay in {directory}", file=sys.stderr)
            else:
                stack.callback(remove, directory)
            tries = run(options, directory, stack.enter_context(Lab()))
    except SwarmError as error:
        print(f"natlab.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("natlab.py: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps({"left": options.left, "right": options.right, "tries": [asdict(each) for each in tries]}))
    else:
        print(summary(options, tries))
    return 1 if any(each.error for each in tries) else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--left", choices=KINDS, default="port-restricted", help="NAT of the provider (default port-restricted)")
    add("--right", choices=KINDS, default="port-restricted", help="NAT of the fetcher (default port-restricted)")
    add("--refuse", action="store_true", help="the NATs answer strangers with RST instead of silence")
    add("--delay", type=float, default=0.0, metavar="S", help="of each NAT's line, each way")
    add("--size", type=parse_size, default=parse_size("64M"), help="of the image (default 64M)")
    add("--rate", metavar="RATE", default="100mbit", help="of each node's line (default 100mbit)")
    add("--relay-rate", metavar="RATE", default="100mbit", help="of the relay's line (default 100mbit)")
    add("--relay-set", metavar="KEY=N", action="append", default=[], help="into the relay's config.toml, repeatable")
    add("--tries", type=int, default=10, metavar="N", help="(default 10)")
    add("--timeout", type=float, default=300.0, metavar="S", help="give up a fetch after so long (default 300)")
    add("--json", action="store_true", help="print one JSON object")
    add("--keep", action="store_true", help="keep the temporary directory, with logs")
    options = parser.parse_args(argv)
    settings = [text.partition("=") for text in options.relay_set]
    if not all(key and number.isdecimal() for key, _, number in settings):
        parser.error("--relay-set takes KEY=N, such as relay_circuit_seconds=2")
    options.relay_set = {key: int(number) for key, _, number in settings}
    for rate in (options.rate, options.relay_rate):
        try:
            parse_rate(rate)
        except ValueError as error:
            parser.error(str(error))
    return options


def run(options: argparse.Namespace, directory: Path, lab: Lab) -> list[Try]:
    original = directory / "image.bin"
    write_random(original, options.size)
    with Site(lab, directory) as public:
        relay = public.node("relay", relay=True, rate=options.relay_rate, **options.relay_set)
        tries = []
        for number in range(1, options.tries + 1):
            with Site(lab, directory / f"try{number}") as site:
                try:
                    provider, fetcher = (
                        site.node(side, router(lab, options, side), via=[relay], rate=options.rate)
                        for side in ("left", "right")
                    )
                    tries.append(attempt(options, number, site, relay, provider, fetcher, original))
                except SwarmError as error:
                    tries.append(Try(number, error=str(error)))
            if not options.json:
                print(line(tries[-1]), flush=True)
    return tries


def router(lab: Lab, options: argparse.Namespace, side: str) -> Router | None:
    """The NAT of a side: of two, the inner one."""
    kind = getattr(options, side)
    if kind == NONE:
        return None
    outer = lab.nat(
        f"{side}-nat", Nat.PORT_RESTRICTED if kind == DOUBLE else Nat(kind), refuse=options.refuse, delay=options.delay
    )
    return (
        lab.nat(f"{side}-inner", Nat.PORT_RESTRICTED, behind=outer, refuse=options.refuse) if kind == DOUBLE else outer
    )


def attempt(
    options: argparse.Namespace, number: int, site: Site, relay: Node, provider: Node, fetcher: Node, original: Path
) -> Try:
    """Provide on one side, fetch on the other. Raises SwarmError."""
    reserved = None
    if options.left != NONE:
        reserved = until(provider.reserved, RESERVED_SECONDS, "the provider has a reservation on the relay")
    image = provider.daemon.run("provide", str(original)).check().json
    out = site.directory / "out"
    fetch = site.begin(fetcher, "fetch", image["link"], "-o", str(out))
    crossing = watch(fetch, fetcher, provider, image["image"], [relay.host], seconds=options.timeout)
    error = difference(original, out) if not crossing.finished.code else crossing.finished.stderr.strip()[-500:]
    if error is not None:
        return Try(number, error=error, reserved_seconds=reserved)
    return finished(number, crossing, reserved, moved(fetcher, provider))


def moved(fetcher: Node, provider: Node) -> bool:
    try:
        until(lambda: "direct" in fetcher.paths(provider.peer_id), MOVE_SECONDS, "moved")
    except SwarmError:
        return False
    return True


def finished(number: int, crossing: Crossing, reserved: float | None, punched: bool) -> Try:
    return Try(
        number,
        path=crossing.path,
        direct_after=crossing.direct_after,
        punched=punched,
        reserved_seconds=reserved,
        seconds=crossing.result["seconds"],
        bytes_per_second=crossing.rate,
        relayed_bytes=crossing.result["relayed_bytes"],
        relay_received=crossing.relayed(),
        relay_received_after_move=crossing.relayed_after_move,
        duplicate_bytes=crossing.result["duplicate_bytes"],
    )


def line(each: Try) -> str:
    if each.error is not None:
        return f"{each.number:3}  failed: {each.error}"
    assert each.bytes_per_second is not None and each.relay_received is not None
    moved = "never moved" if each.direct_after is None else f"direct after {each.direct_after:.2f} s"
    if each.direct_after is None and each.punched:
        moved = "direct from the start or after the end"
    still = each.relay_received_after_move
    after = "" if still is None else f", then {still / 1e3:.0f} kB"
    return (
        f"{each.number:3}  {each.path:8} {moved}; {each.seconds:.1f} s, {each.bytes_per_second / 1e6:.1f} MB/s; "
        f"relay received {each.relay_received / 1e6:.1f} MB{after}; relayed {each.relayed_bytes} B, "
        f"twice {each.duplicate_bytes} B"
    )


def summary(options: argparse.Namespace, tries: Sequence[Try]) -> str:
    good = [each for each in tries if each.error is None]
    rates = sorted(each.bytes_per_second for each in good if each.bytes_per_second is not None)
    middle = rates[len(rates) // 2] if rates else 0.0
    direct = sum(each.punched for each in good)
    return (
        f"{options.left} to {options.right}: {len(good)} of {len(tries)} completed, {direct} direct; "
        f"median {middle / 1e6:.1f} MB/s, {middle / parse_rate(options.relay_rate):.0%} of the relay's line"
    )


def remove(directory: Path) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

"""`--link`: every node in a network namespace with a line of a limited rate, and pings beside the transfer.

What is pinged, and how:
  fetcher, provider   /ipfs/ping/1.0.0 by a stock py-libp2p process on a line of its own, to the fetcher (its ping
                      shares the queue of the fetcher's downlink) and to the first provider (its answer shares the
                      queue of the provider's uplink); one at a time, with a pause of PING_SECONDS
  connection          the round-trip time the fetcher itself knows of its connections to the providers, as
                      `p2pnode --json peers` tells it: Yamux pings in the very connections that carry the blocks. The
                      node pings every 10 s and keeps a running mean: few and smooth samples
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from swarmlib.content import parse_rate
from swarmlib.control import ask
from swarmlib.process import Command, SwarmError

from transferlib.contender import Place, Ready, started
from transferlib.measure import Fetched
from transferlib.report import table

PING_SECONDS = 0.05
POLL_SECONDS = 0.25
IDLE_SECONDS = 5.0  # of pings before the transfer begins
STOCK = (sys.executable, str(Path(__file__).parent / "peers" / "stock.py"))

# tbf counts whole Ethernet frames without preamble and check sum, of segments that were merged each one. A full frame
# of 14 + 1500 bytes has 20 of IPv4, 20 of TCP and 12 of its time stamps.
FRAME = 14 + 1500
CEILING = (1500 - 20 - 20 - 12) / FRAME


@dataclass(frozen=True, slots=True)
class Sample:
    target: str
    at: float  # CLOCK_MONOTONIC
    seconds: float


@dataclass
class Beside:
    """Watches the lines and pings from construction on; `figures` after the fetch tells what it saw. A context
    manager, for its processes and its thread."""

    rate: float  # bytes per second
    ready: Ready
    places: Sequence[Place]
    pinger: Place
    directory: Path
    _stack: ExitStack = field(default_factory=ExitStack)
    _polled: list[Sample] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _ping: Command | None = None
    _wire: int = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.ready.home is not None:
                targets = [str(addr) for addr in self.ready.addrs[:2]]
                log = self.directory / "pinger"
                self._ping = started(stack, [*STOCK, "ping", str(PING_SECONDS), *targets], log, self.pinger)
                thread = threading.Thread(target=self._poll, args=(self.ready.home,))
                thread.start()
                stack.callback(thread.join)
                stack.callback(self._stop.set)
                self._idle(self._ping)
            self._wire = wire_bytes(self.places)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _idle(self, ping: Command) -> None:
        """Wait until both answered, and then for as long as the idle samples take."""
        deadline = time.monotonic() + 30.0
        while len({sample.target for sample in pings(ping)}) < 2:
            if ping.poll() is not None or time.monotonic() > deadline:
                raise SwarmError(f"the pinger got no answers: {ping.stderr.strip()[-1000:]}")
            time.sleep(0.05)
        time.sleep(IDLE_SECONDS)

    def _poll(self, home: Path) -> None:
        known: dict[str, float] = {}
        while not self._stop.wait(POLL_SECONDS):
            for row in ask(home, "peers") or []:
                if row["rtt"] is not None and known.get(row["peer"]) != row["rtt"]:
                    known[row["peer"]] = row["rtt"]
                    self._polled.append(Sample("connection", time.monotonic(), row["rtt"]))

    def figures(self, fetched: Fetched) -> dict[str, Any]:
        """Shares of the line rate, and the added latency in ms of each target that has samples."""
        wire = wire_bytes(self.places) - self._wire
        found: dict[str, Any] = {
            "payload_of_rate": fetched.size / fetched.seconds / self.rate,
            "payload_of_ceiling": fetched.size / fetched.seconds / self.rate / CEILING,
            "wire_of_rate": wire / fetched.seconds / self.rate,
            "wire_per_payload": wire / fetched.size,
        }
        samples = [*(pings(self._ping) if self._ping is not None else []), *self._polled]
        for target in ("fetcher", "provider", "connection"):
            mine = [sample for sample in samples if sample.target == target]
            idle = [1e3 * s.seconds for s in mine if s.at < fetched.began - (fetched.process_seconds - fetched.seconds)]
            busy = [1e3 * s.seconds for s in mine if fetched.began <= s.at <= fetched.ended]
            if idle and busy:
                found |= {
                    f"{target}_idle_ms": quantile(idle, 0.5),
                    f"{target}_added_median_ms": quantile(busy, 0.5) - quantile(idle, 0.5),
                    f"{target}_added_p99_ms": quantile(busy, 0.99) - quantile(idle, 0.5),
                    f"{target}_samples": len(busy),
                }
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def pings(command: Command) -> list[Sample]:
    rows = [json.loads(line) for line in command.stdout.rpartition("\n")[0].splitlines()]
    return [Sample(("fetcher", "provider")[row["peer"]], row["at"], row["seconds"]) for row in rows]


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least the fraction `q` of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-q * len(ordered) // 1) - 1)]


def wire_bytes(places: Sequence[Place]) -> int:
    """What left the hosts at `places` by now, as their tbf counted it: frames with all their headers."""
    total = 0
    for place in places:
        command = [*place.prefix, "tc", "-s", "-j", "qdisc", "show", "dev", "eth0"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise SwarmError(f"{' '.join(command)}: {done.stderr.strip()}")
        total += sum(int(qdisc["bytes"]) for qdisc in json.loads(done.stdout) if qdisc.get("root"))
    return total


def text(rate: str, rows: Sequence[dict[str, Any]]) -> str:
    """Tables of the rows' `extra`."""
    head = ("contender", "providers", "payload of rate", "payload of ceiling", "on the wire of rate", "wire / payload")
    body = [
        (
            row["name"],
            str(row["providers"]),
            *(f"{100 * row['extra'][key]:.1f} %" for key in ("payload_of_rate", "payload_of_ceiling", "wire_of_rate")),
            f"{row['extra']['wire_per_payload']:.4f}",
        )
        for row in rows
        if row["extra"]
    ]
    notes = (
        f"The rate is tc's, {rate} ({parse_rate(rate) / 1e6:.2f} MB/s) both ways for every node, and bounds Ethernet "
        f"frames with their headers; after Ethernet, IPv4 and TCP\nheaders {100 * CEILING:.2f} % of it are left as the "
        "ceiling of payload. What Noise, the muxer and the exchange add comes out of that. With\nseveral providers the "
        "fetcher's own line is the bound. On the wire: frames that left the providers, retransmissions included."
    )
    parts = [table(head, body), notes]
    waits = [
        (
            row["name"],
            str(row["providers"]),
            target,
            *(f"{row['extra'][f'{target}_{key}_ms']:.1f}" for key in ("idle", "added_median", "added_p99")),
            str(int(row["extra"][f"{target}_samples"])),
        )
        for row in rows
        for target in ("fetcher", "provider", "connection")
        if f"{target}_idle_ms" in row["extra"]
    ]
    if waits:
        columns = ("ping beside", "providers", "to", "idle ms", "added ms, median", "added ms, p99", "samples")
        parts.append(table(columns, waits))
    return "\n\n".join(parts)

"""Nodes of a lab, and fetches across its NATs that are watched: for scripts/natlab.py and tests/nat."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmlib.control import ask
from swarmlib.lab import Host, Lab, Router
from swarmlib.netns import Counters
from swarmlib.process import Command, Daemon, Finished, Home, SwarmError

PORT = 4747
POLL = 0.1
RESERVED_SECONDS = 40.0  # finding out that one is private takes a few dial-backs that time out
SETTLE = 2.0  # after the first chunk that came directly, chunks asked for before may still come through the relay
CIRCUIT = "/p2p-circuit"


@dataclass(slots=True)
class Node:
    """A daemon on a host of the lab."""

    host: Host
    daemon: Daemon

    @property
    def peer_id(self) -> str:
        return self.daemon.peer_id

    def status(self) -> dict[str, Any]:
        """What it says of itself. Raises SwarmError if it does not answer."""
        return self._ask("status")[0]

    def peers(self) -> list[dict[str, Any]]:
        """Its connections."""
        return self._ask("peers")

    def held(self, image: str) -> int:
        """Chunks of an image that it has."""
        return next((row["held_chunks"] for row in self._ask("images") if row["image"] == image), 0)

    def paths(self, peer: str) -> set[str]:
        """How it is connected to a peer at present: of "direct" and "relayed", what applies."""
        rows = [row for row in self.peers() if row["peer"] == peer]
        return {"relayed" if CIRCUIT in row["addr"] else "direct" for row in rows}

    def reserved(self) -> bool:
        """Whether others can reach it through a relay."""
        return any(CIRCUIT in addr for addr in self.status()["addrs"])

    def _ask(self, operation: str) -> list[dict[str, Any]]:
        answer = ask(self.daemon.home.path, operation)
        if answer is None:
            raise SwarmError(f"the node on {self.daemon.home.path} does not answer: {self.daemon.log[-2000:]}")
        return answer


@dataclass(slots=True)
class Site:
    """Makes nodes on hosts of a lab, each with a home below `directory`. Ends them with `close`, or as a context."""

    lab: Lab
    directory: Path
    _stack: ExitStack = field(default_factory=ExitStack)
    _labels: int = 0

    def node(
        self,
        label: str,
        behind: Router | None = None,
        *,
        via: Sequence[Node] = (),
        host: Host | None = None,
        rate: str | None = None,
        relay: bool = False,
        mdns: bool = False,
        environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Node:
        """A running node that knows nothing but the first address of each of `via`.

        On a host of its own behind a NAT or on the public segment, unless one is given. `environ`: what its machine
        has set beside what is set here; `settings` go into its config.toml.
        """
        self._labels += 1
        if host is None:
            host = self.lab.host(label, behind, rate=rate)
        home = Home(
            self.directory / f"{label}{self._labels}",
            listen=(f"/ip4/0.0.0.0/tcp/{PORT}",),
            bootstrap=[other.daemon.addrs[0] for other in via],
            mdns=mdns,
            extra={"log_level": "info", **settings},
        )
        prefix = [*host.prefix, "env", *(f"{name}={value}" for name, value in (environ or {}).items())]
        daemon = Daemon(home, prefix=prefix, options=["--relay"] if relay else [])
        self._stack.callback(daemon.kill)
        daemon.start()
        daemon.ready()
        return Node(host, daemon)

    def begin(self, node: Node, *args: str) -> Command:
        """Start a command on a node's home; it is ended with the site."""
        command = node.daemon.begin(*args)
        self._stack.callback(command.kill)
        return command

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def until(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Wait for something that processes do, and return how long it took. Raises SwarmError naming `what`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise SwarmError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(POLL)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float  # since the fetch began
    chunks: int  # that the fetcher held
    relays: tuple[Counters, ...]
    paths: frozenset[str]  # how it was connected to the provider


@dataclass(frozen=True, slots=True)
class Crossing:
    """A fetch that ended, with what was seen meanwhile."""

    finished: Finished
    samples: list[Sample]
    provider: str

    @property
    def result(self) -> dict[str, Any]:
        return self.finished.check().json

    @property
    def path(self) -> str:
        """ "direct" or "relayed": how the fetcher was connected to the provider at the end, in its own words."""
        return str(self.result["connections"][self.provider]["path"])

    @property
    def direct_after(self) -> float | None:
        """Seconds from the beginning of the fetch to the move, in its own words; None if it did not move."""
        after = self.result["connections"][self.provider]["direct_after"]
        return None if after is None else float(after)

    def relayed(self, since: float = 0.0) -> int:
        """Bytes, headers included, that all relays received from `since` on: image data is counted once."""
        first = next((sample for sample in self.samples if sample.seconds >= since), self.samples[-1])
        return sum(
            now.received - then.received for now, then in zip(self.samples[-1].relays, first.relays, strict=True)
        )

    @property
    def relayed_after_move(self) -> int | None:
        """What relays received after the move had settled; None if there was none, or too late to tell."""
        if self.direct_after is None or self.direct_after + SETTLE > self.samples[-1].seconds:
            return None
        return self.relayed(self.direct_after + SETTLE)

    @property
    def rate(self) -> float:
        """Payload bytes per second."""
        return float(self.result["bytes"] / self.result["seconds"])

    @property
    def longest_pause(self) -> float:
        """The longest time between two arrivals of chunks, in seconds."""
        arrivals = [0.0]
        chunks = 0
        for sample in self.samples:
            if sample.chunks > chunks:
                arrivals.append(sample.seconds)
                chunks = sample.chunks
        return max(later - earlier for earlier, later in itertools.pairwise(arrivals))


def watch(
    fetch: Command,
    fetcher: Node,
    provider: Node,
    image: str,
    relays: Sequence[Host],
    *,
    seconds: float,
    at: Callable[[Sample], None] = lambda _: None,
) -> Crossing:
    """Sample until a fetch ends; `at` is called with each sample.

    Raises SwarmError if it takes longer than `seconds`.
    """
    began = time.monotonic()
    samples: list[Sample] = []
    while True:
        ended = fetch.poll() is not None
        now = time.monotonic() - began
        counters = tuple(relay.counters() for relay in relays)
        sample = Sample(now, fetcher.held(image), counters, frozenset(fetcher.paths(provider.peer_id)))
        samples.append(sample)
        if ended:
            return Crossing(fetch.finished(), samples, provider.peer_id)
        if now > seconds:
            fetch.kill()
            raise SwarmError(
                f"the fetch did not end within {seconds:.0f} s, at {sample.chunks} chunks: {fetch.stderr[-1000:]}\n"
                f"the fetcher: {fetcher.daemon.log[-3000:]}"
            )
        at(sample)
        time.sleep(POLL)

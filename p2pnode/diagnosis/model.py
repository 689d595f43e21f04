"""What an examination finds: steps with marks and times, and the causes that follow from them.

The values of the enums are the stable codes of `doctor --json`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from p2pnode.errors import EXIT_NETWORK


class Mark(enum.Enum):
    OK = "ok"
    WARN = "warn"  # worth knowing; alone it keeps nothing from working
    FAIL = "FAIL"


class Kind(enum.Enum):
    """What a step looked at. The facts that `causes` goes by stand behind each."""

    LISTEN = "listen"
    OBSERVED = "observed"  # nat: bool
    DIAL_BACK = "dial-back"  # outcome, ip, port, named (in the configuration or by a gateway): bool, nat: bool
    REACHABILITY = "reachability"  # state
    UPNP = "upnp"
    RELAY = "relay"  # held: bool, status: int or None
    RELAYS = "relays"  # held: int, needed: bool
    CONNECTIONS = "connections"  # peers: int
    BOOTSTRAP = "bootstrap"  # outcome
    DHT = "dht"  # peers: int
    DHT_LOOKUP = "dht-lookup"  # asked: int, answered: int
    CLOCK = "clock"  # offset: seconds or None, peers: int
    DISK = "disk"  # free: bytes

    ADDRESSES = "peer-addresses"  # known: int
    PEER_LOOKUP = "peer-lookup"  # found: int, named_by: int
    PEER_DIAL = "peer-dial"  # outcome, addr, answered (peer), elsewhere: bool
    PEER_RELAY = "peer-relay"  # outcome, relay, status
    PEER_CONNECT = "peer-connect"  # path: direct, relayed or None
    PEER_PROTOCOLS = "peer-protocols"  # exchange: list, ours
    PEER_PUNCH = "peer-punch"
    PEER_CLOCK = "peer-clock"  # offset: seconds
    PEER_RTT = "peer-rtt"
    PEER_BAN = "peer-ban"  # seconds

    IMAGE_HERE = "image-here"  # complete: bool
    PROVIDERS = "providers"  # found: int, link: int
    PROVIDER = "provider"  # recorded: bool, named_by: int
    AVAILABILITY = "availability"  # held, chunks: int; known: bool
    COVERAGE = "coverage"  # chunks, reachable: int


class Code(enum.Enum):
    """Causes."""

    WRONG_PORT_FORWARDED = "wrong-port-forwarded"
    FIREWALL_DROPPING = "firewall-dropping"
    FIREWALL_REFUSING = "firewall-refusing"
    BEHIND_NAT = "behind-nat"
    NO_RELAY = "no-relay"
    RELAY_FULL = "relay-full"
    RELAY_UNREACHABLE = "relay-unreachable"
    BOOTSTRAP_UNREACHABLE = "bootstrap-unreachable"
    NO_PEERS = "no-peers"
    CLOCK_SKEW = "clock-skew"
    DISK_FULL = "disk-full"

    PEER_GONE = "peer-gone"
    PEER_UNKNOWN = "peer-unknown"
    PEER_UNREACHABLE = "peer-unreachable"  # for none of the other reasons
    WRONG_PEER = "another-peer-answers"
    PROTOCOL_MISMATCH = "protocol-mismatch"
    RELAYED_ONLY = "relayed-only"
    PEER_BANNED = "peer-banned"

    NO_PROVIDERS = "no-providers"
    STALE_RECORD = "provider-record-stale"
    PROVIDERS_SILENT = "providers-silent"
    INCOMPLETE = "incomplete-in-swarm"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was looked at. `seconds` is how long it took, `peer` whom it is about (None: this node)."""

    kind: Kind
    mark: Mark
    text: str
    seconds: float | None = None
    peer: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        milliseconds = None if self.seconds is None else round(1000 * self.seconds, 1)
        return {
            "step": self.kind.value,
            "mark": self.mark.value,
            "ms": milliseconds,
            "text": self.text,
            "peer": self.peer,
            "facts": dict(self.facts),
        }


@dataclass(frozen=True, slots=True)
class Cause:
    """A likely cause, and what to do. One that is no `problem` explains, but keeps nothing from working."""

    code: Code
    text: str
    advice: str
    problem: bool = True
    exit_code: int = EXIT_NETWORK
    peer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code.value,
            "problem": self.problem,
            "text": self.text,
            "advice": self.advice,
            "peer": self.peer,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """`target` is what was asked about: "self", or a peer id or image id."""

    target: str
    steps: tuple[Step, ...]
    causes: tuple[Cause, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 without a problem, else that of the likeliest one."""
        return next((cause.exit_code for cause in self.causes if cause.problem), 0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "ok": self.exit_code == 0,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 3),
            "steps": [step.to_dict() for step in self.steps],
            "causes": [cause.to_dict() for cause in self.causes],
        }

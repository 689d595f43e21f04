"""A small internet of network namespaces: public hosts, NAT routers of every kind, private hosts behind them.

    with Lab() as lab:
        relay = lab.host("relay", rate="100mbit")                # on the public segment, a global address
        left = lab.nat("left", Nat.PORT_RESTRICTED)
        right = lab.nat("right", Nat.SYMMETRIC, refuse=True)     # answers strangers with RST instead of silence
        a, b = lab.host("a", left), lab.host("b", left)          # two behind one NAT: neighbours on a LAN
        inner = lab.nat("inner", Nat.FULL_CONE, behind=right)    # double NAT
        c = lab.host("c", inner, delay=0.02)                     # 20 ms more each way

        Daemon(Home(tmp / "a", listen=("/ip4/0.0.0.0/tcp/4747",)), prefix=a.prefix)   # swarmlib.process
        a.run("ping", "-c1", relay.address)                      # a command to its end
        sock = c.socket(socket.SOCK_STREAM)                      # a socket of this process that lives in c
        before = relay.counters(); ...; (relay.counters() - before).sent
        a.cut(); a.mend()                                        # packets vanish silently, and pass again
        a.unplug(); a.mend()                                     # the interface itself sees its carrier go
        a.readdress()                                            # another address on the same segment
        left.forward(4747, a); left.reboot()                     # port forwarding; all mappings forgotten
        left.block(right); left.block()                          # no way between the two, and again one

Nothing of the machine's own network is touched and there is no way out: "public" addresses are 11.77.0.0/16, which the
`ipaddress` module and the code under test hold for global, as they do not the ranges reserved for documentation.
Leaving the context ends every process in the namespaces and removes them; so does the next Lab for one that was
killed. Needs root, iproute2 and nftables: `available()` says what is missing.

NAT kinds in the terms of RFC 4787 and RFC 5382, all with Linux's conntrack, which keeps the port where it can:

    full cone         mapping and filtering endpoint independent: what left through a port is reachable there by all
    port restricted   mapping endpoint independent, filtering address and port dependent
    symmetric         mapping and filtering address and port dependent, a random port for each destination

On a LAN, the first of two hosts to use a port of a full cone is its owner. Of a port restricted NAT two hosts get the
same port as long as they talk to different destinations, and else the second gets another one: like home routers.
"""

from __future__ import annotations

import enum
import ipaddress
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from swarmlib.netns import Counters, Netns, connect, missing_tools, refusal, sweep
from swarmlib.process import SwarmError, die_with_parent

PUBLIC = ipaddress.IPv4Network("11.77.0.0/16")
_WIRE = Path(__file__).with_name("wire.py")
_TOOLS = ("ip", "tc", "nft")


class Nat(enum.Enum):
    FULL_CONE = "full-cone"
    PORT_RESTRICTED = "port-restricted"
    SYMMETRIC = "symmetric"


@dataclass(frozen=True, slots=True)
class _Segment:
    """An Ethernet: a bridge, the network on it and the addresses not yet given away."""

    netns: Netns
    bridge: str
    network: ipaddress.IPv4Network
    free: Iterator[ipaddress.IPv4Address]
    gateway: str | None = None  # none on the public segment: nothing lies beyond


class _Station:
    """What hangs on a segment by one cable: a host, or a router by its outer side."""

    def __init__(self, lab: Lab, label: str, segment: _Segment, device: str, rate: str | None, delay: float) -> None:
        self.label = label
        self.netns = lab.own(label)
        self._segment, self._device = segment, device
        self._port = f"p{lab.next_port()}"  # the other end of the cable, on the segment's bridge
        if delay:
            lab.wire(self.netns, device, segment.netns, self._port, delay)
        else:
            connect(self.netns, device, segment.netns, self._port)
        self.address = str(next(segment.free))
        segment.netns.ip("link", "set", self._port, "master", segment.bridge, "up")
        self.netns.ip("link", "set", device, "up")
        self._configure()
        if rate is not None:
            self.limit(rate)

    def _configure(self) -> None:
        self.netns.ip("address", "add", f"{self.address}/{self._segment.network.prefixlen}", "dev", self._device)
        if self._segment.gateway is not None:
            self.netns.ip("route", "replace", "default", "via", self._segment.gateway)

    def limit(self, rate: str) -> None:
        """Give the line a rate, both ways."""
        self.netns.shape(self._device, rate)
        self._segment.netns.shape(self._port, rate)

    def counters(self) -> Counters:
        """What passed the outer interface so far."""
        return self.netns.counters(self._device)

    def cut(self) -> None:
        """Everything sent and received vanishes, and nobody is told."""
        self._segment.netns.ip("link", "set", self._port, "nomaster")

    def unplug(self) -> None:
        """The cable is out: the interface has no carrier."""
        self._segment.netns.ip("link", "set", self._port, "down")

    def mend(self) -> None:
        """Undo `cut` and `unplug`."""
        self._segment.netns.ip("link", "set", self._port, "master", self._segment.bridge, "up")

    def readdress(self) -> str:
        """Change to another address of the segment, as a new lease would; returns it."""
        self.netns.ip("address", "flush", "dev", self._device, "scope", "global")
        self.address = str(next(self._segment.free))
        self._configure()
        return self.address


class Host(_Station):
    """A machine with one interface, `eth0`. `address` is what it has there."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What stands before a command that shall run here."""
        return self.netns.prefix

    def run(self, *command: str, timeout: float = 30.0) -> str:
        """Run a command here to its end; its output. Raises SwarmError."""
        return self.netns.run(*command, timeout=timeout)

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM, port: int = 0) -> socket.socket:
        """A socket of the calling process that lives here, bound to `port` of all addresses, reusable by others."""
        with self.netns.entered():
            made = socket.socket(socket.AF_INET, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(("0.0.0.0", port))
        return made

    def firewall(self, *, refuse: bool = False) -> None:
        """Let in only answers to what left, as a strict host firewall does; no address is translated."""
        verdict = _REFUSE if refuse else "drop"
        self.netns.nft(f"""
            table ip wall {{
                chain input {{
                    type filter hook input priority filter
                    iifname "lo" accept
                    ct state established,related accept
                    {verdict}
                }}
            }}""")


class Router(_Station):
    """A NAT. `address` is its outer one; `kind` and `refuse` as given to `Lab.nat`."""

    def __init__(
        self,
        lab: Lab,
        label: str,
        outer: _Segment,
        network: str,
        kind: Nat,
        refuse: bool,
        rate: str | None,
        delay: float,
    ) -> None:
        super().__init__(lab, label, outer, "wan", rate, delay)
        self.kind, self.refuse = kind, refuse
        self._forwards: dict[int, tuple[Host, int]] = {}
        self._generation = 0
        lan = ipaddress.IPv4Network(network)
        free = lan.hosts()
        gateway = str(next(free))
        self.inside = _Segment(self.netns, "lan", lan, free, gateway)
        self.netns.ip("link", "add", "lan", "type", "bridge")
        self.netns.ip("address", "add", f"{gateway}/{lan.prefixlen}", "dev", "lan")
        self.netns.ip("link", "set", "lan", "up")
        if outer.gateway is None:
            # A provider's network swallows what it has no route for; it does not say so at once.
            self.netns.ip("route", "add", "blackhole", "default")
        self.netns.sysctl("net/ipv4/ip_forward", 1)
        self._load()

    def forward(self, port: int, host: Host, to: int | None = None) -> None:
        """Send what arrives at the outer TCP and UDP `port` to a host inside, at the same port or `to`."""
        self._forwards[port] = (host, port if to is None else to)
        self._load()

    def block(self, *others: Router) -> None:
        """Let nothing through from and to the outer addresses of `others`, and of nobody else blocked before."""
        drops = "\n".join(f"ip {way} {other.address} drop" for other in others for way in ("saddr", "daddr"))
        self.netns.nft(_BLOCK.format(drops=drops))

    def reboot(self) -> None:
        """Forget every mapping and connection, as after a power cut. The outer address stays.

        Connections are tracked from then on in a zone of their own, in which no old one exists.
        """
        self._generation += 1
        self._load()

    def _load(self) -> None:
        self.netns.nft(
            _RULES.format(
                masquerade="masquerade fully-random" if self.kind is Nat.SYMMETRIC else "masquerade",
                learn=_LEARN if self.kind is Nat.FULL_CONE else "",
                forwards="\n".join(
                    f'iifname "wan" {protocol} dport {port} dnat to {host.address}:{to}'
                    for port, (host, to) in self._forwards.items()
                    for protocol in ("tcp", "udp")
                ),
                stranger=_REFUSE if self.refuse else "drop",
                zone=self._generation,
            )
        )


@dataclass
class Lab:
    """The public segment and all that hangs on it. A context manager."""

    _stack: ExitStack = field(default_factory=ExitStack)
    _ports: int = 0
    _networks: int = 0

    def __enter__(self) -> Self:
        reason = missing_tools(*_TOOLS)
        if reason is not None:
            raise SwarmError(f"the lab {reason}")
        sweep()
        try:
            hub = self.own("hub")
            hub.ip("link", "add", "public", "type", "bridge")
            hub.ip("link", "set", "public", "up")
        except BaseException:
            self._stack.close()
            raise
        # Each in a /24 of its own: public machines are not neighbours, and the code under test counts subnets.
        free = (PUBLIC[256 * number + 1] for number in range(1, 255))
        self._public = _Segment(hub, "public", PUBLIC, free)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def nat(
        self,
        label: str,
        kind: Nat,
        *,
        behind: Router | None = None,
        refuse: bool = False,
        network: str | None = None,
        rate: str | None = None,
        delay: float = 0,
    ) -> Router:
        """A NAT router on the public segment or inside another one.

        `refuse`: strangers get a RST or ICMP error instead of silence. `network` of the inside; a different
        192.168.x.0/24 for each if not given. `rate` (as tc spells it) and `delay` (seconds, each way) are those of its
        outer line.
        """
        self._networks += 1
        outer = self._public if behind is None else behind.inside
        return Router(self, label, outer, network or f"192.168.{self._networks}.0/24", kind, refuse, rate, delay)

    def host(self, label: str, behind: Router | None = None, *, rate: str | None = None, delay: float = 0) -> Host:
        """A host on the public segment or behind a NAT; `delay` in seconds, each way."""
        segment = self._public if behind is None else behind.inside
        return Host(self, label, segment, "eth0", rate, delay)

    def own(self, label: str) -> Netns:
        """A namespace that goes with the lab."""
        netns = Netns(label)
        self._stack.callback(netns.close)
        return netns

    def next_port(self) -> int:
        self._ports += 1
        return self._ports

    def wire(self, a: Netns, a_device: str, b: Netns, b_device: str, delay: float) -> None:
        """A cable with a delay: see wire.py for why it is not tc's netem."""
        program = [sys.executable, "-E", "-S", str(_WIRE), a.name, a_device, b.name, b_device, str(delay)]
        process = subprocess.Popen(
            program,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SwarmError(f"no cable with a delay between {a.name} and {b.name}: see what wire.py said")


def available() -> str | None:
    """Why there can be no lab here, or None if there can."""

    def probe() -> None:
        with Lab() as lab:
            lab.host("a", lab.nat("n", Nat.FULL_CONE), rate="100mbit")

    return missing_tools(*_TOOLS) or refusal(probe)


_BLOCK = """
add table ip block
delete table ip block
table ip block {{
    chain forward {{
        type filter hook forward priority filter - 20
        {drops}
    }}
}}
"""

# Rejected in a filter chain, a packet leaves no conntrack entry; a RST by the router's own TCP would leave one that
# takes the port away from the host behind.
_REFUSE = "meta l4proto tcp reject with tcp reset\nreject"

_LEARN = """
    oifname "wan" meta l4proto tcp add @tcp_owners { tcp sport : ip saddr }
    oifname "wan" meta l4proto udp add @udp_owners { udp sport : ip saddr }"""

# Deleting a table that may not exist: add it first. The maps stay empty but for a full cone.
_RULES = """
add table ip nat
delete table ip nat
table ip nat {{
    map tcp_owners {{ type inet_service : ipv4_addr; size 65535; flags dynamic; }}
    map udp_owners {{ type inet_service : ipv4_addr; size 65535; flags dynamic; }}
    chain zone {{
        type filter hook prerouting priority raw
        ct zone set {zone}
    }}
    chain learn {{
        type filter hook forward priority filter - 10
        {learn}
    }}
    chain incoming {{
        type nat hook prerouting priority dstnat
        {forwards}
        iifname "wan" dnat to tcp dport map @tcp_owners
        iifname "wan" dnat to udp dport map @udp_owners
    }}
    chain outgoing {{
        type nat hook postrouting priority srcnat
        oifname "wan" {masquerade}
    }}
    chain input {{
        type filter hook input priority filter
        iifname != "wan" accept
        ct state established,related accept
        {stranger}
    }}
    chain forward {{
        type filter hook forward priority filter
        iifname != "wan" accept
        ct state established,related accept
        ct status dnat accept
        {stranger}
    }}
}}
"""

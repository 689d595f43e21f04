"""Multiaddresses and peer ids as text: parse, validate, expand. Imports nothing of libp2p, so every command may use it.

Of the multiaddr zoo (https://github.com/multiformats/multiaddr) this node speaks TCP over IP or DNS names, and relay
circuits over those:

    /ip4/192.0.2.7/tcp/4001[/p2p/<id>]      /ip6/...      /dns|dns4|dns6/<name>/tcp/4001[/p2p/<id>]
    /ip4/192.0.2.7/tcp/4001/p2p/<relay id>/p2p-circuit[/p2p/<id>]

Everything else is refused by `parse` and skipped by `valid`: an address that nobody here can dial is not worth storing.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import base58

from p2pnode.errors import UsageError

MAX_ADDRESS_CHARS = 512  # a circuit with two ids and a DNS name of full length fits
MAX_PEER_ID_CHARS = 64  # an Ed25519 id has 52 characters, a SHA-256 one 46
_HOST_KINDS = ("ip4", "ip6", "dns", "dns4", "dns6")
# Linear: every label but the last is followed by its dot. No underscore: multiaddr's IDNA refuses it.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}(?:\.(?=[A-Za-z0-9])|\.?\Z))+\Z")

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IP = ipaddress.IPv4Address | ipaddress.IPv6Address


class Scope(enum.Enum):
    """From where an IP address can be dialled, as far as its number tells."""

    HOST = "host"  # this machine only
    LAN = "lan"  # RFC 1918 and unique local addresses: this site only, and the same number is somebody else elsewhere
    OVERLAY = "overlay"  # RFC 6598, the range of carrier-grade NATs and of meshes such as Tailscale
    PUBLIC = "public"


_LAN = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10"),
    )
)
_OVERLAY = ipaddress.ip_network("100.64.0.0/10")


def scope_of(ip: IP) -> Scope:
    """The scope of `ip`. Not `ip.is_private`, which counts the ranges for documentation and benchmarks as private."""
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    ip = mapped or ip
    if ip.is_loopback or ip.is_unspecified:
        return Scope.HOST
    if any(ip in network for network in _LAN):
        return Scope.LAN
    return Scope.OVERLAY if ip in _OVERLAY else Scope.PUBLIC


@dataclass(frozen=True, slots=True)
class Address:
    """One parsed multiaddress. `str()` gives its canonical text back."""

    kind: str  # ip4, ip6, dns, dns4 or dns6
    host: str
    port: int
    relay: str | None = None  # peer id of the relay when this is a circuit
    peer: str | None = None  # peer id this address leads to, if it says so

    def __str__(self) -> str:
        text = f"/{self.kind}/{self.host}/tcp/{self.port}"
        if self.relay is not None:
            text += f"/p2p/{self.relay}/p2p-circuit"
        return f"{text}/p2p/{self.peer}" if self.peer is not None else text

    @property
    def ip(self) -> IP | None:
        """The host as an IP address; None when it is a name."""
        return ipaddress.ip_address(self.host) if self.kind in ("ip4", "ip6") else None

    @property
    def scope(self) -> Scope | None:
        """None when the host is a name."""
        return None if self.ip is None else scope_of(self.ip)

    def with_peer(self, peer: str | None) -> Address:
        return replace(self, peer=peer)

    def through(self, relay: str) -> Address:
        """The circuit over the relay that listens at this address."""
        return replace(self, relay=relay, peer=None)


def check_peer_id(text: str) -> str:
    """`text` if it is a peer id in base58 (Ed25519 inline or SHA-256 multihash), else `UsageError`.

    https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
    """
    # The length is bounded first: base58 decoding is quadratic.
    if not 0 < len(text) <= MAX_PEER_ID_CHARS:
        raise UsageError(f"{text[:80]!r} is not a peer id: it must have 1 to {MAX_PEER_ID_CHARS} characters")
    try:
        raw = base58.b58decode(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a peer id: it is not base58") from None
    inline = len(raw) == 38 and raw.startswith(b"\x00\x24\x08\x01\x12\x20")
    hashed = len(raw) == 34 and raw.startswith(b"\x12\x20")
    if not (inline or hashed):
        raise UsageError(f"{text!r} is not a peer id: it is neither an Ed25519 key nor a SHA-256 hash of one")
    return text


def parse(text: str) -> Address:
    """Parse an address that can be dialled. Raises `UsageError` naming what is wrong with it."""
    address = _parse(text)
    if address.port == 0:
        raise UsageError(f"address {text!r} has port 0, which nobody can dial")
    ip = address.ip
    if ip is not None and (ip.is_unspecified or ip.is_multicast):
        raise UsageError(f"address {text!r} names no machine: {address.host} cannot be dialled")
    return address


def parse_listen(text: str) -> Address:
    """Parse an address to listen on: an IP of this machine, or 0.0.0.0 or :: for all; port 0 lets the system choose."""
    address = _parse(text)
    if address.ip is None or address.relay is not None or address.peer is not None:
        raise UsageError(f"cannot listen on {text!r}: a listen address is /ip4/<IP>/tcp/<port> or /ip6/<IP>/tcp/<port>")
    return address


def valid(texts: Iterable[str], peer: str | None = None, limit: int = 16) -> list[str]:
    """The diallable ones among addresses that a stranger sent: canonical, without duplicates, at most `limit`.

    With `peer` given, addresses that lead to somebody else are dropped and the others come without /p2p/<peer>.
    Looks at no more than four times `limit` entries.
    """
    found: dict[str, None] = {}
    for seen, text in enumerate(texts):
        if len(found) >= limit or seen >= 4 * limit:
            break
        try:
            address = parse(text)
        except UsageError:
            continue
        if peer is not None:
            if address.peer not in (None, peer):
                continue
            address = address.with_peer(None)
        found[str(address)] = None
    return list(found)


def _parse(text: str) -> Address:
    def bad(why: str) -> UsageError:
        return UsageError(f"{text[:MAX_ADDRESS_CHARS]!r} is not an address this node can use: {why}")

    if len(text) > MAX_ADDRESS_CHARS:
        raise bad("it is too long")
    parts = text.split("/")
    if len(parts) < 5 or parts[0] != "":
        raise bad("expected a multiaddress such as /ip4/192.0.2.7/tcp/4001")
    _, kind, host, transport, port_text, *rest = parts
    if kind not in _HOST_KINDS:
        raise bad(f"/{kind} is not supported")
    if transport != "tcp":
        raise bad(f"/{transport} is not supported, only /tcp")
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and int(port_text) <= 65535):
        raise bad(f"{port_text!r} is not a port")
    relay: str | None = None
    peer: str | None = None
    if rest[:1] == ["p2p"] and rest[2:3] == ["p2p-circuit"]:
        relay, rest = check_peer_id(rest[1]), rest[3:]
    if rest[:1] in (["p2p"], ["ipfs"]) and len(rest) == 2:
        peer, rest = check_peer_id(rest[1]), []
    if rest:
        raise bad(f"/{'/'.join(rest)} is not supported after the port")
    return Address(
        kind, _canonical_host(kind, host, bad_host=bad(f"{host!r} is no {kind} host")), int(port_text), relay, peer
    )


def _canonical_host(kind: str, host: str, bad_host: UsageError) -> str:
    try:
        if kind == "ip4":
            return str(ipaddress.IPv4Address(host))
        if kind == "ip6":
            ip = ipaddress.IPv6Address(host)
            if ip.scope_id is not None:  # a zone means something on one machine only
                raise bad_host
            return str(ip)
    except ipaddress.AddressValueError:
        raise bad_host from None
    if not _DNS_NAME.match(host):
        raise bad_host
    return host.lower()


def interfaces() -> list[Interface]:
    """The IP addresses of this machine's interfaces that are up, with their networks."""
    import psutil  # here, because only the running node needs it

    found: list[Interface] = []
    stats = psutil.net_if_stats()
    for name, entries in psutil.net_if_addrs().items():
        if name in stats and not stats[name].isup:
            continue
        for entry in entries:
            try:
                found.append(ipaddress.ip_interface(f"{entry.address}/{_prefix(entry.netmask)}"))
            except ValueError:
                continue  # a MAC address, or an IPv6 address with a zone (link-local: of no use to others)
    return found


def _prefix(netmask: str | None) -> str:
    """What may stand after the slash: IPv4 masks as they are, IPv6 masks counted into a prefix length."""
    if netmask is None:
        return ""
    if ":" in netmask:
        return str(int(ipaddress.IPv6Address(netmask)).bit_count())
    return netmask


def expand(listening: Sequence[Address], own: Sequence[Interface]) -> list[Address]:
    """What others can dial when we listen on `listening`: 0.0.0.0 and :: become the addresses in `own`.

    Loopback addresses are kept only when there are no others (a test on one machine, or no network at all); link-local
    IPv6 addresses need a zone that means nothing elsewhere and are left out.
    """
    found: dict[Address, None] = {}
    for address in listening:
        ip = address.ip
        if ip is not None and ip.is_unspecified:
            for interface in own:
                if interface.version == ip.version and not (interface.version == 6 and interface.ip.is_link_local):
                    found[replace(address, host=str(interface.ip))] = None
        else:
            found[address] = None
    outside = [address for address in found if address.ip is None or not address.ip.is_loopback]
    return outside or list(found)


def endpoints(listening: Sequence[Address], own: Sequence[Interface]) -> set[tuple[str, int]]:
    """Every (IP, port) of this machine at which `listening` answers, loopback included: not worth dialling."""
    found: set[tuple[str, int]] = set()
    for address in listening:
        ip = address.ip
        if ip is not None and ip.is_unspecified:
            found.update((str(each.ip), address.port) for each in own if each.version == ip.version)
        else:
            found.add((address.host, address.port))
    return found

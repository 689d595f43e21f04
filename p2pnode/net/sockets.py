"""TCP sockets that share the listen port: what a NAT maps for an outgoing connection is then what leads to us.

A NAT with endpoint-independent mapping gives the same outside port to everything that leaves from the same inside port
(RFC 4787 section 4.1). A dial from the listen port therefore tells a peer, who sees where it comes from, the address
at which hole punching can reach us; go-libp2p's reuseport does the same.
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import Any

import trio

from p2pnode.net.addresses import Address, Interface, Scope, scope_of

RESOLVE_LIMIT = 4  # addresses of a name that are tried from the listen port before the system's own choice

# What bind or connect say when the port, or this pair of endpoints, is taken: another port will do.
_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EINVAL, errno.EACCES)


def local_endpoint(listening: Sequence[Address], version: int) -> tuple[str, int] | None:
    """Where to dial from: the first listener of this IP version, one on all interfaces before others. Pure."""
    found = [address for address in listening if address.ip is not None and address.ip.version == version]
    found = [address for address in found if address.scope is not Scope.HOST or address.ip.is_unspecified]  # type: ignore[union-attr]
    found.sort(key=lambda address: not (address.ip is not None and address.ip.is_unspecified))
    return (found[0].host, found[0].port) if found else None


def shares_port(ip: str, own: Sequence[Interface]) -> bool:
    """Whether a dial to `ip` should come from the listen port: not on our own networks, where no NAT is between and
    two neighbours who discover each other dial at the same instant, which from fixed ports is one connection with two
    initiators."""
    target = ipaddress.ip_address(ip)
    return scope_of(target) is not Scope.HOST and not any(target in interface.network for interface in own)


async def connect(address: Address, listening: Sequence[Address], own: Sequence[Interface]) -> trio.SocketStream:
    """A connection to `address`, from the listen port where that is possible and of use. Raises `OSError`."""
    for host in await _resolve(address):
        local = local_endpoint(listening, ipaddress.ip_address(host).version)
        if local is None or not shares_port(host, own):
            continue
        try:
            return await connect_from(local, host, address.port)
        except OSError as exc:
            if address.ip is not None and exc.errno not in _TAKEN:
                raise
    return await trio.open_tcp_stream(address.host, address.port)


async def connect_from(local: tuple[str, int] | None, host: str, port: int) -> trio.SocketStream:
    """A connection from `local`, shared with its listener (None: from any port). Raises `OSError`."""
    sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if local is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            await sock.bind(local)
        await sock.connect((host, port))
        if sock.getsockname()[:2] == sock.getpeername()[:2]:
            raise OSError(errno.EADDRNOTAVAIL, "connected to itself")
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


async def _resolve(address: Address) -> list[str]:
    if address.ip is not None:
        return [address.host]
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(address.kind, socket.AF_UNSPEC)
    try:
        found = await trio.socket.getaddrinfo(address.host, address.port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []  # the dial that follows says why
    return list(dict.fromkeys(str(info[4][0]) for info in found if "%" not in str(info[4][0])))[:RESOLVE_LIMIT]


def of_connection(conn: Any) -> trio.socket.SocketType | None:
    """The TCP socket under one of the swarm's connections; None when there is none (a relayed one)."""
    layer = getattr(conn.muxed_conn, "secured_conn", None)
    for name in ("conn", "stream", "stream", "socket"):
        layer = getattr(layer, name, None)
    return layer if isinstance(layer, trio.socket.SocketType) and layer.fileno() >= 0 else None


class Failure(enum.Enum):
    """How a dial failed, as far as its cause can be told from it."""

    REFUSED = "refused"  # a RST: nothing listens there, or something on the way says so
    SILENT = "silent"  # no answer at all
    UNREACHABLE = "unreachable"  # anything else: no route, not permitted


def failure(exc: OSError) -> Failure:
    """Which of them `connect` failed with."""
    number = _error_number(exc)
    if number in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Failure.REFUSED
    return Failure.SILENT if number == errno.ETIMEDOUT else Failure.UNREACHABLE


def _error_number(exc: BaseException | None) -> int | None:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if exc is None or (isinstance(exc, OSError) and exc.errno is not None):
        return exc.errno if isinstance(exc, OSError) else None
    return _error_number(exc.__cause__)


def reason(exc: BaseException) -> str:
    """The system's words for an error, in lower case; trio and the library wrap those of several attempts."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if isinstance(exc, OSError) and exc.errno is not None:
        return os.strerror(exc.errno).lower()
    if exc.__cause__ is not None and exc.__cause__ is not exc:
        return reason(exc.__cause__)
    return str(exc) or type(exc).__name__

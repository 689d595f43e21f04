"""Real sockets on loopback."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pnode.net import sockets
from p2pnode.net.addresses import Scope, parse, parse_listen, scope_of
from p2pnode.net.hardening import _open_listeners

OWN = [ipaddress.ip_interface("192.168.1.5/24")]


@asynccontextmanager
async def listener() -> AsyncIterator[tuple[trio.SocketListener, int]]:
    [found] = await _open_listeners("127.0.0.1", 0)
    async with found:
        yield found, found.socket.getsockname()[1]


async def test_a_dial_leaves_from_the_listen_port_and_the_listener_goes_on() -> None:
    async with (
        listener() as (ours, port),
        listener() as (theirs, their_port),
        await sockets.connect_from(("127.0.0.1", port), "127.0.0.1", their_port) as stream,
    ):
        accepted = await theirs.accept()
        assert stream.socket.getsockname()[1] == accepted.socket.getpeername()[1] == port
        async with await trio.open_tcp_stream("127.0.0.1", port) as inbound:
            (await ours.accept()).socket.close()
            assert await inbound.receive_some(1) == b""
        accepted.socket.close()


async def test_the_same_pair_of_endpoints_twice_is_an_error_that_another_port_solves() -> None:
    async with (
        listener() as (_, port),
        listener() as (theirs, their_port),
        await sockets.connect_from(("127.0.0.1", port), "127.0.0.1", their_port),
    ):
        with pytest.raises(OSError) as caught:
            await sockets.connect_from(("127.0.0.1", port), "127.0.0.1", their_port)
        assert caught.value.errno in sockets._TAKEN
        target = parse(f"/ip4/127.0.0.1/tcp/{their_port}")
        async with await sockets.connect(target, [parse_listen(f"/ip4/127.0.0.1/tcp/{port}")], []) as stream:
            assert stream.socket.getsockname()[1] != port
            await theirs.accept()


async def test_the_port_cannot_be_stolen() -> None:
    """Another program of ours does what we do: it listens first, and shares the port only then."""
    async with listener() as (_, port):
        with pytest.raises(OSError):
            await _open_listeners("127.0.0.1", port)
        with pytest.raises(OSError):
            await _open_listeners("0.0.0.0", port)


async def test_a_listener_comes_back_while_dials_from_its_port_are_still_up() -> None:
    """A restarted node finds the connections of its last life in TIME_WAIT or still closing."""
    async with listener() as (theirs, their_port):
        async with listener() as (_, port):
            stream = await sockets.connect_from(("127.0.0.1", port), "127.0.0.1", their_port)
            await theirs.accept()
        [again] = await _open_listeners("127.0.0.1", port)
        await again.aclose()
        await stream.aclose()


async def test_connecting_to_oneself_is_no_connection() -> None:
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    with pytest.raises(OSError):
        await sockets.connect_from(("127.0.0.1", port), "127.0.0.1", port)


def test_where_to_dial_from() -> None:
    texts = ["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.5/tcp/2", "/ip4/0.0.0.0/tcp/3", "/ip6/::/tcp/4"]
    listening = [parse_listen(text) for text in texts]
    assert sockets.local_endpoint(listening, 4) == ("0.0.0.0", 3)
    assert sockets.local_endpoint(listening[:2], 4) == ("192.168.1.5", 2)
    assert sockets.local_endpoint(listening[:1], 4) is None
    assert sockets.local_endpoint(listening, 6) == ("::", 4)
    assert sockets.local_endpoint([], 4) is None


@pytest.mark.parametrize(
    ("ip", "shared"), [("9.9.9.9", True), ("192.168.1.9", False), ("127.0.0.1", False), ("10.0.0.1", True)]
)
def test_only_what_a_nat_may_lie_before_is_dialled_from_the_listen_port(ip: str, shared: bool) -> None:
    assert sockets.shares_port(ip, OWN) is shared


@pytest.mark.parametrize(
    ("ip", "scope"),
    [
        ("127.0.0.1", Scope.HOST),
        ("::1", Scope.HOST),
        ("0.0.0.0", Scope.HOST),
        ("10.1.1.1", Scope.LAN),
        ("172.31.0.1", Scope.LAN),
        ("172.32.0.1", Scope.PUBLIC),
        ("::ffff:192.168.0.1", Scope.LAN),
        ("fd00::1", Scope.LAN),
        ("100.64.0.1", Scope.OVERLAY),
        ("100.128.0.1", Scope.PUBLIC),
        ("203.0.113.9", Scope.PUBLIC),
        ("2001:db8::1", Scope.PUBLIC),
    ],
)
def test_scopes(ip: str, scope: Scope) -> None:
    assert scope_of(ipaddress.ip_address(ip)) is scope

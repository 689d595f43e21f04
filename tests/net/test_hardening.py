"""Each correction of the library: that what it hangs on still exists, and that it does what it is for."""

from __future__ import annotations

import inspect
import logging
import socket
import subprocess
import sys
from typing import Any

import libp2p
import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pnode.net import hardening, noise, yamux
from p2pnode.net.noise import security_options


def test_the_library_is_the_one_the_corrections_were_written_for() -> None:
    assert libp2p.__version__ == hardening.VERSION
    for owner, name in hardening.WEAKNESSES:
        assert hasattr(owner, name), f"{owner} has lost {name}"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (Swarm._handle_inbound_connection, ["self", "read_write_closer", "maddr"]),
        (Swarm.upgrade_inbound_raw_conn, ["self", "raw_conn", "maddr"]),
        (Swarm.add_conn, ["self", "muxed_conn", "direction"]),
        (Swarm.dial_peer, ["self", "peer_id"]),
        (SwarmConn._add_stream, ["self", "muxed_stream"]),
        (libp2p.host.basic_host.BasicHost._swarm_stream_handler, ["self", "net_stream"]),
    ],
)
def test_signatures(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_stock_signatures_of_what_is_replaced() -> None:
    code = """
import inspect, libp2p
import libp2p.transport.tcp.tcp as tcp
from libp2p.io.trio import TrioTCPStream
from libp2p.io.utils import read_exactly
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
for function in (Swarm._do_handle_inbound_connection, SwarmConn.close, SwarmConn.new_stream, TrioTCPStream.__init__,
                 tcp._open_reuseport_listeners, read_exactly):
    print(*inspect.signature(function).parameters)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "self read_write_closer maddr failure_event",
        "self",
        "self",
        "self stream",
        "host port",
        "reader n retry_count",
    ]


def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "_applied", False)
    monkeypatch.setattr(libp2p, "__version__", "0.9.0")
    with pytest.raises(RuntimeError, match=r"0\.9\.0"):
        hardening.apply()


def test_an_attribute_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "_applied", False)
    monkeypatch.setattr(hardening, "WEAKNESSES", ((Swarm, "does_not_exist"),))
    with pytest.raises(RuntimeError, match=r"Swarm\.does_not_exist"):
        hardening.apply()


def test_read_exactly_is_replaced_wherever_it_was_imported() -> None:
    hardening.apply()
    import libp2p.host.ping
    import libp2p.io.msgio
    import libp2p.utils.varint

    for module in (libp2p.io.utils, libp2p.host.ping, libp2p.io.msgio, libp2p.utils.varint):
        assert module.read_exactly is hardening._read_exactly


async def test_read_exactly_takes_any_number_of_pieces() -> None:
    class Dribble:
        def __init__(self, size: int) -> None:
            self.left = size

        async def read(self, n: int) -> bytes:
            await trio.lowlevel.checkpoint()
            self.left -= 1
            return b"x" if self.left >= 0 else b""

    hardening.apply()
    assert await libp2p.io.utils.read_exactly(Dribble(1000), 1000) == b"x" * 1000
    with pytest.raises(hardening.IncompleteReadError):
        await libp2p.io.utils.read_exactly(Dribble(5), 1000)


async def test_listening_is_exclusive_and_the_port_can_still_be_dialled_from() -> None:
    [listener] = await hardening._open_listeners("127.0.0.1", 0)
    port = listener.socket.getsockname()[1]
    with pytest.raises(OSError, match="in use"):
        await hardening._open_listeners("127.0.0.1", port)
    # What hole punching does: dial somebody else from the port we listen on.
    [other] = await hardening._open_listeners("127.0.0.1", 0)
    with socket.socket() as dialler:
        dialler.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        dialler.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        dialler.bind(("127.0.0.1", port))
        dialler.connect(other.socket.getsockname())
        accepted = await other.accept()
        assert accepted.socket.getpeername()[1] == port
        await accepted.aclose()
    await listener.aclose()
    await other.aclose()


async def test_both_families_share_a_port() -> None:
    [four] = await hardening._open_listeners("0.0.0.0", 0)
    [six] = await hardening._open_listeners("::", four.socket.getsockname()[1])
    await four.aclose()
    await six.aclose()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_connections_notice_a_dead_peer_and_know_its_address(host: str) -> None:
    hardening.apply()
    [listener] = await hardening._open_listeners(host, 0)
    client = await trio.open_tcp_stream(host, listener.socket.getsockname()[1])
    server = TrioTCPStream(await listener.accept())
    assert server.get_remote_address() == client.socket.getsockname()[:2]
    sock = server.stream.socket
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle, interval, probes = (
        sock.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert idle + interval * probes < 25
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) < 25_000
    await client.aclose()
    await server.close()
    await listener.aclose()


def peers(number: int) -> list[Any]:
    return [ID(b"\x12\x20" + n.to_bytes(32, "big")) for n in range(number)]


def test_the_peer_store_is_bounded_and_keeps_our_own_keys() -> None:
    pair = create_new_key_pair(bytes(32))
    own = ID.from_pubkey(pair.public_key)
    heard: list[Any] = []
    store = hardening.BoundedPeerStore(own, lambda peer, addrs: heard.append((peer, list(addrs))))
    store.add_key_pair(own, pair)
    many = [Multiaddr(f"/ip4/192.0.2.1/tcp/{port}") for port in range(1, 40)]
    crowd = peers(hardening.MAX_STORED_PEERS + 500)
    for peer in crowd:
        store.add_addrs(peer, many[:1], 7200)
    store.add_addrs(crowd[-1], many, 7200)
    store.add_addrs(crowd[-1], many[20:], 7200)
    assert len(store.peer_data_map) <= hardening.MAX_STORED_PEERS
    assert store.privkey(own) == pair.private_key
    assert len(store.addrs(crowd[-1])) == hardening.MAX_STORED_ADDRS
    assert crowd[0] not in store.peer_data_map
    assert heard[0] == (crowd[0], many[:1])


async def test_the_host_offers_noise_and_yamux_only_and_dials_nobody() -> None:
    pair = create_new_key_pair(bytes(32))

    async def dial(peer: Any) -> list[Any]:
        raise AssertionError

    host = hardening.make_host(
        pair, security_options(pair), addrs=lambda: [], dial=dial, heard=lambda peer, addrs: None, agent="test/1"
    )
    swarm = host.get_network()
    assert list(swarm.upgrader.security_multistream.transports) == ["/noise"]
    assert list(swarm.upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]
    assert isinstance(swarm.upgrader.security_multistream.transports["/noise"], noise.NoiseTransport)
    assert libp2p.stream_muxer.muxer_multistream.Yamux is yamux.Yamux
    assert [type(transport).__name__ for transport in swarm.transport_manager.get_transports()] == ["TCP"]
    assert swarm._resource_manager is None
    assert swarm._inbound_limiter.total_tokens == hardening.MAX_INBOUND
    assert swarm.connection_config.max_connections == hardening.MAX_CONNECTIONS
    assert swarm.auto_connector.maybe_connect is hardening._do_nothing
    assert swarm.dial_peer is dial
    assert hardening.identify.AGENT_VERSION == "test/1"


def test_the_library_prints_nothing() -> None:
    code = """
import logging
from p2pnode.net import hardening, noise, yamux
from p2pnode.net.noise import security_options
hardening.apply()
logging.getLogger("libp2p.network.swarm").error("noise")
logging.getLogger("libp2p.host.basic_host").warning("noise")
hardening.swarm_connection.logging.warning("noise")
assert not logging.getLogger().handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_modules_that_log_on_the_root_logger_are_known() -> None:
    """The one module at run time that would install a handler on the root logger."""
    hardening.apply()
    assert isinstance(hardening.swarm_connection.logging, logging.Logger)

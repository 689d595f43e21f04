"""Real nodes on loopback, something wrong with one of them, and what `doctor` makes of it. NATs are in tests/nat."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pnode.config import Config
from p2pnode.errors import EXIT_NETWORK, EXIT_NOT_FOUND, NotFound, UsageError
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.dht import DHTRouter
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.transport import Stream
from p2pnode.net.traversal import NatSettings, Wanted
from p2pnode.node import Node
from p2pnode.progress import silent
from protocols.cid import CID, Codec
from protocols.relay import RelayLimits
from tests.net.circuits import until

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
Doctor = dict[str, Any]


@pytest.fixture
def homes(tmp_path: Path) -> Path:
    return tmp_path


@asynccontextmanager
async def node(home: Path, *bootstrap: str, **settings: Any) -> AsyncIterator[Node]:
    given: dict[str, Any] = {"listen": (LOOPBACK,), "mdns": False, "upnp": False, "reachability": "public"} | settings
    async with Node.open(Config(home=home, bootstrap=bootstrap, **given)) as made:
        yield made


@asynccontextmanager
async def stranger(identity: Identity | None = None, listen: str = LOOPBACK, **nat: Any) -> AsyncIterator[Network]:
    """A network without a node upon it."""
    settings = {"reachability": Wanted.PUBLIC} | nat
    async with Network.open(
        identity=identity or Identity.generate(),
        listen=[listen],
        address_book=AddressBook(),
        agent="p2pnode-test/1",
        nat=NatSettings(**settings),
    ) as network:
        yield network


async def doctor(asked: Node, target: str | None = None) -> Doctor:
    with trio.fail_after(40):
        row = await asked.doctor(target, silent)
    json.dumps(row)  # as --json prints it
    return row


def codes(row: Doctor, problems: bool = True) -> list[str]:
    return [cause["code"] for cause in row["causes"] if cause["problem"] or not problems]


def steps(row: Doctor, name: str) -> list[Doctor]:
    return [step for step in row["steps"] if step["step"] == name]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def provided(node: Node, path: Path) -> dict[str, Any]:
    path.write_bytes(os.urandom(600_000))
    return await node.provide(str(path), kind=None, name=None, report=silent)


async def test_nothing_is_wrong(homes: Path) -> None:
    async with node(homes / "a") as a, node(homes / "b", a.addrs()[0]) as b:
        image = await provided(a, homes / "original")
        itself = await doctor(b)
        assert (itself["ok"], itself["exit_code"], codes(itself, False)) == (True, 0, [])
        [bootstrap] = steps(itself, "bootstrap")
        assert bootstrap["mark"] == "ok" and bootstrap["ms"] > 0
        [clock] = steps(itself, "clock")
        assert clock["facts"]["peers"] == 1 and abs(clock["facts"]["offset"]) < 1
        for target in (a.peer_id, a.addrs()[0]):
            peer = await doctor(b, target)
            assert (peer["target"], peer["ok"]) == (a.peer_id, True)
            [dial] = steps(peer, "peer-dial")
            assert (dial["mark"], dial["facts"]["outcome"]) == ("ok", "answered")
            assert steps(peer, "peer-protocols")[0]["facts"]["exchange"] == ["/p2pnode/exchange/1"]
            assert steps(peer, "peer-rtt")[0]["mark"] == "ok"
        for target in (image["image"], image["link"]):
            found = await doctor(b, target)
            assert (found["target"], found["ok"]) == (image["image"], True)
            [has] = steps(found, "availability")
            assert has["peer"] == a.peer_id and has["facts"]["held"] == has["facts"]["chunks"] == image["chunks"]
            [coverage] = steps(found, "coverage")
            assert coverage["facts"] == {"chunks": image["chunks"], "reachable": image["chunks"]}
        assert not (await b.images())  # nothing was fetched


async def test_bootstrap_unreachable(homes: Path) -> None:
    dead = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{Identity.generate().peer_id}"
    async with node(homes / "a", dead) as a:
        row = await doctor(a)
        assert codes(row) == ["bootstrap-unreachable"]
        assert row["exit_code"] == EXIT_NETWORK
        [step] = steps(row, "bootstrap")
        assert (step["mark"], step["facts"]["outcome"]) == ("FAIL", "refused")
        async with node(homes / "b", a.addrs()[0], dead) as b:
            row = await doctor(b)
            assert codes(row) == [] and codes(row, False) == ["bootstrap-unreachable"]  # one of two: it explains
            assert row["exit_code"] == 0


async def test_alone_without_a_bootstrap_peer(homes: Path) -> None:
    async with node(homes / "a") as a:
        assert codes(await doctor(a)) == ["no-peers"]


async def test_clock_skew_of_this_node_and_of_one_peer(homes: Path) -> None:
    async with node(homes / "a") as a, node(homes / "b", a.addrs()[0]) as b, node(homes / "c", a.addrs()[0]) as c:
        await a._network.connect(c.peer_id, c.addrs())
        mine = a._network.clock
        right = mine.now
        mine.now = lambda: right() - 90
        row = await doctor(a)
        assert codes(row) == ["clock-skew"]
        [step] = steps(row, "clock")
        assert step["facts"]["peers"] == 2 and 89 < step["facts"]["offset"] < 91
        assert "90" in step["text"] and "behind" in step["text"]
        row = await doctor(b, a.peer_id)
        assert codes(row) == ["clock-skew"]
        assert -91 < steps(row, "peer-clock")[0]["facts"]["offset"] < -89
        assert "behind" in steps(row, "peer-clock")[0]["text"]
        mine.now = right
        assert codes(await doctor(b, a.peer_id)) == []


async def test_protocol_version_mismatch(homes: Path) -> None:
    async def serve(stream: Stream) -> None:
        await stream.receive_some(1)

    async with node(homes / "a") as a, stranger() as other:
        other.handle("/p2pnode/exchange/2", serve)
        row = await doctor(a, other.addrs()[0])
        assert codes(row) == ["protocol-mismatch"]
        assert row["exit_code"] == EXIT_NETWORK
        [step] = steps(row, "peer-protocols")
        assert "/p2pnode/exchange/2 only" in step["text"]
        assert steps(row, "peer-connect")[0]["facts"]["path"] == "direct"


async def test_peer_gone_and_nobody_known(homes: Path) -> None:
    async with node(homes / "a") as a:
        async with node(homes / "b", a.addrs()[0]) as b:
            gone, addr = b.peer_id, b.addrs()[0]
            await until(lambda: a._network.address_book.addrs(gone))  # identify has told
        for target in (gone, addr):
            row = await doctor(a, target)
            assert codes(row) == ["peer-gone"]
            assert steps(row, "peer-dial")[0]["facts"]["outcome"] == "refused"
        row = await doctor(a, Identity.generate().peer_id)
        assert codes(row) == ["peer-unknown"]
        assert row["exit_code"] == EXIT_NOT_FOUND


async def test_another_peer_or_program_answers_at_the_address(homes: Path) -> None:
    async with node(homes / "a") as a, stranger() as other, trio.open_nursery() as nursery:
        wanted = Identity.generate().peer_id
        addr = other.addrs()[0].split("/p2p/")[0]
        row = await doctor(a, f"{addr}/p2p/{wanted}")
        assert codes(row) == ["another-peer-answers"]
        assert steps(row, "peer-dial")[0]["facts"]["answered"] == other.peer_id

        async def http(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some(100)
                await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, http, [listener])
        port = listener.socket.getsockname()[1]
        row = await doctor(a, f"/ip4/127.0.0.1/tcp/{port}/p2p/{wanted}")
        assert codes(row) == ["wrong-port-forwarded"]
        assert steps(row, "peer-dial")[0]["facts"]["outcome"] == "foreign"
        nursery.cancel_scope.cancel()


async def test_the_announced_port_leads_to_another_program(homes: Path) -> None:
    async with stranger() as other, node(homes / "b") as b:
        port = other.addrs()[0].split("/")[4]
        announced = f"/ip4/127.0.0.1/tcp/{port}"
        async with node(homes / "a", b.addrs()[0], announce=(announced,), reachability="auto") as a:
            row = await doctor(a)
            assert codes(row) == ["wrong-port-forwarded", "no-relay"]
            assert {step["facts"]["outcome"] for step in steps(row, "dial-back")} == {"stranger"}
            assert steps(row, "reachability")[0]["facts"]["state"] == "private"


async def test_a_relay_without_room_for_reservations(homes: Path) -> None:
    async with node(homes / "r", relay=True, relay_reservations=0) as r:
        relay = r.addrs()[0]
        async with node(homes / "a", relay, reachability="private", relays=(relay,)) as a:
            row = await doctor(a)
            assert codes(row) == ["relay-full"]
            assert steps(row, "relay")[0]["facts"] == {"held": False, "relay": r.peer_id, "status": 200}


async def test_a_relay_without_room_for_circuits_and_one_the_peer_has_left(homes: Path) -> None:
    limits = RelayLimits(max_circuits=0)
    async with stranger(serve=limits) as r, node(homes / "a") as a:
        relay = r.addrs()[0]
        dead = f"/ip4/127.0.0.1/tcp/{free_port()}"
        async with stranger(reachability=Wanted.PRIVATE, relays=(relay,)) as b:
            await until(lambda: any("/p2p-circuit" in addr for addr in b.addrs()))
            target = f"{relay}/p2p-circuit/p2p/{b.peer_id}"
            row = await doctor(a, target)
            assert codes(row) == ["relay-full"]
            assert steps(row, "peer-relay")[0]["facts"]["outcome"] == "full"
        row = await doctor(a, target)
        assert codes(row) == ["peer-gone"]
        assert steps(row, "peer-relay")[0]["facts"]["outcome"] == "absent"
        row = await doctor(a, f"{dead}/p2p/{Identity.generate().peer_id}/p2p-circuit/p2p/{b.peer_id}")
        assert "relay-unreachable" in codes(row)


async def test_a_relayed_peer_is_fine_but_slow(homes: Path) -> None:
    async with (
        stranger(serve=RelayLimits()) as r,
        node(homes / "a", listen=(), hole_punching=False) as a,  # so that there is no direct way either way
        stranger(reachability=Wanted.PRIVATE, relays=(r.addrs()[0],), punch=False) as b,
    ):
        await until(lambda: any("/p2p-circuit" in addr for addr in b.addrs()))
        b.addrs = lambda: [f"{r.addrs()[0]}/p2p-circuit/p2p/{b.peer_id}"]  # type: ignore[method-assign]
        b.handle("/p2pnode/exchange/1", _wait)
        row = await doctor(a, b.addrs()[0])
        assert codes(row) == [] and codes(row, False) == ["relayed-only"]
        assert steps(row, "peer-connect")[0]["facts"]["path"] == "relayed"
        assert steps(row, "peer-punch")[0]["text"] == "hole punching is switched off"
        assert row["exit_code"] == 0


async def _wait(stream: Stream) -> None:
    await stream.receive_some(1)


async def test_a_record_of_a_provider_that_crashed(homes: Path) -> None:
    root = CID(Codec.DAG_CBOR, os.urandom(32))
    async with node(homes / "a") as a, node(homes / "b", a.addrs()[0]) as b:
        async with stranger() as crashing, trio.open_nursery() as nursery:
            router = DHTRouter(crashing)
            await nursery.start(router.run)
            await crashing.connect(a.peer_id, a.addrs())
            await router.bootstrap()
            router.provide([root.to_bytes()])
            await until(lambda: router.stats().announced)
            nursery.cancel_scope.cancel()  # without the goodbye of `close`
        row = await doctor(b, str(root))
        assert codes(row)[0] == "provider-record-stale"
        assert "peer-gone" in codes(row)
        assert row["exit_code"] == EXIT_NOT_FOUND
        [provider] = steps(row, "provider")
        assert provider["peer"] == crashing.peer_id and provider["facts"]["recorded"]


async def test_a_record_of_a_provider_that_has_nothing_any_more(homes: Path) -> None:
    root = CID(Codec.DAG_CBOR, os.urandom(32))
    async with node(homes / "a") as a, node(homes / "b", a.addrs()[0]) as b:
        a._router.provide([root.to_bytes()])
        await until(lambda: not a._router.stats().pending)
        row = await doctor(b, str(root))
        assert codes(row) == ["provider-record-stale"]
        assert steps(row, "availability")[0]["facts"]["known"] is False


async def test_an_image_nobody_has_and_one_that_is_here(homes: Path) -> None:
    nothing = str(CID(Codec.DAG_CBOR, os.urandom(32)))
    async with node(homes / "a") as a:
        row = await doctor(a, nothing)
        assert codes(row) == ["no-providers"] and "nobody to ask" in row["causes"][0]["text"]
        assert row["exit_code"] == EXIT_NOT_FOUND
        image = await provided(a, homes / "original")
        for target in (image["image"], image["image"][:12], "original"):
            row = await doctor(a, target)
            assert (row["target"], row["exit_code"]) == (image["image"], 0)


async def test_a_banned_provider(homes: Path) -> None:
    async with node(homes / "a") as a, node(homes / "b", a.addrs()[0]) as b:
        image = await provided(a, homes / "original")
        b._exchange._bans[a.peer_id] = trio.current_time() + 60
        row = await doctor(b, image["link"])
        assert codes(row) == ["peer-banned"]


async def test_what_is_neither_peer_nor_image(homes: Path) -> None:
    async with node(homes / "a") as a:
        for bad in ("/ip4/127.0.0.1/tcp/1", "/ip4/nonsense", "p2pnode:nonsense"):
            with pytest.raises(UsageError):
                await doctor(a, bad)
        with pytest.raises(UsageError, match="this node itself"):
            await doctor(a, a.peer_id)
        with pytest.raises(NotFound):
            await doctor(a, "no-such-name")


async def test_peers_that_say_nonsense_do_not_end_the_examination(homes: Path) -> None:
    """What a peer says of its clock, of the DHT and of the image is all its own."""

    async def nonsense(stream: Stream) -> None:
        await stream.send_all(b"\xff" * 64)

    root = CID(Codec.DAG_CBOR, os.urandom(32))
    async with node(homes / "a") as a, stranger() as liar:
        for protocol in ("/p2pnode/time/1", "/p2pnode/announce/1", "/p2pnode/exchange/1", "/p2pnode/reach/1"):
            liar.handle(protocol, nonsense)
        peer = await doctor(a, liar.addrs()[0])
        assert steps(peer, "peer-rtt")[0]["mark"] == "warn"
        image = await doctor(a, f"p2pnode:{root}?peer={liar.addrs()[0]}")
        assert steps(image, "availability")[0]["mark"] == "FAIL"
        await doctor(a)

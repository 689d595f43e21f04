from __future__ import annotations

import ipaddress

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.errors import UsageError
from p2pnode.net.addresses import (
    check_peer_id,
    endpoints,
    expand,
    interfaces,
    parse,
    parse_listen,
    valid,
)

ALICE = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
BOB = "QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ"
OWN = [ipaddress.ip_interface(text) for text in ("127.0.0.1/8", "192.0.2.7/24", "::1/128", "fd00::7/64", "fe80::1/64")]


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/192.0.2.7/tcp/4001",
        f"/ip4/192.0.2.7/tcp/4001/p2p/{ALICE}",
        f"/ip6/fd00::7/tcp/1/p2p/{BOB}",
        "/dns4/seed.example.org/tcp/65535",
        f"/ip4/192.0.2.7/tcp/4001/p2p/{ALICE}/p2p-circuit",
        f"/dns/relay.example/tcp/4001/p2p/{ALICE}/p2p-circuit/p2p/{BOB}",
    ],
)
def test_canonical_addresses_survive(text: str) -> None:
    assert str(parse(text)) == text


def test_spellings_become_canonical() -> None:
    assert str(parse("/ip6/FD00:0::7/tcp/04001")) == "/ip6/fd00::7/tcp/4001"
    assert str(parse("/dns/Seed.Example/tcp/1")) == "/dns/seed.example/tcp/1"
    assert str(parse(f"/ip4/192.0.2.7/tcp/1/ipfs/{ALICE}")) == f"/ip4/192.0.2.7/tcp/1/p2p/{ALICE}"


def test_a_circuit_knows_its_relay_and_its_end() -> None:
    address = parse(f"/ip4/192.0.2.7/tcp/4001/p2p/{ALICE}/p2p-circuit/p2p/{BOB}")
    assert (address.relay, address.peer) == (ALICE, BOB)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "192.0.2.7:4001",
        "/ip4/192.0.2.7",
        "/ip4/192.0.2.7/udp/4001/quic-v1",
        "/ip4/192.0.2.7/tcp/4001/ws",
        "/ip4/192.0.2/tcp/4001",
        "/ip4/fd00::7/tcp/4001",
        "/ip6/fe80::1%eth0/tcp/4001",
        "/ip4/192.0.2.7/tcp/65536",
        "/ip4/192.0.2.7/tcp/-1",
        "/ip4/192.0.2.7/tcp/٤",
        "/ip4/192.0.2.7/tcp/4001/p2p/",
        "/ip4/192.0.2.7/tcp/4001/p2p/0OIl",
        f"/ip4/192.0.2.7/tcp/4001/p2p/{ALICE}/p2p/{BOB}",
        "/ip4/192.0.2.7/tcp/4001/",
        "/dns4/-bad-/tcp/1",
        "/dns4/a..b/tcp/1",
        "/dns4/" + "a" * 300 + "/tcp/1",
        "/ip4/0.0.0.0/tcp/4001",
        "/ip4/224.0.0.1/tcp/4001",
        "/ip4/192.0.2.7/tcp/0",
        "/ip4/192.0.2.7/tcp/1" + "/x" * 1000,
    ],
)
def test_what_cannot_be_dialled_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["ip4", "1.2.3.4", "tcp", "1", "p2p", ALICE, "p2p-circuit", ""])).map("/".join)
)
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        address = parse(text)
    except UsageError:
        return
    assert parse(str(address)) == address


def test_listen_addresses() -> None:
    assert str(parse_listen("/ip4/0.0.0.0/tcp/0")) == "/ip4/0.0.0.0/tcp/0"
    assert str(parse_listen("/ip6/::/tcp/4001")) == "/ip6/::/tcp/4001"
    for text in ("/dns4/localhost/tcp/1", f"/ip4/127.0.0.1/tcp/1/p2p/{ALICE}"):
        with pytest.raises(UsageError, match="cannot listen"):
            parse_listen(text)


def test_peer_ids() -> None:
    assert check_peer_id(ALICE) == ALICE
    assert check_peer_id(BOB) == BOB
    for text in ("", "x" * 65, ALICE[:-1], base58.b58encode(b"\x12\x20" + bytes(31)).decode(), "peer"):
        with pytest.raises(UsageError, match="not a peer id"):
            check_peer_id(text)


def test_a_strangers_addresses_are_filtered_and_bounded() -> None:
    sent = [
        "/ip4/192.0.2.7/tcp/1",
        f"/ip4/192.0.2.7/tcp/1/p2p/{ALICE}",  # the same, with the id
        f"/ip4/192.0.2.8/tcp/1/p2p/{BOB}",  # leads to somebody else
        "/ip4/192.0.2.9/udp/1/quic-v1",
        "rubbish",
    ]
    assert valid(sent, ALICE) == ["/ip4/192.0.2.7/tcp/1"]
    many = [f"/ip4/192.0.2.7/tcp/{port}" for port in range(1, 1000)]
    assert valid(many, ALICE, limit=5) == many[:5]

    def endless():  # type: ignore[no-untyped-def]
        while True:
            yield "rubbish"

    assert valid(endless(), ALICE) == []


def test_unspecified_addresses_expand_to_interfaces() -> None:
    found = expand([parse_listen("/ip4/0.0.0.0/tcp/4001"), parse_listen("/ip6/::/tcp/4002")], OWN)
    assert [str(address) for address in found] == ["/ip4/192.0.2.7/tcp/4001", "/ip6/fd00::7/tcp/4002"]


def test_loopback_is_announced_only_alone() -> None:
    loopback = parse_listen("/ip4/127.0.0.1/tcp/1")
    assert expand([loopback], OWN) == [loopback]
    assert expand([loopback, parse_listen("/ip4/192.0.2.7/tcp/1")], OWN) == [parse_listen("/ip4/192.0.2.7/tcp/1")]
    assert [str(a) for a in expand([parse_listen("/ip4/0.0.0.0/tcp/1")], OWN[:1])] == ["/ip4/127.0.0.1/tcp/1"]


def test_endpoints_hold_loopback_too() -> None:
    found = endpoints([parse_listen("/ip4/0.0.0.0/tcp/4001"), parse_listen("/ip4/10.0.0.1/tcp/5")], OWN)
    assert found == {("127.0.0.1", 4001), ("192.0.2.7", 4001), ("10.0.0.1", 5)}


def test_this_machine_has_interfaces() -> None:
    assert any(interface.ip.is_loopback for interface in interfaces())


@pytest.mark.parametrize(
    "host", ["a" * 60 + "-", "a" * 64, "my_host.lan", "a..b", ".a", "-a", "a-", "a" * 63 + "." + "b" * 60 + "-", "ä"]
)
def test_hostile_and_unusable_names_are_refused_at_once(host: str) -> None:
    with pytest.raises(UsageError):
        parse(f"/dns4/{host}/tcp/4001")


@pytest.mark.parametrize("host", ["a", "a.b", "a-b.example.org", "a" * 63, "xn--bcher-kva.example"])
def test_usable_names(host: str) -> None:
    assert parse(f"/dns4/{host}/tcp/4001").host == host

from __future__ import annotations

import ipaddress

from p2pnode.net.addresses import parse
from p2pnode.net.observed import Mapping, Observation, group_of, mapping, ranked, ranked_ips


def seen(voter: str, at: str, *, shared: bool = True, inbound: bool = False) -> Observation:
    host, _, port = at.partition(":")
    return Observation(ipaddress.ip_address(voter), parse(f"/ip4/{host}/tcp/{port}"), shared, inbound)


def test_the_majority_of_networks_wins_not_of_peers() -> None:
    liars = [seen(f"9.9.9.{n}", "6.6.6.6:80") for n in range(1, 20)]  # one network
    honest = [seen("8.8.8.8", "5.5.5.5:4747"), seen("7.7.7.7", "5.5.5.5:4747")]
    assert str(ranked([*liars, *honest])[0]) == "/ip4/5.5.5.5/tcp/4747"
    assert ranked_ips([*liars, *honest])[0] == ipaddress.ip_address("5.5.5.5")


def test_ephemeral_ports_count_for_the_ip_only() -> None:
    votes = [seen("8.8.8.8", "5.5.5.5:61234", shared=False)]
    assert ranked(votes) == []
    assert ranked_ips(votes) == [ipaddress.ip_address("5.5.5.5")]


def test_a_view_from_outside_counts_more_than_any_number_of_neighbours() -> None:
    votes = [seen(f"192.168.{n}.1", "192.168.7.7:4747") for n in range(9)] + [seen("8.8.8.8", "5.5.5.5:4747")]
    assert str(ranked(votes)[0]) == "/ip4/5.5.5.5/tcp/4747"


def test_what_a_peer_dialled_is_a_port_that_works() -> None:
    assert len(ranked([seen("8.8.8.8", "5.5.5.5:4747", shared=False, inbound=True)])) == 1


def test_the_kind_of_mapping() -> None:
    same = [seen("8.8.8.8", "5.5.5.5:4747"), seen("9.9.9.9", "5.5.5.5:4747")]
    other = [seen("8.8.8.8", "5.5.5.5:40001"), seen("9.9.9.9", "5.5.5.5:40002")]
    assert mapping([]) is mapping(same[:1]) is Mapping.UNKNOWN
    assert mapping(same) is Mapping.ENDPOINT_INDEPENDENT
    assert mapping(other) is Mapping.ENDPOINT_DEPENDENT
    assert mapping([seen("8.8.8.8", "5.5.5.5:4747"), seen("10.0.0.1", "10.0.0.9:4747")]) is Mapping.UNKNOWN


def test_groups() -> None:
    assert group_of(ipaddress.ip_address("8.8.8.8")) == group_of(ipaddress.ip_address("8.8.8.9"))
    assert group_of(ipaddress.ip_address("8.8.8.8")) != group_of(ipaddress.ip_address("8.8.9.8"))
    assert group_of(ipaddress.ip_address("2001:db8::1")) == group_of(ipaddress.ip_address("2001:db8:0:ff::1"))

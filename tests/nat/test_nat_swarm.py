"""A swarm spread over the public segment, one LAN and two private networks, with its only seed behind a NAT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from swarmlib.content import difference
from swarmlib.crossing import RESERVED_SECONDS, Site, until
from swarmlib.lab import Lab, Nat

pytestmark = [pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
SIZE = 48 * MIB


def test_three_public_three_on_a_lan_and_two_elsewhere(
    lab: Lab, site: Site, original: Callable[[int], Path], tmp_path: Path
) -> None:
    relay = site.node("relay", relay=True)
    lan, seed_nat, other_nat = (
        lab.nat(label, Nat.PORT_RESTRICTED, rate="100mbit") for label in ("lan", "seed-nat", "other-nat")
    )
    seed = site.node("seed", seed_nat, via=[relay], mdns=True)
    public = [site.node(f"public{n}", via=[relay], rate="100mbit", mdns=True) for n in range(3)]
    neighbours = [site.node(f"lan{n}", lan, via=[relay], mdns=True) for n in range(3)]
    other = site.node("other", other_nat, via=[relay], mdns=True)
    fetchers = [*public, *neighbours, other]

    until(seed.reserved, RESERVED_SECONDS, "the seed has a reservation")
    for node in (*neighbours, other):
        until(node.reserved, RESERVED_SECONDS, f"{node.host.label} has a reservation")
    file = original(SIZE)
    image = seed.daemon.run("provide", str(file)).check().json

    before = relay.host.counters()
    fetches = [
        site.begin(node, "fetch", image["link"], "-o", str(tmp_path / f"out-{node.host.label}")) for node in fetchers
    ]
    results = {node.host.label: fetch.wait(300).check().json for node, fetch in zip(fetchers, fetches, strict=True)}
    passed = relay.host.counters() - before

    for node in fetchers:
        assert difference(file, tmp_path / f"out-{node.host.label}") is None
    ids = {node.peer_id: node.host.label for node in [seed, *fetchers]}
    sources = {label: {ids[peer]: size for peer, size in result["from"].items()} for label, result in results.items()}
    lan_labels = {node.host.label for node in neighbours}
    local = sum(size for label in lan_labels for source, size in sources[label].items() if source in lan_labels)
    # The three share one line to the outside and are next to each other. Were all sources alike to them, two of the
    # seven others would give 29 % of it.
    assert local >= 0.4 * 3 * SIZE, f"{local} bytes came from neighbours: {sources}"
    assert lan.counters().received < 2 * SIZE, sources
    received = sum(result["received_bytes"] for result in results.values())
    assert sum(result["relayed_bytes"] for result in results.values()) < 0.1 * received
    assert passed.received < 0.1 * received, sources
    for label, result in results.items():
        assert result["duplicate_bytes"] <= 0.05 * SIZE + 2 * MIB, (label, result)

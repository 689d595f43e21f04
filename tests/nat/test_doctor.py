"""What `doctor` makes of NATs and firewalls: of this node's own, and of a peer's."""

from __future__ import annotations

from typing import Any

import pytest
from swarmlib.crossing import PORT, Node, Site
from swarmlib.lab import Lab, Nat

pytestmark = [pytest.mark.root, pytest.mark.slow]

DOCTOR_SECONDS = 60.0


def doctor(node: Node, *target: str) -> dict[str, Any]:
    done = node.daemon.run("doctor", *target, timeout=DOCTOR_SECONDS)
    row = done.json
    assert done.code == row["exit_code"], done
    return row


def codes(row: dict[str, Any]) -> list[str]:
    return [cause["code"] for cause in row["causes"] if cause["problem"]]


def outcomes(row: dict[str, Any]) -> set[str]:
    return {step["facts"]["outcome"] for step in row["steps"] if step["step"] == "dial-back"}


@pytest.fixture
def world(site: Site) -> list[Node]:
    """Two public nodes that know each other, so that one can dial where the other was asked to."""
    first = site.node("first", relay=True)
    return [first, site.node("second", via=[first])]


@pytest.mark.parametrize("told", [True, False])
def test_a_forwarding_to_the_wrong_port(lab: Lab, site: Site, world: list[Node], told: bool) -> None:
    """Whether the configuration says that there is a forwarding or not."""
    nat = lab.nat("home", Nat.FULL_CONE)
    host = lab.host("a", nat)
    nat.forward(PORT, host, PORT + 1)
    announced = f"/ip4/{nat.address}/tcp/{PORT}"
    a = site.node("a", host=host, via=world, announce=[announced] if told else [])
    row = doctor(a)
    assert outcomes(row) == {"closed"}
    assert codes(row) == ["wrong-port-forwarded"]
    assert nat.address in row["causes"][0]["text"] and str(PORT) in row["causes"][0]["text"]
    nat.forward(PORT, host, PORT)
    assert codes(doctor(a)) == []


def test_a_firewall_that_drops(lab: Lab, site: Site, world: list[Node]) -> None:
    host = lab.host("a")
    host.firewall()
    a = site.node("a", host=host, via=world)
    row = doctor(a)
    assert outcomes(row) == {"silent"}
    assert codes(row) == ["firewall-dropping"]

    outside = site.node("b", via=world[:1])
    row = doctor(outside, f"/ip4/{host.address}/tcp/{PORT}/p2p/{a.peer_id}")
    [dial] = [step for step in row["steps"] if step["step"] == "peer-dial"]
    assert (dial["facts"]["outcome"], dial["mark"]) == ("silent", "FAIL")
    assert dial["ms"] > 1000


def test_a_firewall_that_drops_on_the_way_to_a_peer_others_know(lab: Lab, site: Site, world: list[Node]) -> None:
    """No relay helps: what is left is what others say, and that nothing comes back."""
    host = lab.host("a")
    host.firewall()
    a = site.node("a", host=host, via=world[1:], reachability="public")
    outside = site.node("b", via=world[:1], hole_punching=False)
    row = doctor(outside, a.peer_id)
    assert codes(row)[0] == "firewall-dropping", row


def test_a_firewall_that_refuses(lab: Lab, site: Site, world: list[Node]) -> None:
    host = lab.host("a")
    host.firewall(refuse=True)
    a = site.node("a", host=host, via=world)
    row = doctor(a)
    assert outcomes(row) == {"closed"}
    assert codes(row) == ["firewall-refusing"]


def test_an_ordinary_nat_is_no_problem_where_there_is_a_relay(lab: Lab, site: Site, world: list[Node]) -> None:
    a = site.node("a", lab.nat("home", Nat.PORT_RESTRICTED), via=world)
    row = doctor(a)
    assert (row["exit_code"], codes(row)) == (0, [])
    assert [cause["code"] for cause in row["causes"]] == ["behind-nat"]
    assert any(step["step"] == "relay" and step["mark"] == "ok" for step in row["steps"])

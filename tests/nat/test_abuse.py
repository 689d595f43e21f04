"""A relay under abuse keeps serving its others, within its memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swarmlib.content import difference
from swarmlib.crossing import RESERVED_SECONDS, Site, until
from swarmlib.lab import Lab, Nat
from swarmlib.process import Command, Usage

pytestmark = [pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
HOSTILE = Path(__file__).with_name("hostile.py")
ASKING_HOSTS, ASKED = 4, 250
PER_ADDRESS = 16  # reservations for one IP address, the default limit
CIRCUITS_PER_PEER = 32  # the default limits
CIRCUITS_PER_PAIR = 4
BANDWIDTH = 8_000_000  # bytes/s of the relay, both directions of all circuits together
MEMORY = 400 * MIB  # 1,000 connections are 60 MiB, the process itself about 120; the queues of the circuits are bounded


def told(command: Command) -> dict[str, Any]:
    """The last thing that a hostile peer told; empty if it has told nothing yet."""
    assert command.poll() is None, command.stderr[-2000:]
    lines = command.stdout.splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def test_a_relay_under_abuse_serves_its_others(
    lab: Lab, site: Site, original: Callable[[int], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    limits = {"relay_bandwidth": BANDWIDTH, "relay_circuit_bytes": 16 * MIB}
    relay = site.node("relay", relay=True, **limits)
    address = relay.daemon.addrs[0]

    def begin(label: str, *args: str) -> Command:
        host = lab.host(label)
        command = Command(
            [sys.executable, str(HOSTILE), args[0], address, args[1]], tmp_path / label, prefix=host.prefix
        )
        request.addfinalizer(command.kill)
        return command

    asking = [begin(f"asking{number}", "reserve", str(ASKED)) for number in range(ASKING_HOSTS)]
    until(lambda: all(told(command) for command in asking), 240, "all have asked for a reservation")
    answers = [told(command) for command in asking]
    for answer in answers:
        assert answer["granted"] == PER_ADDRESS, answers
        assert answer["granted"] + answer["refused"] + answer["failed"] == ASKED

    holding = begin("holding", "hold", str(2 * CIRCUITS_PER_PEER))
    flooding = begin("flooding", "flood", "4")
    until(lambda: told(holding), 60, "idle circuits are held")
    assert told(holding)["opened"] == CIRCUITS_PER_PAIR
    until(lambda: told(flooding).get("dials", 0) > 4, 60, "a circuit of the flood was cut at its limit")

    provider, fetcher = (
        site.node(side, lab.nat(f"{side}-nat", Nat.SYMMETRIC), via=[relay]) for side in ("left", "right")
    )
    until(provider.reserved, RESERVED_SECONDS, "an honest peer has a reservation")
    file = original(12 * MIB)  # less than what its own circuit may carry
    image = provider.daemon.run("provide", str(file)).check().json
    flooded = told(flooding)
    result = fetcher.daemon.run("fetch", image["link"], "-o", str(tmp_path / "out"), timeout=120).check().json
    assert difference(file, tmp_path / "out") is None
    # One circuit beside four that take all they can get has a fifth of the bandwidth.
    share = result["bytes"] / result["seconds"] / BANDWIDTH
    assert share > 0.75 / 5, (share, flooded, told(flooding))
    assert told(flooding)["passed"] > flooded.get("passed", 0), "the flood was not going on meanwhile"
    assert Usage.of(relay.daemon.pid).peak_bytes < MEMORY
    assert relay.status()["peer_id"] == relay.peer_id  # and it answers

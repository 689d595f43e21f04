"""Two real nodes behind NATs that know nothing but a public relay, and one image from the one to the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from swarmlib.content import difference, parse_rate
from swarmlib.crossing import POLL, RESERVED_SECONDS, Crossing, Node, Sample, Site, until, watch
from swarmlib.lab import Lab, Nat
from swarmlib.process import Command, SwarmError

pytestmark = [pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
PUNCH_SECONDS = 15.0  # from the first relayed connection: three rounds of the protocol, with their pauses
CHATTER = 16_000  # bytes/s: identify, pings, look-ups and renewals that go to a relay which carries no image

Original = Callable[[int], Path]


def provided(node: Node, original: Path) -> dict[str, Any]:
    """Provide a file on a private node once it can be reached through a relay."""
    until(node.reserved, RESERVED_SECONDS, f"a reservation; {node.daemon.log[-1500:]}")
    return node.daemon.run("provide", str(original)).check().json


def crossed(
    site: Site,
    fetcher: Node,
    provider: Node,
    image: dict[str, Any],
    original: Path,
    relays: Sequence[Node],
    *,
    seconds: float = 180,
    at: Callable[[Sample, Command], None] = lambda sample, fetch: None,
) -> Crossing:
    """Fetch, and check that what arrived is the original."""
    out = site.directory / "out"
    fetch = site.begin(fetcher, "fetch", image["link"], "-o", str(out), "--timeout", "120")
    hosts = [relay.host for relay in relays]
    crossing = watch(
        fetch, fetcher, provider, image["image"], hosts, seconds=seconds, at=lambda sample: at(sample, fetch)
    )
    assert crossing.result["path"] == str(out)
    assert difference(original, out) is None
    assert crossing.result["duplicate_bytes"] <= 2 * MIB  # nobody pays for two copies because a path changed
    assert crossing.result["banned"] == []
    return crossing


def pair(site: Site, kind: Nat, relays: Sequence[Node], *, rate: str | None = None) -> tuple[Node, Node]:
    left, right = (
        site.node(label, site.lab.nat(f"{label}-nat", kind), via=relays, rate=rate) for label in ("left", "right")
    )
    return left, right


def test_an_image_moves_to_a_direct_connection(lab: Lab, site: Site, original: Original) -> None:
    """The two cannot reach each other at first, so it is in the middle of the fetch that hole punching succeeds."""
    size = 256 * MIB
    relay = site.node("relay", relay=True)
    left, right = lab.nat("left", Nat.PORT_RESTRICTED), lab.nat("right", Nat.PORT_RESTRICTED)
    left.block(right)
    provider = site.node("provider", left, via=[relay], rate="100mbit")
    file = original(size)
    image = provided(provider, file)
    fetcher = site.node("fetcher", right, via=[relay], rate="100mbit")

    def unblock(sample: Sample, _: Command) -> None:
        if 2 < sample.seconds < 3:
            left.block()

    crossing = crossed(site, fetcher, provider, image, file, [relay], at=unblock)
    assert crossing.path == "direct"
    assert crossing.direct_after is not None
    assert 2 < crossing.direct_after < PUNCH_SECONDS
    after = crossing.relayed_after_move
    assert after is not None, "the fetch was over before anything could be seen"
    assert after < CHATTER * (crossing.samples[-1].seconds - crossing.direct_after)
    assert crossing.longest_pause < 2
    # Its own account of what came through the relay is what the relay saw, framing and what was under way aside.
    result = crossing.result
    assert 0 < result["relayed_bytes"] < result["received_bytes"]
    assert result["relayed_bytes"] <= crossing.relayed() < 1.2 * result["relayed_bytes"] + 2 * MIB


@pytest.mark.parametrize(
    ("left", "right", "refuse", "tries", "enough"),
    [
        pytest.param([Nat.PORT_RESTRICTED], [Nat.PORT_RESTRICTED], False, 10, 9, id="port restricted"),
        pytest.param([Nat.PORT_RESTRICTED], [Nat.PORT_RESTRICTED], True, 10, 9, id="port restricted that refuse"),
        pytest.param([Nat.FULL_CONE], [Nat.PORT_RESTRICTED], False, 2, 2, id="full cone to port restricted"),
        pytest.param([Nat.FULL_CONE], [Nat.SYMMETRIC], False, 2, 2, id="full cone to symmetric"),
        pytest.param([Nat.SYMMETRIC], [Nat.FULL_CONE], False, 2, 2, id="symmetric to full cone"),
        pytest.param([Nat.PORT_RESTRICTED], [], False, 2, 2, id="port restricted to none"),
        pytest.param([Nat.SYMMETRIC], [], False, 2, 2, id="symmetric to none"),
        pytest.param([Nat.PORT_RESTRICTED] * 2, [Nat.PORT_RESTRICTED], False, 2, 2, id="double"),
    ],
)
def test_where_the_nats_allow_it_the_connection_becomes_direct(
    lab: Lab,
    site: Site,
    original: Original,
    tmp_path: Path,
    left: list[Nat],
    right: list[Nat],
    refuse: bool,
    tries: int,
    enough: int,
) -> None:
    """Provider on the left, fetcher on the right; new nodes on new hosts behind new NATs for each try."""
    relay = site.node("relay", relay=True)
    file = original(4 * MIB)
    failures = []
    for number in range(tries):
        with Site(lab, tmp_path / f"try{number}") as attempt:
            nodes = []
            for side, kinds in (("left", left), ("right", right)):
                behind = None
                for kind in kinds:
                    # Only SYNs that cross on their way are not refused: there has to be a way.
                    behind = lab.nat(f"{side}-nat", kind, behind=behind, refuse=refuse, delay=0.0 if behind else 0.02)
                nodes.append(attempt.node(side, behind, via=[relay]))
            provider, fetcher = nodes
            image = provided(provider, file)
            crossed(attempt, fetcher, provider, image, file, [relay])
            try:
                until(lambda: "direct" in fetcher.paths(provider.peer_id), PUNCH_SECONDS, "direct")  # noqa: B023
            except SwarmError:
                failures.append(f"try {number}:\n{fetcher.daemon.log[-1500:]}\n--\n{provider.daemon.log[-1500:]}")
    assert tries - len(failures) >= enough, "\n".join(failures)


def test_symmetric_nats_have_the_relays_whole_line(site: Site, original: Original) -> None:
    rate = "50mbit"
    relay = site.node("relay", relay=True, rate=rate)
    provider, fetcher = pair(site, Nat.SYMMETRIC, [relay])
    file = original(96 * MIB)
    image = provided(provider, file)
    crossing = crossed(site, fetcher, provider, image, file, [relay])
    assert crossing.path == "relayed"
    assert crossing.direct_after is None
    assert crossing.result["relayed_bytes"] == crossing.result["received_bytes"]
    assert crossing.rate >= 0.8 * parse_rate(rate)


@pytest.mark.parametrize(
    "limits", [{"relay_circuit_bytes": 8 * MIB}, {"relay_circuit_seconds": 2}], ids=["bytes", "seconds"]
)
def test_circuits_that_end_are_renewed_without_losing_a_chunk(
    site: Site, original: Original, limits: dict[str, int]
) -> None:
    """Eight seconds' worth of an image through circuits of an eighth of that."""
    relay = site.node("relay", relay=True, rate="50mbit", **limits)
    provider, fetcher = pair(site, Nat.SYMMETRIC, [relay])
    file = original(48 * MIB)
    image = provided(provider, file)
    crossing = crossed(site, fetcher, provider, image, file, [relay])
    assert crossing.path == "relayed"
    assert crossing.rate >= 0.5 * parse_rate("50mbit")


def test_a_second_relay_takes_over(site: Site, original: Original) -> None:
    relays = [site.node(f"relay{number}", relay=True, rate="50mbit") for number in range(2)]
    provider, fetcher = pair(site, Nat.SYMMETRIC, relays)
    file = original(64 * MIB)
    until(
        lambda: all(
            any(f"/p2p/{relay.peer_id}/p2p-circuit" in addr for addr in provider.status()["addrs"]) for relay in relays
        ),
        RESERVED_SECONDS,
        f"reservations on both relays: {provider.status()['addrs']}",
    )
    image = provided(provider, file)
    killed: list[float] = []

    def kill_at_half(sample: Sample, _: Command) -> None:
        if not killed and sample.chunks >= image["chunks"] // 2:
            carrying = max(range(2), key=lambda number: sample.relays[number].received)
            relays[carrying].daemon.kill()
            killed.append(sample.seconds)

    crossing = crossed(site, fetcher, provider, image, file, relays, at=kill_at_half)
    assert killed, "the fetch was over too soon"
    assert crossing.path == "relayed"
    assert crossing.longest_pause <= 10


def test_without_a_second_relay_it_waits_and_goes_on(site: Site, original: Original) -> None:
    relay = site.node("relay", relay=True, rate="50mbit")
    provider, fetcher = pair(site, Nat.SYMMETRIC, [relay])
    file = original(48 * MIB)
    image = provided(provider, file)
    killed: list[Sample] = []
    returned: list[Sample] = []
    words: list[str] = []

    def kill_at_half_and_return_after_12_seconds(sample: Sample, fetch: Command) -> None:
        if not killed and sample.chunks >= image["chunks"] // 2:
            relay.daemon.kill()
            killed.append(sample)
        elif killed and not returned and sample.seconds > killed[0].seconds + 12:
            words.append(fetch.stderr[-500:])
            relay.daemon.start()
            relay.daemon.ready()
            returned.append(sample)

    crossing = crossed(site, fetcher, provider, image, file, [relay], at=kill_at_half_and_return_after_12_seconds)
    assert returned, "the fetch was over although the only way was gone"
    assert "waiting" in words[0]
    waited = [s.chunks for s in crossing.samples if killed[0].seconds + 1 < s.seconds <= returned[0].seconds]
    assert max(waited) == min(waited), "chunks arrived while the only relay was dead"
    first = next(s.seconds for s in crossing.samples if s.chunks > waited[-1])
    assert first - returned[0].seconds < 30 + POLL  # the time within which a relay's restart has to be noticed

"""From steps to causes, without any network."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.diagnosis.causes import causes
from p2pnode.diagnosis.model import Cause, Code, Kind, Mark, Report, Step

PEER = "12D3KooWPeer"


def dial_back(outcome: str, *, port: int = 4747, named: bool = False, nat: bool = True, voter: str = "v") -> Step:
    facts = {"outcome": outcome, "ip": "5.5.5.5", "port": port, "named": named, "nat": nat, "voter": voter}
    return Step(Kind.DIAL_BACK, Mark.OK if outcome == "reached" else Mark.FAIL, outcome, facts=facts)


def peer_step(kind: Kind, mark: Mark = Mark.FAIL, **facts: Any) -> Step:
    return Step(kind, mark, "words", peer=PEER, facts=facts)


def dial(outcome: str, addr: str = "/ip4/5.5.5.5/tcp/4747", elsewhere: bool = False) -> Step:
    return peer_step(Kind.PEER_DIAL, outcome=outcome, addr=addr, answered=None, elsewhere=elsewhere)


def relay(outcome: str) -> Step:
    return peer_step(Kind.PEER_RELAY, outcome=outcome, relay="12D3KooWRelay", status=None)


def connected(path: str | None) -> Step:
    return peer_step(Kind.PEER_CONNECT, path=path)


def looked_up(named_by: int) -> Step:
    return peer_step(Kind.PEER_LOOKUP, found=named_by, named_by=named_by, asked=5, answered=5)


RELAYED = Step(Kind.RELAYS, Mark.OK, "2 reservations", facts={"held": 2, "needed": True})
NO_RELAY = Step(Kind.RELAYS, Mark.FAIL, "none", facts={"held": 0, "needed": True})
PRIVATE = Step(Kind.REACHABILITY, Mark.WARN, "private", facts={"state": "private"})


def codes(steps: list[Step], problem: bool = True) -> list[Code]:
    return [cause.code for cause in causes(steps) if cause.problem is problem]


@pytest.mark.parametrize(
    ("steps", "problems", "others"),
    [
        ([], [], []),
        ([dial_back("reached")], [], []),
        ([dial_back("closed")], [Code.WRONG_PORT_FORWARDED], []),
        ([dial_back("closed", named=True)], [Code.WRONG_PORT_FORWARDED], []),
        ([dial_back("stranger", nat=False)], [Code.WRONG_PORT_FORWARDED], []),
        ([dial_back("closed", nat=False)], [Code.FIREWALL_REFUSING], []),
        ([dial_back("silent", nat=False)], [Code.FIREWALL_DROPPING], []),
        ([dial_back("silent", named=True)], [Code.FIREWALL_DROPPING], []),
        ([dial_back("silent"), RELAYED], [], [Code.BEHIND_NAT]),  # what relays are for
        ([dial_back("silent"), PRIVATE, NO_RELAY], [Code.BEHIND_NAT, Code.NO_RELAY], []),
        (
            [dial_back("closed"), dial_back("reached", port=4848)],
            [],
            [Code.WRONG_PORT_FORWARDED],
        ),  # the other one works
        ([dial_back("closed", voter="a"), dial_back("closed", voter="b")], [Code.WRONG_PORT_FORWARDED], []),
        ([dial_back("unreachable")], [], []),  # the voter's own trouble
    ],
)
def test_reachability(steps: list[Step], problems: list[Code], others: list[Code]) -> None:
    assert (codes(steps), codes(steps, problem=False)) == (problems, others)


@pytest.mark.parametrize(
    ("steps", "problems"),
    [
        ([connected(None)], [Code.PEER_UNKNOWN]),
        ([dial("refused"), connected(None)], [Code.PEER_GONE]),
        ([dial("unreachable"), connected(None)], [Code.PEER_GONE]),
        ([dial("silent"), connected(None)], [Code.PEER_GONE]),  # nobody hears from it
        ([looked_up(2), dial("silent"), connected(None)], [Code.FIREWALL_DROPPING, Code.PEER_GONE]),
        ([dial("another-peer"), connected(None)], [Code.WRONG_PEER]),
        ([dial("foreign"), connected(None)], [Code.WRONG_PORT_FORWARDED]),
        (
            [dial("refused"), dial("silent", "/ip4/10.1.1.1/tcp/1", True), looked_up(2), connected(None)],
            [Code.PEER_GONE],
        ),
        ([dial("answered"), connected(None)], [Code.PEER_UNREACHABLE]),
        ([relay("failed"), connected(None)], [Code.PEER_UNREACHABLE]),
        ([relay("full"), connected(None)], [Code.RELAY_FULL]),
        ([relay("absent"), connected(None)], [Code.PEER_GONE]),
        ([relay("unreachable"), connected(None)], [Code.RELAY_UNREACHABLE]),
        ([dial("silent"), relay("full"), connected(None)], [Code.RELAY_FULL, Code.FIREWALL_DROPPING]),
        ([dial("refused"), connected("direct")], []),  # an old address beside one that works
        (
            [connected("direct"), peer_step(Kind.PEER_PROTOCOLS, exchange=["/p2pnode/exchange/2"])],
            [Code.PROTOCOL_MISMATCH],
        ),
        ([connected("direct"), peer_step(Kind.PEER_CLOCK, offset=90.0)], [Code.CLOCK_SKEW]),
    ],
)
def test_a_peer(steps: list[Step], problems: list[Code]) -> None:
    assert codes(steps) == problems


def image(*about: Step, asked: int = 5, coverage: Mark | None = None) -> list[Step]:
    providers = len({step.peer for step in about})
    facts = {"found": providers, "link": 0, "asked": asked}
    found = [
        Step(Kind.IMAGE_HERE, Mark.OK, "no", facts={"complete": False}),
        Step(Kind.PROVIDERS, Mark.OK, "", facts=facts),
    ]
    found += about
    if coverage is not None:
        found.append(Step(Kind.COVERAGE, coverage, "9 of 10", facts={"chunks": 10, "reachable": 9}))
    return found


RECORDED = peer_step(Kind.PROVIDER, Mark.OK, recorded=True, link=False, named_by=1)
LINKED = peer_step(Kind.PROVIDER, Mark.OK, recorded=False, link=True, named_by=0)


@pytest.mark.parametrize(
    ("steps", "problems", "others"),
    [
        (image(), [Code.NO_PROVIDERS], []),
        (image(RECORDED, connected(None), dial("refused")), [Code.STALE_RECORD, Code.PEER_GONE], []),
        (image(LINKED, connected(None), dial("refused")), [Code.PEER_GONE], []),  # no record, so none is stale
        (
            image(RECORDED, connected(None), dial("refused"), coverage=Mark.OK),
            [],
            [Code.STALE_RECORD, Code.PEER_GONE],
        ),
        (
            image(RECORDED, connected("direct"), peer_step(Kind.AVAILABILITY, known=False)),
            [Code.STALE_RECORD],
            [],
        ),
        (image(RECORDED, connected("direct"), peer_step(Kind.AVAILABILITY, known=None)), [Code.PROVIDERS_SILENT], []),
        (
            image(RECORDED, connected("direct"), peer_step(Kind.AVAILABILITY, known=True), coverage=Mark.FAIL),
            [Code.INCOMPLETE],
            [],
        ),
    ],
)
def test_an_image(steps: list[Step], problems: list[Code], others: list[Code]) -> None:
    assert (codes(steps), codes(steps, problem=False)) == (problems, others)


def test_the_exit_code_is_that_of_the_first_problem() -> None:
    steps = image(RECORDED, connected(None), dial("refused"))
    assert Report("x", tuple(steps), tuple(causes(steps)), 0.1).exit_code == 3
    assert Report("x", (), (Cause(Code.BEHIND_NAT, "", "", problem=False),), 0.1).exit_code == 0
    row = Report("x", tuple(steps), tuple(causes(steps)), 0.1).to_dict()
    assert not row["ok"] and row["causes"][0]["code"] == "provider-record-stale"


STEPS = st.sampled_from(
    [
        *(dial_back(each, nat=nat) for each in ("reached", "silent", "closed", "stranger") for nat in (True, False)),
        *(dial(each) for each in ("answered", "refused", "silent", "unreachable", "foreign", "another-peer")),
        *(relay(each) for each in ("answered", "full", "absent", "refused", "failed", "unreachable")),
        *(connected(each) for each in (None, "direct", "relayed")),
        looked_up(0),
        looked_up(3),
        RELAYED,
        NO_RELAY,
        PRIVATE,
    ]
)


@given(st.lists(STEPS, max_size=12))
def test_every_cause_says_what_to_do_and_none_comes_twice(steps: list[Step]) -> None:
    found = causes(steps)
    assert len(set(found)) == len(found)
    assert [cause.problem for cause in found] == sorted((cause.problem for cause in found), reverse=True)
    for cause in found:
        assert cause.text.endswith(".") and cause.advice.endswith(".") and "None" not in cause.advice
        assert cause.exit_code in (3, 5, 6, 7)


@given(st.lists(STEPS, max_size=8))
def test_a_connection_that_came_about_leaves_nothing_to_mend_at_the_peer(steps: list[Step]) -> None:
    about = [step for step in steps if step.kind in (Kind.PEER_DIAL, Kind.PEER_RELAY, Kind.PEER_LOOKUP)]
    assert codes([*about, connected("direct")]) == []
    assert codes([*about, connected(None)]) != []

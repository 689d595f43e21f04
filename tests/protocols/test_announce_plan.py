import math

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocols.announce.plan import BACKOFF_MAX, BACKOFF_MIN, JOIN_DELAY, MAX_ROUND, SPREAD_DELAY, Plan, Round
from tests.protocols.test_announce_messages import key

TTL = 1800.0
PEERS = ("a", "b", "c", "d")


def play(plan: Plan, now: float, chosen: tuple[str, ...], acking: tuple[str, ...]) -> Round:
    """One round in which all of `chosen` are responsible for every key and only `acking` answer."""
    round_ = plan.take(now)
    assert round_ is not None
    for each in round_.keys:
        for peer in plan.assign(round_, [each], chosen):
            if peer in acking:
                plan.acknowledged(round_, peer, [each])
    plan.finish(round_, now, 1.0)
    return round_


def test_acknowledged_keys_are_due_at_half_their_life() -> None:
    plan = Plan(4, TTL)
    assert plan.next_due() == math.inf
    plan.provide([key(1), key(2), key(1)])
    assert (len(plan), plan.pending, plan.fresh) == (2, 2, 2)
    assert plan.next_due() == -math.inf
    assert play(plan, 10, PEERS, PEERS).keys == [key(1), key(2)]
    assert (plan.pending, plan.fresh) == (0, 0)
    assert plan.next_due() == 10 + TTL / 2
    assert plan.take(500) is None
    renewal = play(plan, 10 + TTL / 2, PEERS, PEERS)
    assert renewal.renew
    assert plan.next_due() == 10 + TTL


def test_failures_back_off_and_only_those_without_the_record_are_told_again() -> None:
    plan = Plan(4, TTL)
    plan.provide([key(1)])
    play(plan, 0, PEERS, ("a",))
    assert plan.pending == 0
    assert plan.next_due() == BACKOFF_MIN
    round_ = plan.take(BACKOFF_MIN)
    assert round_ is not None
    assert plan.assign(round_, [key(1)], PEERS) == {"b": [key(1)], "c": [key(1)], "d": [key(1)]}
    plan.acknowledged(round_, "b", [key(1)])
    plan.finish(round_, BACKOFF_MIN, 1.0)
    assert plan.next_due() == TTL / 2  # half of them is enough until then


def test_the_back_off_doubles_up_to_its_end() -> None:
    plan = Plan(4, TTL)
    plan.provide([key(1)])
    pauses, now = [], 0.0
    for _ in range(30):
        play(plan, now, (), ())
        pauses.append(plan.next_due() - now)
        now = plan.next_due()
    assert pauses[:3] == [BACKOFF_MIN, 2 * BACKOFF_MIN, 4 * BACKOFF_MIN]
    assert max(pauses) <= BACKOFF_MAX
    assert plan.pending == 1


def test_a_growing_network_gets_more_copies_soon() -> None:
    plan = Plan(4, TTL)
    plan.provide([key(1)])
    play(plan, 0, ("a",), ("a",))
    assert plan.next_due() == TTL / 2
    assert plan.peer_joined(100)
    assert not plan.peer_joined(100)
    assert plan.next_due() == 100 + SPREAD_DELAY
    round_ = plan.take(110)
    assert round_ is not None
    assert plan.assign(round_, [key(1)], ("a", "b")) == {"b": [key(1)]}
    plan.acknowledged(round_, "b", [key(1)])
    plan.peer_joined(110.5)  # while the round was under way
    plan.finish(round_, 111, 1.0)
    assert plan.next_due() == 111 + SPREAD_DELAY
    play(plan, 121, PEERS, PEERS)
    assert plan.next_due() == TTL / 2  # the first record's renewal is not put off
    assert not plan.peer_joined(122)


def test_what_nobody_keeps_is_announced_to_a_new_peer_at_once() -> None:
    plan = Plan(4, TTL)
    plan.provide([key(1)])
    for _ in range(4):
        play(plan, plan.next_due() if plan.next_due() > 0 else 0, (), ())
    assert plan.next_due() > 20
    assert plan.peer_joined(15)
    assert plan.next_due() == 15 + JOIN_DELAY


def test_each_peer_is_told_only_what_it_does_not_keep() -> None:
    plan = Plan(4, TTL)
    plan.provide([key(1), key(2), key(3)])
    round_ = plan.take(0)
    assert round_ is not None
    assert plan.assign(round_, round_.keys, ("a", "b")) == {peer: [key(1), key(2), key(3)] for peer in "ab"}
    plan.acknowledged(round_, "a", [key(1), key(2)])
    plan.acknowledged(round_, "b", [key(1)])
    plan.finish(round_, 0, 1.0)
    plan.peer_joined(0)
    round_ = plan.take(SPREAD_DELAY)
    assert round_ is not None
    told = plan.assign(round_, round_.keys, ("a", "b", "c"))
    assert {peer: set(keys) for peer, keys in told.items()} == {
        "a": {key(3)},
        "b": {key(2), key(3)},
        "c": {key(1), key(2), key(3)},
    }


def test_what_was_withdrawn_during_a_round_is_reported_by_its_acknowledgement() -> None:
    plan = Plan(4, TTL)
    plan.provide([key(1), key(2)])
    round_ = plan.take(0)
    assert round_ is not None
    plan.assign(round_, round_.keys, PEERS)
    assert plan.withdraw([key(1)]) == {}
    assert plan.acknowledged(round_, "a", [key(1), key(2)]) == [key(1)]
    assert plan.withdraw([key(2)]) == {"a": [key(2)]}


def test_rounds_are_bounded_and_renewals_near_each_other_share_one() -> None:
    plan = Plan(1, TTL)
    plan.provide([b"%032d" % number for number in range(MAX_ROUND + 5)])
    sizes = [len(play(plan, now, ("a",), ("a",)).keys) for now in (0, 1)]
    assert sizes == [MAX_ROUND, 5]
    plan.provide([key(1)])
    play(plan, 2, ("a",), ("a",))
    assert len(play(plan, TTL / 2, ("a",), ("a",)).keys) == MAX_ROUND
    assert len(play(plan, TTL / 2 + 1, ("a",), ("a",)).keys) == 6


def test_clearing_names_every_holder() -> None:
    plan = Plan(4, TTL)
    plan.provide([key(1), key(2)])
    play(plan, 0, PEERS, ("a", "c"))
    assert plan.clear() == {"a", "c"}
    assert (len(plan), plan.pending, plan.next_due()) == (0, 0, math.inf)


class PlanMachine(RuleBasedStateMachine):
    """Whatever happens, every key is announced by exactly one of: fresh, a round under way, a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = Plan(3, TTL)
        self.mine: set[bytes] = set()
        self.rounds: list[Round] = []
        self.now = 0.0

    @rule(numbers=st.lists(st.integers(0, 9)))
    def provide(self, numbers: list[int]) -> None:
        self.plan.provide([key(number) for number in numbers])
        self.mine |= {key(number) for number in numbers}

    @rule(numbers=st.lists(st.integers(0, 9)))
    def withdraw(self, numbers: list[int]) -> None:
        held = self.plan.withdraw([key(number) for number in numbers])
        assert {each for keys in held.values() for each in keys} <= self.mine
        self.mine -= {key(number) for number in numbers}

    @rule()
    def take(self) -> None:
        round_ = self.plan.take(self.now)
        if round_ is not None:
            self.rounds.append(round_)

    @precondition(lambda self: self.rounds)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        round_ = self.rounds.pop(data.draw(st.integers(0, len(self.rounds) - 1)))
        middle = data.draw(st.integers(0, len(round_.keys)))
        for part in (round_.keys[:middle], round_.keys[middle:]):
            chosen = data.draw(st.lists(st.sampled_from(PEERS), unique=True))
            for peer, told in self.plan.assign(round_, part, chosen).items():
                assert peer in chosen and set(told) <= set(part)
                self.plan.acknowledged(round_, peer, told[: data.draw(st.integers(0, len(told)))])
        self.plan.finish(round_, self.now, 1.0)

    @rule(seconds=st.integers(0, 1000))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def join(self) -> None:
        self.plan.peer_joined(self.now)

    @invariant()
    def every_key_has_one_owner(self) -> None:
        plan = self.plan
        assert set(plan._keys) == self.mine
        assert plan.pending == sum(not own.holders for own in plan._keys.values())
        owned = list(plan._fresh)
        for owner in [*plan._batches, *self.rounds]:
            owned += {each for each in owner.keys if each in plan._keys and plan._keys[each].owner is owner}
        assert sorted(owned) == sorted(self.mine)
        if self.mine and not self.rounds:
            assert plan.next_due() < math.inf


TestPlan = PlanMachine.TestCase

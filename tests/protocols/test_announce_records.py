from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protocols.announce.messages import PeerInfo
from protocols.announce.records import BAN, MAX_STRIKES, Intake, RecordLimits, RecordStore, TokenBucket
from tests.protocols.test_announce_messages import key

A, B, C = PeerInfo("a", ("/a",)), PeerInfo("b", ("/b",)), PeerInfo("c", ())


def test_records_live_until_their_end_and_are_renewed() -> None:
    store = RecordStore()
    assert store.add(A, [key(1), key(2)], 60, now=0) == 2
    assert store.add(A, [key(2)], 60, now=30) == 1
    assert len(store) == 2
    assert store.providers(key(1), 59.9) == [A]
    assert store.providers(key(1), 60) == []  # not handed out even before it is swept
    assert store.expire(60) == 1
    assert store.providers(key(2), 89) == [A]
    assert store.expire(90) == 1
    assert (len(store), store.senders) == (0, 0)


def test_a_ttl_is_at_most_half_an_hour() -> None:
    store = RecordStore()
    store.add(A, [key(1)], 10**9, now=0)
    assert store.providers(key(1), 1799) == [A]
    assert store.providers(key(1), 1800) == []


def test_a_sweep_is_bounded_and_finishes_later() -> None:
    store = RecordStore()
    store.add(A, [key(number) for number in range(50)], 60, now=0)
    store.add(B, [key(number) for number in range(50)], 60, now=0)
    dropped = [store.expire(60, at_most=30) for _ in range(4)]
    assert dropped == [30, 30, 30, 10]
    assert store.senders == 0


def test_addresses_are_those_of_the_last_word() -> None:
    store = RecordStore()
    store.add(A, [key(1)], 60, now=0)
    store.set_addrs("a", ("/new",))
    store.set_addrs("nobody", ("/x",))
    assert store.providers(key(1), 1) == [PeerInfo("a", ("/new",))]
    assert store.senders == 1


def test_withdrawing_takes_only_the_senders_own() -> None:
    store = RecordStore()
    for info in (A, B, C):
        store.add(info, [key(1), key(2)], 60, now=0)
    assert store.remove("b", [key(1), key(9)]) == 1
    assert {info.peer for info in store.providers(key(1), 1)} == {"a", "c"}
    assert store.remove("c", None) == 2
    assert store.remove("stranger", None) == 0
    assert store.providers(key(1), 1) == [A]
    assert [info.peer for info in store.providers(key(2), 1)] == ["a", "b"]


def test_a_sender_has_a_limit() -> None:
    store = RecordStore(RecordLimits(per_sender=3))
    assert store.add(A, [key(number) for number in range(5)], 60, now=0) == 3
    assert store.add(A, [key(0)], 60, now=1) == 1  # renewing is always possible
    assert store.add(B, [key(7)], 60, now=1) == 1


def test_a_full_store_takes_room_from_whoever_has_most() -> None:
    store = RecordStore(RecordLimits(per_sender=100, total=100))
    assert store.add(A, [key(number) for number in range(100)], 60, now=0) == 100
    assert store.add(B, [key(number) for number in range(200, 300)], 60, now=0) == 50
    assert store.add(B, [key(400)], 60, now=0) == 0
    assert len(store) == 100
    assert store.add(C, [key(500)], 60, now=0) == 1
    assert len(store) == 100


def test_a_popular_key_keeps_the_newest_providers() -> None:
    store = RecordStore(RecordLimits(per_key=4))
    for number in range(10):
        store.add(PeerInfo(f"p{number}"), [key(1)], 60, now=number)
    assert {info.peer for info in store.providers(key(1), 10)} == {"p6", "p7", "p8", "p9"}
    assert len(store) == 4
    assert store.senders == 4


def test_askers_see_different_providers_of_a_popular_key() -> None:
    store = RecordStore()
    for number in range(30):
        store.add(PeerInfo(f"p{number}"), [key(1)], 60, now=0)
    seen = [tuple(info.peer for info in store.providers(key(1), 1, offset=offset)) for offset in range(30)]
    assert all(len(set(peers)) == 20 for peers in seen)
    assert len({peers[0] for peers in seen}) == 30


def test_the_number_of_senders_has_a_limit() -> None:
    store = RecordStore(RecordLimits(senders=2))
    assert [store.add(info, [key(1)], 60, now=0) for info in (A, B, C)] == [1, 1, 0]


class StoreMachine(RuleBasedStateMachine):
    """The store against a plain set of (sender, key, expiry), as long as the limits do not bite; and when they do."""

    @initialize(total=st.sampled_from([8, 1000]))
    def begin(self, total: int) -> None:
        self.total = total
        self.store = RecordStore(RecordLimits(per_sender=6, total=total, per_key=3))
        self.model: dict[tuple[str, bytes], float] = {}
        self.now = 0.0

    @rule(sender=st.sampled_from("abcde"), numbers=st.lists(st.integers(0, 7), max_size=6), ttl=st.integers(1, 50))
    def add(self, sender: str, numbers: list[int], ttl: int) -> None:
        wanted = [key(number) for number in numbers]
        accepted = self.store.add(PeerInfo(sender), wanted, ttl, self.now)
        assert 0 <= accepted <= len(wanted)
        for taken in wanted[:accepted]:
            self.model[sender, taken] = self.now + ttl

    @rule(sender=st.sampled_from("abcde"), numbers=st.none() | st.lists(st.integers(0, 7), max_size=4))
    def remove(self, sender: str, numbers: list[int] | None) -> None:
        gone = [key(number) for number in (range(8) if numbers is None else numbers)]
        self.store.remove(sender, None if numbers is None else gone)
        for each in gone:
            self.model.pop((sender, each), None)

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.store.expire(self.now)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        per_sender: dict[str, int] = {}
        live = 0
        for number in range(8):
            providers = self.store.providers(key(number), self.now)
            assert len(providers) <= 3
            for info in providers:
                # Limits may have displaced records, but never made any up or kept any too long.
                assert self.model[info.peer, key(number)] > self.now
                per_sender[info.peer] = per_sender.get(info.peer, 0) + 1
            live += len(providers)
        assert all(count <= 6 for count in per_sender.values())
        assert live <= len(self.store) <= self.total


TestStore = StoreMachine.TestCase


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 5000)), max_size=50))
def test_a_bucket_never_gives_more_than_its_rate_and_burst(steps: list[tuple[float, int]]) -> None:
    bucket = TokenBucket(rate=1000, burst=2000, now=0)
    now, taken, largest = 0.0, 0, 0
    for pause, amount in steps:
        now += pause
        if bucket.delay(now) == 0:
            bucket.take(amount, now)
            taken += amount
            largest = max(largest, amount)
        else:
            assert bucket.delay(now + bucket.delay(now)) == 0
    assert taken <= 2000 + 1000 * now + largest


def test_who_keeps_sending_is_banned_for_a_time() -> None:
    intake = Intake(rate=1000, burst=1000)
    assert intake.admit("a", 5000, now=0) == 0
    wait = intake.admit("a", 10, now=0)
    assert 4 <= wait < 4.1
    assert intake.admit("b", 10, now=0) == 0
    for _ in range(MAX_STRIKES):
        assert not intake.banned("a", 0)
        intake.admit("a", 10, now=0)
        if intake.banned("a", 0):
            break
    assert intake.banned("a", BAN - 1)
    intake.prune(BAN - 1)
    assert intake.banned("a", BAN - 1)
    assert not intake.banned("a", BAN)
    assert intake.admit("a", 10, BAN) == 0


def test_answers_are_charged_too() -> None:
    intake = Intake(rate=1000, burst=1000)
    assert intake.admit("a", 10, now=0) == 0
    intake.charge("a", 10_000, now=0)
    assert intake.admit("a", 10, now=0) > 9

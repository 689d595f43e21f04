from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocols.relay
from protocols.relay import FairBandwidth, Granted, Opened, Refused, RelayLimits, RelayTable, Status


def opened(answer: Opened | Refused) -> Opened:
    assert isinstance(answer, Opened), answer
    return answer


def refused(answer: Granted | Opened | Refused | None) -> Status:
    assert isinstance(answer, Refused), answer
    assert answer.reason
    return answer.status


def table(*reserved: str, **limits: float) -> RelayTable:
    result = RelayTable(RelayLimits(**limits))  # type: ignore[arg-type]
    for number, peer in enumerate(reserved):
        assert isinstance(result.reserve(peer, f"10.{number}.0.1", 0.0), Granted)
    return result


def test_it_is_sans_io() -> None:
    tree = ast.parse(Path(protocols.relay.__file__).read_text())
    imported = {
        name.split(".")[0]
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else [statement.module or ""]
        )
    }
    assert not imported & {"p2pnode", "trio", "socket", "os", "pathlib", "time", "random", "libp2p"}


def test_the_codes_are_those_of_the_specification() -> None:
    from libp2p.relay.circuit_v2.pb import circuit_pb2

    assert {status.name: status.value for status in Status} == {
        name: value for name, value in circuit_pb2.Status.items() if value
    }


def test_a_reservation_lasts_its_time_and_is_renewed() -> None:
    relay = table(reservation_ttl=100.0)
    assert relay.reserve("b", "10.0.0.1", 5.0) == Granted(105.0)
    assert relay.reserved("b", 104.9)
    assert not relay.reserved("b", 105.0)
    assert relay.reserve("b", "10.0.0.1", 50.0) == Granted(150.0)
    assert relay.reserved("b", 149.0)
    relay.expire(150.0)
    assert relay.statistics().reservations == 0
    assert refused(relay.connect("a", "b", 150.0)) is Status.NO_RESERVATION


def test_reservations_are_limited_and_renewals_are_not() -> None:
    relay = table("a", "b", max_reservations=2, reservation_ttl=100.0)
    assert refused(relay.reserve("c", "10.9.0.1", 1.0)) is Status.RESERVATION_REFUSED
    assert isinstance(relay.reserve("a", "10.0.0.1", 50.0), Granted)
    assert isinstance(relay.reserve("c", "10.9.0.1", 100.0), Granted)  # b's has expired
    relay.peer_gone("a")
    assert isinstance(relay.reserve("d", "10.9.0.2", 100.0), Granted)
    assert relay.statistics().refused == {Status.RESERVATION_REFUSED: 1}


@pytest.mark.parametrize(
    ("first", "same_ip", "same_prefix", "another"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.9", "198.51.100.1"),
        ("2001:db8:1:1::1", "2001:db8:1:1:ffff::2", "2001:db8:1:2::1", "2001:db8:2::1"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.9", "198.51.100.1"),
        (None, "not an address", None, "192.0.2.1"),
    ],
)
def test_reservations_per_address_and_network(
    first: str | None, same_ip: str, same_prefix: str | None, another: str
) -> None:
    relay = table(max_reservations_per_ip=2, max_reservations_per_prefix=3)
    assert isinstance(relay.reserve("a", first, 0.0), Granted)
    assert isinstance(relay.reserve("b", same_ip, 0.0), Granted)
    assert refused(relay.reserve("c", first, 0.0)) is Status.RESERVATION_REFUSED
    assert isinstance(relay.reserve("a", first, 0.0), Granted)
    if same_prefix is not None:
        assert isinstance(relay.reserve("d", same_prefix, 0.0), Granted)
        assert refused(relay.reserve("e", same_prefix, 0.0)) is Status.RESERVATION_REFUSED
    assert isinstance(relay.reserve("f", another, 0.0), Granted)
    relay.reserve("a", another, 0.0)  # it has moved: its old place is free
    assert isinstance(relay.reserve("g", first, 0.0), Granted)


def test_a_thousand_strangers_take_no_more_than_their_share() -> None:
    relay = table("b", max_reservations=100, max_reservations_per_ip=8, max_reservations_per_prefix=20)
    for number in range(1000):
        relay.reserve(f"near {number}", f"192.0.2.{number % 250}", 1.0)
    assert relay.statistics().reservations == 21
    for number in range(1000):
        relay.reserve(f"far {number}", f"10.{100 + number // 250}.{number % 250}.1", 1.0)
    assert relay.statistics().reservations == 100
    assert isinstance(relay.reserve("b", "10.0.0.1", 2.0), Granted)
    assert len(relay._groups) <= 200


def test_circuits_need_a_reservation_and_two_peers() -> None:
    relay = table("b")
    assert refused(relay.connect("a", "c", 0.0)) is Status.NO_RESERVATION
    assert refused(relay.connect("b", "b", 0.0)) is Status.PERMISSION_DENIED
    first, second = opened(relay.connect("a", "b", 0.0)), opened(relay.connect("a", "b", 0.0))
    assert first.circuit != second.circuit
    relay.close(first.circuit)
    relay.close(first.circuit)
    assert relay.statistics().circuits == 1
    assert relay.moved(second.circuit, 10, 1.0) is None, "a circuit's end touched another of the same peers"
    assert refused(relay.moved(first.circuit, 10, 1.0)) is Status.RESOURCE_LIMIT_EXCEEDED


def test_busy_circuits_are_not_evicted() -> None:
    relay = table("b", "c", max_circuits=3, max_circuits_per_peer=2, idle=10.0, idle_bytes=100)
    first = opened(relay.connect("a", "b", 0.0)).circuit
    opened(relay.connect("a", "c", 0.0))
    assert refused(relay.connect("a", "b", 5.0)) is Status.RESOURCE_LIMIT_EXCEEDED  # both of a's are young
    opened(relay.connect("d", "b", 6.0))
    relay.moved(first, 100, 9.0)
    answer = opened(relay.connect("e", "c", 11.0))  # the relay is full; a's second circuit has been idle
    assert answer.evicted == (2,)
    assert relay.statistics().circuits == 3
    assert relay.statistics().circuits_evicted == 1
    assert refused(relay.connect("f", "c", 11.0)) is Status.RESOURCE_LIMIT_EXCEEDED


def test_a_trickle_does_not_keep_a_circuit_from_eviction() -> None:
    relay = table("b", max_circuits=1, idle=10.0, idle_bytes=1000)
    trickle = opened(relay.connect("a", "b", 0.0)).circuit
    for second in range(1, 10):
        relay.moved(trickle, 30, float(second))
    assert opened(relay.connect("c", "b", 10.0)).evicted == (trickle,)


def test_one_peers_full_table_evicts_its_own_idle_circuit_only() -> None:
    relay = table("b", "c", max_circuits_per_peer=1, idle=10.0)
    others = opened(relay.connect("x", "c", 0.0)).circuit
    own = opened(relay.connect("a", "b", 1.0)).circuit
    assert opened(relay.connect("d", "b", 20.0)).evicted == (own,)
    assert relay.moved(others, 1, 20.0) is None


def test_limits_of_a_circuit() -> None:
    relay = table("b", circuit_bytes=1000, circuit_seconds=60.0)
    circuit = opened(relay.connect("a", "b", 5.0))
    assert circuit.ends == 65.0
    assert relay.moved(circuit.circuit, 1000, 6.0) is None
    assert relay.moved(circuit.circuit, 1000, 6.0, to_source=True) is None  # each direction has its own
    assert refused(relay.moved(circuit.circuit, 1, 6.0)) is Status.RESOURCE_LIMIT_EXCEEDED
    assert refused(relay.moved(circuit.circuit, 0, 65.0, to_source=True)) is Status.RESOURCE_LIMIT_EXCEEDED
    assert relay.statistics().bytes_relayed == 2000
    unlimited = table("b")
    circuit = opened(unlimited.connect("a", "b", 0.0))
    assert circuit.ends == float("inf")
    assert unlimited.moved(circuit.circuit, 1 << 50, 1e9) is None


def test_negative_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_circuits is negative"):
        RelayLimits(max_circuits=-1)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "connect", "moved", "close", "gone", "expire"]),
        st.integers(0, 5),
        st.integers(0, 5),
        st.floats(0, 20),
    ),
    max_size=120,
)


@given(OPERATIONS)
def test_no_sequence_exceeds_a_limit_or_leaks(operations: list[tuple[str, int, int, float]]) -> None:
    limits = RelayLimits(
        max_reservations=4, max_reservations_per_ip=2, max_reservations_per_prefix=3, reservation_ttl=30.0,
        max_circuits=4, max_circuits_per_peer=2, idle=10.0, idle_bytes=5,
    )  # fmt: skip
    relay = RelayTable(limits)
    now = 0.0
    live: dict[int, tuple[int, int]] = {}
    for what, a, b, later in operations:
        now += later
        if what == "reserve":
            relay.reserve(str(a), f"10.0.{b % 2}.{b}", now)
        elif what == "connect":
            answer = relay.connect(str(a), str(b), now)
            if isinstance(answer, Opened):
                assert relay.reserved(str(b), now)
                for number in answer.evicted:
                    del live[number]
                live[answer.circuit] = (a, b)
        elif what == "moved" and live:
            assert relay.moved(list(live)[a % len(live)], b, now) is None
        elif what == "close" and live:
            number = list(live)[a % len(live)]
            del live[number]
            relay.close(number)
        elif what == "gone":
            relay.peer_gone(str(a))
            assert not relay.reserved(str(a), now)
        else:
            relay.expire(now)
        statistics = relay.statistics()
        assert statistics.reservations <= 4
        assert statistics.circuits == len(live) <= 4
        for peer in range(6):
            assert sum(peer in pair for pair in live.values()) <= 2
    for number in live:
        relay.close(number)
    for peer in range(6):
        relay.peer_gone(str(peer))
    assert not relay._per_peer
    assert not relay._groups
    assert not relay._reservations


class Sender:
    """Circuits that always (or every `pause` seconds) have `size` bytes to send, against a `FairBandwidth`."""

    def __init__(self, rate: int) -> None:
        self.bandwidth = FairBandwidth(rate, 0.0)
        self.now = 0.0
        self.sent: dict[int, int] = {}
        self.longest: dict[int, float] = {}
        self._greedy: dict[int, int] = {}
        self._tickets: dict[int, tuple[int, int, float]] = {}

    def ask(self, circuit: int, size: int) -> None:
        self._tickets[self.bandwidth.ask(circuit, size)] = (circuit, size, self.now)

    def run(self, seconds: float, greedy: dict[int, int], modest: dict[int, tuple[int, float]]) -> None:
        """`greedy`: circuit -> size of its requests, from now on; `modest`: circuit -> (size, pause in seconds)."""
        end = self.now + seconds
        due = dict.fromkeys(modest, self.now)
        self._greedy |= greedy
        for circuit, size in greedy.items():
            self.ask(circuit, size)
        while self.now < end:
            for circuit, (size, pause) in modest.items():
                if due[circuit] <= self.now:
                    due[circuit] += pause
                    self.ask(circuit, size)
            for ticket in self.bandwidth.grants(self.now):
                circuit, size, since = self._tickets.pop(ticket)
                self.sent[circuit] = self.sent.get(circuit, 0) + size
                self.longest[circuit] = max(self.longest.get(circuit, 0.0), self.now - since)
                if circuit in self._greedy:
                    self.ask(circuit, self._greedy[circuit])
            wait = self.bandwidth.wait(self.now)
            self.now = min([self.now + (wait if wait is not None else seconds), *due.values(), end])


def test_the_bandwidth_is_kept_and_used() -> None:
    sender = Sender(1_000_000)
    sender.run(10.0, {1: 64_000}, {})
    assert 9_900_000 < sender.sent[1] < 10_200_000


def test_greedy_circuits_share_evenly_whatever_their_sizes() -> None:
    sender = Sender(1_000_000)
    sender.run(10.0, {1: 64_000, 2: 64_000, 3: 1_000}, {})
    for sent in sender.sent.values():
        assert sent == pytest.approx(3_333_000, rel=0.05)


def test_a_modest_circuit_neither_waits_nor_takes_from_the_others() -> None:
    sender = Sender(1_000_000)
    sender.run(10.0, dict.fromkeys(range(1, 6), 64_000), {9: (2_000, 0.1)})  # 20 kB/s of its share of 167 kB/s
    assert sender.sent[9] == pytest.approx(200_000, rel=0.05)
    assert sender.longest[9] < 5 * 0.064 + 0.01  # one request of each of the others
    assert sum(sender.sent.values()) > 9_900_000


def test_a_latecomer_owes_and_is_owed_nothing() -> None:
    sender = Sender(1_000_000)
    sender.run(5.0, {1: 64_000}, {})
    before = dict(sender.sent)
    sender.run(5.0, {2: 64_000}, {})  # 1 goes on asking
    assert sender.sent[2] == pytest.approx(sender.sent[1] - before[1], rel=0.1)


def test_who_has_gone_is_not_waited_for() -> None:
    bandwidth = FairBandwidth(1000, 0.0)
    assert bandwidth.grants(0.0) == []
    assert bandwidth.wait(0.0) is None
    first, second, third = bandwidth.ask(1, 500), bandwidth.ask(2, 10), bandwidth.ask(3, 10)
    assert bandwidth.grants(0.0) == [first]
    wait = bandwidth.wait(0.0)
    assert wait == pytest.approx(0.451)
    bandwidth.withdraw(second)
    bandwidth.withdraw(second)
    bandwidth.forget(2)
    assert bandwidth.grants(0.4) == []
    assert bandwidth.grants(0.46) == [third]
    assert bandwidth.wait(0.46) is None
    with pytest.raises(ValueError, match="positive"):
        FairBandwidth(0, 0.0)

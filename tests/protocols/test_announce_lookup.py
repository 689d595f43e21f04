import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.announce.kbuckets import K, RoutingTable, key_position, peer_position, shared_bits
from protocols.announce.lookup import MAX_FOUND, MAX_QUERIES, Findings, Lookup, region_bits, region_end, responsible
from protocols.announce.messages import PeerInfo
from tests.protocols.test_announce_messages import key

positions = st.integers(0, 2**256 - 1)


def info(peer: object) -> PeerInfo:
    return PeerInfo(f"peer{peer}", (f"/memory/{peer}",))


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=400), positions)
def test_the_table_is_bounded_and_finds_the_nearest_it_knows(events: list[tuple[int, bool]], target: int) -> None:
    table = RoutingTable("me", k=4)
    for now, (peer, alive) in enumerate(events):
        if alive:
            new = table.seen(info(peer), now)
            assert not new or f"peer{peer}" in table
        else:
            table.failed(f"peer{peer}")
    known = [f"peer{peer}" for peer in range(301) if f"peer{peer}" in table]
    assert len(known) == len(table)
    per_bucket: dict[int, int] = {}
    for peer in known:
        bits = shared_bits(table.position, peer_position(peer))
        per_bucket[bits] = per_bucket.get(bits, 0) + 1
    assert all(count <= 4 for count in per_bucket.values())
    nearest = sorted(known, key=lambda peer: peer_position(peer) ^ target)[:7]
    assert [each.peer for each in table.closest(target, 7)] == nearest


def same_bucket(table: RoutingTable, count: int) -> list[str]:
    peers = (f"peer{number}" for number in range(10_000))
    far = (peer for peer in peers if shared_bits(table.position, peer_position(peer)) == 0)
    return [peer for peer, _ in zip(far, range(count), strict=False)]


def test_long_known_peers_are_not_pushed_out_by_newcomers() -> None:
    table = RoutingTable("me", k=3)
    old, new = same_bucket(table, 9)[:3], same_bucket(table, 9)[3:]
    for peer in old:
        assert table.seen(PeerInfo(peer), 0)
    for now, peer in enumerate(new):
        assert not table.seen(PeerInfo(peer), now)
    assert all(peer in table for peer in old)
    table.failed(old[0])
    assert old[0] not in table
    assert new[-1] in table  # the newcomer heard of last takes the place


def test_without_a_substitute_one_failure_is_forgiven() -> None:
    table = RoutingTable("me")
    table.seen(info(1), 0)
    table.failed("peer1")
    assert "peer1" in table
    table.seen(info(1), 1)
    table.failed("peer1")
    assert "peer1" in table
    table.failed("peer1")
    assert "peer1" not in table


def test_a_node_does_not_know_itself() -> None:
    table = RoutingTable("me")
    assert not table.seen(PeerInfo("me"), 0)
    table.failed("me")
    assert "me" not in table
    assert table.get("me") is None
    assert len(table) == 0


def test_stale_peers_are_the_longest_silent() -> None:
    table = RoutingTable("me")
    for number in range(5):
        table.seen(info(number), number)
    assert [each.peer for each in table.stale(3, 2)] == ["peer0", "peer1"]
    table.seen(info(0), 9)
    assert [each.peer for each in table.stale(3, 9)] == ["peer1", "peer2"]


def test_refresh_targets_lie_in_their_buckets_and_are_due_again_later() -> None:
    table = RoutingTable("me")
    for number in range(200):
        table.seen(info(number), 0)
    targets = table.refresh_targets(0, 100, random.Random(1).getrandbits(256))
    assert [shared_bits(table.position, target) for target in targets] == list(range(len(targets)))
    assert len(targets) >= 5
    assert table.refresh_targets(50, 120, 0) == []
    assert len(table.refresh_targets(101, 701, 0)) == len(targets)


class Net:
    """Nodes with routing tables, asked synchronously and out of order."""

    def __init__(self, size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.tables = {f"peer{number}": RoutingTable(f"peer{number}") for number in range(size)}
        self.dead: set[str] = set()
        names = list(self.tables)
        for number, name in enumerate(names[1:], 1):  # each joins by way of one node it knows
            self.meet(name, self.random.choice(names[:number]))
            self.lookup(name, self.tables[name].position)
            for target in self.tables[name].refresh_targets(0, 1, self.random.getrandbits(256)):
                self.lookup(name, target)

    def meet(self, a: str, b: str) -> None:
        self.tables[a].seen(PeerInfo(b), 0)
        self.tables[b].seen(PeerInfo(a), 0)

    def lookup(self, me: str, target: int) -> tuple[list[str], int]:
        lookup = Lookup(target, self.tables[me].closest(target, K), me=me)
        flying: list[PeerInfo] = []
        asked = 0
        while not lookup.done:
            batch = lookup.next_queries()
            asked += len(batch)
            flying += batch
            assert len(flying) <= 10
            peer = flying.pop(self.random.randrange(len(flying))).peer
            if peer in self.dead:
                lookup.failed(peer)
                self.tables[me].failed(peer)
            else:
                self.meet(me, peer)
                near = self.tables[peer].closest(target, K + 1)
                lookup.answered(peer, [each for each in near if each.peer != me][:K])
        return [each.peer for each in lookup.closest()], asked

    def nearest(self, target: int, *, but: str) -> list[str]:
        alive = [peer for peer in self.tables if peer not in self.dead and peer != but]
        return sorted(alive, key=lambda peer: peer_position(peer) ^ target)[:K]


@pytest.mark.slow
def test_look_ups_among_200_nodes_find_the_nearest_20() -> None:
    net = Net(200, seed=7)
    exact = 0
    for number in range(100):
        me = net.random.choice(list(net.tables))
        target = key_position(key(number))
        found, asked = net.lookup(me, target)
        assert asked <= 60
        expected = net.nearest(target, but=me)
        assert len(set(found) & set(expected)) >= K - 2
        exact += found == expected
    assert exact >= 95


@pytest.mark.slow
def test_two_nodes_agree_on_who_keeps_a_key_right_after_a_third_has_died() -> None:
    net = Net(200, seed=8)
    net.dead = set(net.random.sample(list(net.tables), 66))
    alive = [peer for peer in net.tables if peer not in net.dead]
    for number in range(40):
        announcer, asker = net.random.sample(alive, 2)
        target = key_position(key(number))
        kept, _ = net.lookup(announcer, target)
        asked, _ = net.lookup(asker, target)
        assert not (set(kept) | set(asked)) & net.dead
        assert len(set(kept[:8]) & set(asked[:10])) >= 4


def test_lying_peers_cannot_lead_a_look_up_on_for_ever() -> None:
    lookup = Lookup(0, [info(0)], me="me")
    asked = 0
    while not lookup.done:
        for each in lookup.next_queries():
            asked += 1
            # Every answer invents peers still nearer to the target.
            invented = sorted((info(f"{asked}.{n}") for n in range(60)), key=lambda each: peer_position(each.peer))
            lookup.answered(each.peer, invented[:20])
    assert asked <= MAX_QUERIES
    assert len(lookup.closest()) == K


def test_a_report_about_somebody_not_asked_is_our_own_mistake() -> None:
    lookup = Lookup(0, [info(0)], me="me")
    with pytest.raises(ValueError, match="not asked"):
        lookup.answered("peer0", [])


def test_a_look_up_without_seeds_is_done() -> None:
    lookup = Lookup(0, [PeerInfo("me")], me="me")
    assert lookup.done
    assert lookup.closest() == []


@given(st.integers(1, 120), st.integers(0, 10**6))
def test_a_region_has_its_nearest_peers_in_the_result_of_one_look_up(size: int, seed: int) -> None:
    rng = random.Random(seed)
    peers = [(rng.getrandbits(256), str(number)) for number in range(size)]
    wanted = sorted(rng.getrandbits(256) for _ in range(60))
    start = 0
    while start < len(wanted):
        target = wanted[start]
        found = sorted(peers, key=lambda peer: peer[0] ^ target)[:K]
        bits = region_bits(target, [position for position, _ in found])
        end = region_end(wanted, start, bits)
        assert end > start
        assert all(shared_bits(target, position) >= bits for position in wanted[start:end])
        assert end == len(wanted) or shared_bits(target, wanted[end]) < bits
        inside = [peer for peer in peers if shared_bits(target, peer[0]) >= bits]
        for position in wanted[start:end]:
            truth = responsible(position, peers, 8)
            assert responsible(position, found, 8)[: len(inside)] == truth[: len(inside)]
        start = end


def test_findings_trust_the_many_before_the_one() -> None:
    findings = Findings("me")
    for number in range(3):
        findings.add(key(1), [info("good"), PeerInfo("me"), info(f"liar{number}")])
    assert findings.result()[key(1)][0].peer == "peergood"
    assert "me" not in {each.peer for each in findings.result()[key(1)]}
    findings.add(key(2), [PeerInfo("me")])
    assert key(2) not in findings
    findings.add(key(3), [PeerInfo(f"p{number}", ("/a",)) for number in range(1000)])
    assert len(findings.result()[key(3)]) == MAX_FOUND
    for number in range(40):
        findings.add(key(4), [PeerInfo("p", (f"/{number}",))])
    assert len(findings.result()[key(4)][0].addrs) == 16

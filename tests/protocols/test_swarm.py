"""The whole exchange core in simulated networks: speed, fairness, waste, and every kind of bad peer."""

from __future__ import annotations

import pytest

from protocols.exchange import events as ev
from protocols.exchange.picker import Order
from protocols.exchange.swarm import QUEUE_BYTES
from tests.protocols.simulator import KIB, MBIT, MIB, Content, Node, Simulator, check_invariants

IMAGE = Content.of(256)  # 64 MiB
RATE = 100 * MBIT


def finish(sim: Simulator, *nodes: Node, content: Content = IMAGE, limit: float = 600.0) -> float:
    return sim.run(lambda: all(content.id in node.done for node in nodes), limit)


def waste(node: Node, content: Content = IMAGE) -> float:
    """Chunks received more than once."""
    return (node.received_bytes - content.bytes) / content.size


@pytest.mark.parametrize(("rtt", "share"), [(0.002, 0.95), (0.02, 0.92), (0.2, 0.85)])
def test_one_seed_fills_the_line(rtt: float, share: float) -> None:
    sim = Simulator(latency=rtt / 2)
    content = Content.of(1024)
    sim.node("seed", has=content)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(content)
    seconds = finish(sim, leecher, content=content)
    assert content.bytes / RATE / seconds >= share
    assert waste(leecher, content) == 0


@pytest.mark.parametrize("seed", range(3))
def test_flash_crowd(seed: int) -> None:
    sim = Simulator(seed)
    source = sim.node("seed", has=IMAGE)
    crowd = [sim.node(f"leecher{i}") for i in range(8)]
    sim.connect_all()
    for node in crowd:
        node.fetch(IMAGE)
    seconds = finish(sim, *crowd)
    ideal = max(IMAGE.bytes / RATE, 8 * IMAGE.bytes / (9 * RATE))
    assert seconds <= 2.5 * ideal
    assert source.sent_bytes <= 1.75 * IMAGE.bytes
    assert sum(waste(node) for node in crowd) <= 16


def test_providers_of_different_quarters() -> None:
    sim = Simulator()
    for i in range(4):
        sim.node(f"p{i}", up=RATE / 4, has=IMAGE, part=range(64 * i, 64 * i + 64))
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    assert finish(sim, leecher) <= 1.15 * IMAGE.bytes / RATE
    assert set(leecher.swarm.stats(IMAGE.id).received.values()) == {IMAGE.bytes // 4}


def test_two_of_four_providers_die_half_way() -> None:
    sim = Simulator()
    for i in range(4):
        sim.node(f"p{i}", up=RATE / 4, has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    half = sim.run(lambda: len(leecher.arrived) >= 128)
    sim.kill("p0")
    sim.kill("p1")
    assert finish(sim, leecher) - half <= 1.15 * (IMAGE.bytes / 2) / (RATE / 2)
    assert waste(leecher) <= 4


def test_fair_shares_of_equal_providers() -> None:
    sim = Simulator()
    for i in range(4):
        sim.node(f"p{i}", up=RATE / 4, has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    assert finish(sim, leecher) <= 1.15 * IMAGE.bytes / RATE
    received = leecher.swarm.stats(IMAGE.id).received
    assert min(received.values()) >= IMAGE.bytes / 8
    assert waste(leecher) <= 3


def test_fast_providers_share_one_queue() -> None:
    """Else chunks would come further out of order the more of them there are."""
    sim = Simulator(latency=0.0001)
    content = Content.of(4096)
    for i in range(4):
        sim.node(f"p{i}", up=1000 * MBIT, has=content)
    leecher = sim.node("leecher", down=4000 * MBIT)
    sim.connect_all()
    leecher.fetch(content)
    most = 0

    def looked() -> bool:
        nonlocal most
        if sim.now > 1.0:  # when rates are known
            most = max(most, sum(peer.in_flight_bytes for peer in leecher.swarm._peers.values()))
        return content.id in leecher.done

    seconds = sim.run(looked, 60.0)
    assert 8 * MIB < most <= 1.5 * QUEUE_BYTES
    assert content.bytes / (4000 * MBIT) / seconds >= 0.9


def test_fair_shares_of_equal_leechers() -> None:
    sim = Simulator()
    sim.node("seed", has=IMAGE)
    both = [sim.node("a"), sim.node("b")]
    for node in both:
        sim.connect("seed", node.name)
        node.fetch(IMAGE)
    sim.run(lambda: len(both[0].arrived) >= 100)
    assert 80 <= len(both[1].arrived) <= 120


@pytest.mark.parametrize("wrong", ["mute", "refuses", "lies", "boasts"])
def test_one_bad_peer_among_three_costs_little(wrong: str) -> None:
    sim = Simulator()
    sim.node("good1", up=RATE / 2, has=IMAGE)
    sim.node("good2", up=RATE / 2, has=IMAGE)
    part = () if wrong == "boasts" else None
    sim.node("bad", up=RATE / 2, has=IMAGE, part=part, **{wrong: True})
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    ideal = IMAGE.bytes / RATE
    assert finish(sim, leecher) <= 1.25 * ideal
    stats = leecher.swarm.stats(IMAGE.id)
    assert "bad" not in stats.received
    if wrong == "lies":
        assert set(stats.banned) == {"bad"}
        assert [ban.peer for ban in leecher.bans] == ["bad"]
        assert leecher.received_bytes - IMAGE.bytes <= 3 * IMAGE.size
    else:
        assert not stats.banned


def test_a_staller_alone_is_asked_again_ever_less_often() -> None:
    sim = Simulator()
    sim.node("mute", has=IMAGE, mute=True)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    sim.run(lambda: sim.now > 300, limit=400)
    assert 4 <= max(leecher.requested.values()) + sum(leecher.requested.values()) // 2 <= 20


def test_trickler_is_rescued_at_the_end() -> None:
    sim = Simulator()
    sim.node("good", has=IMAGE)
    sim.node("slow", up=8 * KIB, has=IMAGE)  # half a minute per chunk, and never silent
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    assert finish(sim, leecher) <= 1.2 * IMAGE.bytes / RATE
    assert waste(leecher) <= 2


def test_trickler_is_rescued_though_some_blocks_are_nowhere() -> None:
    sim = Simulator()
    sim.node("good", has=IMAGE, part=range(255))
    sim.node("slow", up=8 * KIB, has=IMAGE, part=range(255))
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    assert sim.run(lambda: len(leecher.arrived) == 255) <= 1.3 * IMAGE.bytes / RATE


def test_busy_peer_is_left_alone_then_used() -> None:
    sim = Simulator()
    sim.node("seed", has=IMAGE, busy_first=2)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    assert 1.0 <= finish(sim, leecher) <= 1.5 + 1.1 * IMAGE.bytes / RATE


def test_two_downloads_fetch_what_they_share_once() -> None:
    sim = Simulator()
    one = Content.of(128, id=b"one")
    two = Content.of(128, start=64, id=b"two")
    seed = sim.node("seed", has=one)
    seed.contents[two.id] = two
    seed.store |= set(two.keys)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(one)
    leecher.fetch(two)
    sim.run(lambda: len(leecher.done) == 2)
    assert set(leecher.requested.values()) == {1}
    assert leecher.received_bytes == 192 * 256 * KIB


def test_provider_leaves_and_returns() -> None:
    sim = Simulator()
    sim.node("seed", has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    sim.run(lambda: len(leecher.arrived) >= 100)
    sim.disconnect("seed", "leecher")
    gone = sim.now
    sim.at(gone + 3, lambda: sim.connect("seed", "leecher"))
    assert finish(sim, leecher) <= 3 + 1.15 * IMAGE.bytes / RATE
    assert len({key for _, key, _ in leecher.arrived}) == len(leecher.arrived) == 256


def test_exhausted_download_looks_for_the_right_blocks_and_uses_their_holders() -> None:
    sim = Simulator()
    sim.node("most", has=IMAGE, part=range(250))
    outsider = sim.node("outsider", has=Content.of(6, start=250, id=b"other image"))
    leecher = sim.node("leecher")
    sim.connect("most", "leecher")
    leecher.fetch(IMAGE)
    sim.run(lambda: len(leecher.arrived) == 250)
    missing = set(IMAGE.keys[250:])
    sim.run(lambda: any(set(find.keys) == missing for _, find in leecher.finds))
    assert leecher.swarm.stats(IMAGE.id).unavailable == 6
    sim.connect("outsider", "leecher")
    leecher.announced["outsider"] |= missing
    leecher.handle(ev.PeerHolds("outsider", sorted(missing)))
    finish(sim, leecher)
    assert outsider.sent_bytes == 6 * IMAGE.size


def test_a_boaster_does_not_hide_that_a_block_is_nowhere() -> None:
    sim = Simulator()
    sim.node("boaster", has=IMAGE, part=range(200), boasts=True)
    sim.node("modest", has=IMAGE, part=range(200))
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    sim.run(lambda: any(set(find.keys) == set(IMAGE.keys[200:]) for _, find in leecher.finds), limit=30)


def test_sequential_reader_gets_chunks_nearly_in_order() -> None:
    sim = Simulator()
    for i in range(2):
        sim.node(f"p{i}", up=RATE / 2, has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE, Order.SEQUENTIAL)
    finish(sim, leecher)
    order = [IMAGE.keys.index(key) for _, key, _ in leecher.arrived]
    assert max(abs(place - number) for place, number in enumerate(order)) <= 64


@pytest.mark.parametrize("seed", range(4))
def test_invariants_hold_in_a_rough_network(seed: int) -> None:
    sim = Simulator(seed, latency=0.01)
    content = Content.of(48)
    sim.node("seed", up=RATE / 8, has=content)
    sim.node("mute", has=content, mute=True)
    sim.node("liar", has=content, lies=True)
    sim.node("boaster", has=content, part=range(10), boasts=True)
    sim.node("busy", has=content, busy_first=3)
    sim.node("half", has=content, part=range(24))
    crowd = [sim.node(f"leecher{i}") for i in range(3)]
    sim.after_event = lambda node: check_invariants(node.swarm)
    sim.connect_all()
    for node in crowd:
        node.fetch(content)
    for at, name in ((0.4, "half"), (0.7, "busy")):
        sim.at(at, lambda n=name: sim.kill(n))
    finish(sim, *crowd, content=content)


def test_large_chunks_after_a_stall_come_at_full_rate() -> None:
    """One block in flight at a time must not blind the measurement of the rate."""
    sim = Simulator(latency=0.05)
    content = Content.of(64, size=4 * MIB)
    sim.node("seed", up=10 * RATE, has=content)
    leecher = sim.node("leecher", down=10 * RATE)
    sim.connect_all()
    leecher.fetch(content)
    sim.run(lambda: len(leecher.arrived) >= 4)
    leecher.swarm._stalled(leecher.swarm._peers["seed"])
    assert finish(sim, leecher, content=content) <= 6 + 2 * content.bytes / (10 * RATE)


@pytest.mark.slow
def test_cpu_of_a_download_of_400_000_chunks() -> None:
    sim = Simulator()
    content = Content.of(400_000, size=256 * KIB)
    sim.node("seed", up=10_000 * MBIT, has=content)
    for i in range(3):
        sim.node(f"part{i}", up=1000 * MBIT, has=content, part=range(i, 400_000, 40))
    leecher = sim.node("leecher", down=10_000 * MBIT)
    sim.connect_all()
    leecher.fetch(content)
    finish(sim, leecher, content=content)
    assert leecher.cpu_seconds / 400_000 < 200e-6
    assert leecher.longest_event < 2.0


def neighbours(near: bool) -> tuple[float, float]:
    """Three on one network and four seeds elsewhere: copies that came from afar, and seconds."""
    sim = Simulator()
    content = Content.of(1024)
    far = [sim.node(f"far{i}", has=content) for i in range(4)]
    here = [sim.node(f"here{i}", up=10 * RATE, down=2 * RATE) for i in range(3)]
    sim.connect_all()
    for one in here:
        for other in here:
            if near and one is not other:
                one.handle(ev.PeerNear(other.name, True))
    for node in here:
        node.fetch(content)
    seconds = finish(sim, *here, content=content)
    return sum(node.sent_bytes for node in far) / content.bytes, seconds


def test_neighbours_get_most_from_each_other() -> None:
    copies, seconds = neighbours(near=True)
    anyhow, otherwise = neighbours(near=False)
    assert copies < 1.55 < 1.8 < anyhow
    assert seconds < 1.5 * otherwise


def test_a_slow_neighbour_holds_nobody_up() -> None:
    sim = Simulator()
    sim.node("far", has=IMAGE)
    sim.node("near", up=1 * MBIT, has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.handle(ev.PeerNear("near", True))
    leecher.fetch(IMAGE)
    assert finish(sim, leecher) < 1.3 * IMAGE.bytes / RATE


def test_a_neighbour_with_everything_is_asked_alone_once_it_is_known_to_be_fast() -> None:
    sim = Simulator()
    far = sim.node("far", up=RATE / 4, has=IMAGE)
    sim.node("near", has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.handle(ev.PeerNear("near", True))
    leecher.fetch(IMAGE)
    assert finish(sim, leecher) < 1.3 * IMAGE.bytes / RATE
    assert far.sent_bytes < 0.15 * IMAGE.bytes


def test_near_and_far_again_keeps_the_counts() -> None:
    sim = Simulator()
    sim.node("part", has=IMAGE, part=range(0, 256, 2))
    sim.node("seed", up=RATE / 10, has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.fetch(IMAGE)
    for near in (True, False, True, True, False):
        leecher.handle(ev.PeerNear("part", near))
    sim.run(lambda: len(leecher.arrived) >= 10)
    leecher.handle(ev.PeerNear("part", True))
    sim.kill("part")
    finish(sim, leecher)
    assert not any(leecher.swarm._downloads[IMAGE.id].near_copies)


def test_neighbours_share_out_what_few_have_so_far() -> None:
    """One seed is the bottleneck: every chunk is new somewhere else first, and still need not come three times."""
    sim = Simulator()
    sim.node("seed", has=IMAGE)
    others = [sim.node(f"other{i}") for i in range(4)]
    here = [sim.node(f"here{i}", up=10 * RATE, down=2 * RATE) for i in range(3)]
    sim.connect_all()
    for one in here:
        for other in here:
            if one is not other:
                one.handle(ev.PeerNear(other.name, True))
    for node in (*others, *here):
        node.fetch(IMAGE)
    assert finish(sim, *others, *here) < 1.5 * IMAGE.bytes / RATE
    names = {node.name for node in here}
    received = [node.swarm.stats(IMAGE.id).received for node in here]
    assert sum(size for each in received for name, size in each.items() if name in names) > 0.5 * 3 * IMAGE.bytes


@pytest.mark.parametrize("rate", [3 * MBIT, 15 * MBIT])
def test_a_neighbour_that_delivers_a_chunk_a_second_does_not_set_the_pace(rate: float) -> None:
    sim = Simulator()
    sim.node("far", has=IMAGE)
    sim.node("near", up=rate, has=IMAGE)
    leecher = sim.node("leecher")
    sim.connect_all()
    leecher.handle(ev.PeerNear("near", True))
    leecher.fetch(IMAGE)
    assert finish(sim, leecher) < 1.5 * IMAGE.bytes / RATE

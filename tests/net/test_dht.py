"""The DHT on an in-memory network with a virtual clock: announce, find, withdraw, expire, renew."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pnode.net.dht import PATIENCE, DHTConfig, DHTRouter
from p2pnode.net.memory import MemoryFabric, MemoryNetwork
from p2pnode.net.transport import Buffer, Stream
from tests.protocols.test_announce_messages import key

COALESCING = 0.25
SETTLE = 5.0  # virtual seconds: more than coalescing and the passes of a network that grows


class Swarm:
    """Nodes on one fabric. Every node is connected to the first one and finds the others by itself."""

    def __init__(self, nursery: trio.Nursery, config: DHTConfig | None) -> None:
        self.nursery = nursery
        self.fabric = MemoryFabric(nursery)
        self.config = config
        self.nets: list[MemoryNetwork] = []
        self.nodes: list[DHTRouter] = []

    async def join(self) -> DHTRouter:
        net = self.fabric.node(f"node{len(self.nets)}")
        node = DHTRouter(net, self.config)
        await self.nursery.start(node.run)
        if self.nets:
            await net.connect(self.nets[0].peer_id)
        self.nets.append(net)
        self.nodes.append(node)
        return node

    async def die(self, number: int) -> None:
        """Without a word."""
        scope = self.nodes[number]._scope
        assert scope is not None
        scope.cancel()
        await self.fabric.stop(f"node{number}")

    def holders(self, wanted: bytes) -> set[int]:
        now = trio.current_time()
        return {number for number, node in enumerate(self.nodes) if node.records.providers(wanted, now)}


@asynccontextmanager
async def swarm(size: int, config: DHTConfig | None = None) -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        network = Swarm(nursery, config)
        for _ in range(size):
            await network.join()
        await trio.sleep(SETTLE)
        yield network
        nursery.cancel_scope.cancel()


def who(found: dict[bytes, list], wanted: bytes) -> set[str]:  # type: ignore[type-arg]
    return {provider.peer for provider in found.get(wanted, [])}


async def test_a_network_of_20_learns_itself_from_one_contact(autojump_clock: MockClock) -> None:
    async with swarm(20) as net:
        assert [node.stats().peers for node in net.nodes] == [19] * 20


async def test_what_is_provided_is_found_by_everybody_with_its_address(autojump_clock: MockClock) -> None:
    async with swarm(20) as net:
        net.nodes[3].provide([key(1), key(2)])
        net.nodes[7].provide([key(2)])
        await trio.sleep(SETTLE)
        for number, node in enumerate(net.nodes):
            found = await node.find([key(1), key(2), key(3)])
            assert who(found, key(1)) == {"node3"} - {f"node{number}"}
            assert who(found, key(2)) == {"node3", "node7"} - {f"node{number}"}
            assert key(3) not in found
            for provider in found[key(2)]:
                assert provider.addrs == (f"/memory/{provider.peer}/p2p/{provider.peer}",)
        assert len(net.holders(key(1))) == 8
        stats = net.nodes[3].stats()
        assert (stats.announced, stats.pending, stats.last_error) == (2, 0, None)


async def test_ten_thousand_keys_take_seconds_and_few_streams(autojump_clock: MockClock) -> None:
    async with swarm(20) as net:
        keys = [key(number) for number in range(10_000)]
        opened: list[str] = []
        original = net.nets[3].open_stream

        async def counting(peer: str, protocol: str) -> Stream:
            opened.append(peer)
            return await original(peer, protocol)

        net.nets[3].open_stream = counting  # type: ignore[method-assign]
        await trio.sleep(600)  # idle streams are closed by now
        virtual, real = trio.current_time(), time.perf_counter()
        net.nodes[3].provide(keys)
        with trio.fail_after(60):
            while net.nodes[3].stats().pending:
                await trio.sleep(0.1)
        assert trio.current_time() - virtual < 5
        assert time.perf_counter() - real < 15
        assert len(opened) <= 2 * 19
        await trio.sleep(SETTLE)
        assert sum(node.stats().records for node in net.nodes) == 80_000
        for start in (0, 9_500):
            found = await net.nodes[11].find(keys[start : start + 500])
            assert all(who(found, wanted) == {"node3"} for wanted in keys[start : start + 500])


async def test_announcing_keeps_to_its_rate(autojump_clock: MockClock) -> None:
    async with swarm(2, DHTConfig(rate=10_000)) as net:
        begun = trio.current_time()
        net.nodes[0].provide([key(number) for number in range(12_000)])  # three frames, 440 kB
        with trio.fail_after(600):
            while net.nodes[0].stats().pending:
                await trio.sleep(1)
        assert 25 < trio.current_time() - begun < 60


async def test_withdrawn_keys_are_forgotten_at_once(autojump_clock: MockClock) -> None:
    async with swarm(20) as net:
        net.nodes[3].provide([key(1), key(2)])
        net.nodes[4].provide([key(1)])
        await trio.sleep(SETTLE)
        net.nodes[3].withdraw([key(1), key(99)])
        await trio.sleep(SETTLE)
        found = await net.nodes[5].find([key(1), key(2)])
        assert who(found, key(1)) == {"node4"}
        assert who(found, key(2)) == {"node3"}


async def test_withdrawing_and_providing_again_ends_as_said_last(autojump_clock: MockClock) -> None:
    async with swarm(10) as net:
        net.nodes[3].provide([key(1), key(2)])
        await trio.sleep(SETTLE)
        net.nodes[3].withdraw([key(1)])
        net.nodes[3].provide([key(1)])
        net.nodes[3].withdraw([key(2)])
        await trio.sleep(COALESCING)
        net.nodes[3].provide([key(2)])
        net.nodes[3].provide([key(3)])
        net.nodes[3].withdraw([key(3)])
        await trio.sleep(SETTLE)
        found = await net.nodes[5].find([key(1), key(2), key(3)])
        assert who(found, key(1)) == who(found, key(2)) == {"node3"}
        assert key(3) not in found


@pytest.mark.parametrize("running", [True, False])
async def test_a_clean_exit_leaves_no_records_and_is_quick(autojump_clock: MockClock, running: bool) -> None:
    async with swarm(20) as net:
        net.nodes[3].provide([key(number) for number in range(5000)])
        net.nodes[4].provide([key(1)])
        await trio.sleep(SETTLE)
        if not running:
            assert net.nodes[3]._scope is not None
            net.nodes[3]._scope.cancel()
            await trio.sleep(0)
        begun = trio.current_time()
        await net.nodes[3].close()
        assert trio.current_time() - begun <= 2
        assert sum(node.stats().records for node in net.nodes) == 8
        assert net.nodes[3].stats().announced == 0


@pytest.mark.slow
async def test_records_of_the_dead_expire_and_those_of_the_living_are_renewed(autojump_clock: MockClock) -> None:
    async with swarm(20) as net:
        net.nodes[3].provide([key(1)])
        net.nodes[4].provide([key(1)])
        await trio.sleep(SETTLE)
        await net.die(3)
        await trio.sleep(600)
        assert who(await net.nodes[5].find([key(1)]), key(1)) == {"node3", "node4"}
        await trio.sleep(1300)
        assert who(await net.nodes[5].find([key(1)]), key(1)) == {"node4"}
        await trio.sleep(3600)
        assert who(await net.nodes[5].find([key(1)]), key(1)) == {"node4"}
        assert len(net.holders(key(1))) == 8
        assert sum(node.stats().records for node in net.nodes[5:]) <= 8


async def test_keys_outlive_their_keepers(autojump_clock: MockClock) -> None:
    async with swarm(30) as net:
        keys = [key(number) for number in range(100)]
        net.nodes[3].provide(keys)
        await trio.sleep(SETTLE)
        for number in range(10, 25):  # half of the network
            await net.die(number)
        begun = trio.current_time()
        found = await net.nodes[5].find(keys)
        assert trio.current_time() - begun <= 10
        assert sum(who(found, wanted) == {"node3"} for wanted in keys) >= 97
        await trio.sleep(1000)  # renewed among those who are left
        found = await net.nodes[5].find(keys)
        assert all(who(found, wanted) == {"node3"} for wanted in keys)
        assert all(len(net.holders(wanted) - set(range(10, 25))) == 8 for wanted in keys)


async def test_who_provides_before_knowing_anybody_is_found_later(autojump_clock: MockClock) -> None:
    async with swarm(1) as net:
        net.nodes[0].provide([key(1)])
        await trio.sleep(1000)
        assert net.nodes[0].stats().pending == 1
        for _ in range(11):
            await net.join()
        await trio.sleep(SETTLE)
        assert net.nodes[0].stats().pending == 0
        assert len(net.holders(key(1))) == 8  # not only whoever came first
        assert who(await net.nodes[9].find([key(1)]), key(1)) == {"node0"}


@pytest.mark.slow
async def test_sixty_nodes_share_the_keys(autojump_clock: MockClock) -> None:
    async with swarm(60) as net:
        keys = [key(number) for number in range(600)]
        net.nodes[3].provide(keys)
        await trio.sleep(SETTLE)
        counts = [node.stats().records for node in net.nodes]
        assert max(counts) < 300
        assert sum(count > 0 for count in counts) >= 55
        for number in (0, 17, 44):
            found = await net.nodes[number].find(keys)
            assert all(who(found, wanted) == {"node3"} for wanted in keys)


async def test_bootstrap_fills_the_table_of_a_node_that_does_not_run_yet(autojump_clock: MockClock) -> None:
    async with swarm(15) as net:
        transport = net.fabric.node("late")
        late = DHTRouter(transport)
        await transport.connect("node4")
        await late.bootstrap()
        assert late.stats().peers == 15


async def test_what_can_wait_gives_way_to_chunks_but_not_for_ever(autojump_clock: MockClock) -> None:
    async with swarm(1) as net:
        (lone,) = net.nodes
        lone.provide([key(1)])
        await trio.sleep(SETTLE)
        began = trio.current_time()
        lone.busy_until = lambda: trio.current_time() + 1
        await net.join()
        await trio.sleep(1)
        lone.provide([key(2)])  # what is new is announced all the same
        await trio.sleep(SETTLE)
        assert (net.holders(key(1)), net.holders(key(2))) == (set(), {1})
        await trio.sleep(PATIENCE - 2 * SETTLE)
        assert net.holders(key(1)) == set()
        await trio.sleep(2 * SETTLE)
        assert net.holders(key(1)) == {1}
        assert trio.current_time() - began < PATIENCE + 3 * SETTLE


async def test_a_quiet_node_announces_what_has_waited_and_knows_the_network(autojump_clock: MockClock) -> None:
    async with swarm(4) as net, trio.open_nursery() as nursery:
        transport = net.fabric.node("alone")
        lone = DHTRouter(transport)
        await nursery.start(lone.run)
        lone.provide([key(1)])
        await trio.sleep(SETTLE)
        quiet = trio.current_time() + 8
        lone.busy_until = lambda: quiet
        await net.nets[2].connect("alone")
        await trio.sleep(SETTLE)
        assert lone.stats().peers == 1 and lone.stats().pending == 1
        await trio.sleep(2 * SETTLE)
        assert lone.stats().peers == 4 and lone.stats().pending == 0
        nursery.cancel_scope.cancel()


async def test_peers_that_do_not_speak_the_protocol_stay_out_of_the_table(autojump_clock: MockClock) -> None:
    async with swarm(3) as net:
        net.fabric.node("stranger")
        await net.nets[1].connect("stranger")
        await trio.sleep(SETTLE)
        assert net.nodes[1].stats().peers == 2


async def test_a_changed_address_reaches_those_who_ask(autojump_clock: MockClock) -> None:
    async with swarm(5) as net:
        net.nodes[1].provide([key(1)])
        await trio.sleep(SETTLE)
        net.nets[1].addrs = lambda: ["/ip4/10.9.8.7/tcp/1"]  # type: ignore[method-assign]
        await trio.sleep(1000)
        found = await net.nodes[2].find([key(1)])
        assert "/ip4/10.9.8.7/tcp/1" in found[key(1)][0].addrs


async def test_a_full_peer_is_not_asked_again_and_again(autojump_clock: MockClock) -> None:
    async with swarm(2) as net:
        net.nodes[1].records._limits = type(net.nodes[1].records._limits)(per_sender=10)
        asked = 0
        original = net.nets[0].open_stream

        class Counting:
            def __init__(self, stream: Stream) -> None:
                self.stream = stream
                self.peer = stream.peer

            async def send_all(self, data: Buffer) -> None:
                nonlocal asked
                asked += 1
                await self.stream.send_all(data)

            def __getattr__(self, name: str) -> object:
                return getattr(self.stream, name)

        async def counting(peer: str, protocol: str) -> Stream:
            return Counting(await original(peer, protocol))  # type: ignore[return-value]

        net.nets[0].open_stream = counting  # type: ignore[method-assign]
        net.nodes[0].provide([key(number) for number in range(100)])
        await trio.sleep(800)
        stats = net.nodes[0].stats()
        assert (stats.announced, stats.pending) == (10, 90)
        assert stats.last_error is not None
        assert asked < 60

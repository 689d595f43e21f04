from __future__ import annotations

import ipaddress

import trio
from trio.testing import MockClock

from p2pnode.net.addresses import Interface
from p2pnode.net.changes import INTERVAL, MISSING_TIME, Change, significant, watch

LOOPBACK = ipaddress.ip_interface("127.0.0.1/8")
HOME = ipaddress.ip_interface("192.168.1.5/24")
WORK = ipaddress.ip_interface("10.1.2.3/16")


class Machine:
    def __init__(self) -> None:
        self.interfaces: list[Interface] = [LOOPBACK, HOME]
        self.asleep = 100.0
        self.changes: list[tuple[float, Change]] = []
        self.began = trio.current_time()

    def changed(self, change: Change) -> None:
        self.changes.append((trio.current_time() - self.began, change))

    async def run(self) -> None:
        await watch(lambda: list(self.interfaces), self.changed, asleep=lambda: self.asleep)


async def test_another_network_is_noticed_once_and_within_seconds(autojump_clock: MockClock) -> None:
    machine = Machine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run)
        await trio.sleep(60)
        assert machine.changes == []
        machine.interfaces = [LOOPBACK]
        await trio.sleep(INTERVAL + 0.1)
        machine.interfaces = [WORK, LOOPBACK]
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert [change for _, change in machine.changes] == [Change.INTERFACES, Change.ADDED]
    assert machine.changes[0][0] <= 60 + INTERVAL + 0.1


async def test_the_order_of_interfaces_and_loopback_do_not_matter(autojump_clock: MockClock) -> None:
    machine = Machine()
    machine.interfaces = [HOME, WORK]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run)
        await trio.sleep(10)
        machine.interfaces = [LOOPBACK, WORK, HOME]
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert machine.changes == []
    assert significant([LOOPBACK, HOME]) == {HOME}


async def test_sleep_is_noticed_and_short_naps_are_not(autojump_clock: MockClock) -> None:
    machine = Machine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run)
        await trio.sleep(10)
        machine.asleep += MISSING_TIME / 2
        await trio.sleep(10)
        assert machine.changes == []
        machine.asleep += 3600
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert [change for _, change in machine.changes] == [Change.RESUMED]

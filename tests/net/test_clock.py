"""Asking for the time over a network in memory, and what a peer can do to those who ask."""

import pytest
import trio
from trio.testing import MockClock

from p2pnode.errors import NetworkTimeout, RemoteError, StreamClosed
from p2pnode.net.clock import TIMEOUT, Clock
from p2pnode.net.memory import MemoryFabric
from p2pnode.net.transport import Stream
from protocols import clock


async def test_the_offset_is_seen_from_both_sides() -> None:
    async with trio.open_nursery() as nursery:
        fabric = MemoryFabric(nursery)
        a, b = fabric.node("a"), fabric.node("b")
        here, there = Clock(a, lambda: 1_000_000.0), Clock(b, lambda: 1_000_090.0)
        assert (await here.ask("b")).offset == pytest.approx(90, abs=1)
        assert (await there.ask("a")).offset == pytest.approx(-90, abs=1)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_never_answers(autojump_clock: MockClock) -> None:
    async def silent(stream: Stream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        fabric = MemoryFabric(nursery)
        a, b = fabric.node("a"), fabric.node("b")
        b.handle(clock.PROTOCOL, silent)
        began = trio.current_time()
        with pytest.raises(NetworkTimeout):
            await Clock(a).ask("b")
        assert trio.current_time() - began == pytest.approx(TIMEOUT, abs=0.5)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "error"), [(b"", StreamClosed), (b"1234", StreamClosed), (b"\xff" * 8, RemoteError)]
)
async def test_a_peer_that_answers_nonsense(answer: bytes, error: type[Exception]) -> None:
    async def nonsense(stream: Stream) -> None:
        await stream.receive_some(1)
        if answer:
            await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        fabric = MemoryFabric(nursery)
        a, b = fabric.node("a"), fabric.node("b")
        b.handle(clock.PROTOCOL, nonsense)
        with pytest.raises(error):
            await Clock(a).ask("b")
        nursery.cancel_scope.cancel()


async def test_a_peer_without_the_protocol() -> None:
    async with trio.open_nursery() as nursery:
        fabric = MemoryFabric(nursery)
        a = fabric.node("a")
        fabric.node("b")
        with pytest.raises(RemoteError):
            await Clock(a).ask("b")
        nursery.cancel_scope.cancel()

"""What comes from several peers goes to where a download keeps it through one worker thread, together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import trio
import zstandard
from trio.testing import wait_all_tasks_blocked

from p2pnode.errors import DiskFull, NodeError
from p2pnode.swarm.intake import CALL_BYTES, Intake
from protocols.exchange import messages as m

LIMIT = 1 << 10
BAD = b"bad"


def raw(key: bytes, payload: bytes = b"x", size: int | None = None) -> m.Block:
    return m.Block(key, m.Encoding.RAW, len(payload) if size is None else size, (payload,))


def packed(key: bytes, payload: bytes) -> m.Block:
    return m.Block(key, m.Encoding.ZSTD, len(payload), (zstandard.compress(payload),))


class GatedSink:
    """Notes the calls; the first waits until it may go on. Blocks whose plain bytes are BAD, or none, are refused."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[list[bytes]] = []
        self.entered = threading.Event()
        self.go = threading.Event()
        self._inside = 0
        self._error = error

    def accept_many(self, blocks: Sequence[tuple[bytes, m.Payload]]) -> list[bool]:
        self._inside += 1
        try:
            assert self._inside == 1, "two calls at once"
            self.calls.append([key for key, _ in blocks])
            self.entered.set()
            assert self.go.wait(30)
            if self._error is not None and len(self.calls) > 1:
                raise self._error
            return [b"".join(payload) not in (b"", BAD) for _, payload in blocks]
        finally:
            self._inside -= 1


Told = list[bool] | Exception | None


async def bring(nursery: trio.Nursery, intake: Intake, sink: GatedSink, *sent: Sequence[m.Block]) -> list[Told]:
    """Hand each batch to the intake in a task of its own, in order, the others when the sink is busy with the
    first; what each is told once they are done."""
    told: list[Told] = [None] * len(sent)

    async def session(number: int, blocks: Sequence[m.Block]) -> None:
        try:
            told[number] = await intake.accept(blocks)
        except (NodeError, ArithmeticError) as error:
            told[number] = error

    for number, blocks in enumerate(sent):
        nursery.start_soon(session, number, blocks)
        await wait_all_tasks_blocked()
        if number == 0:
            await trio.to_thread.run_sync(sink.entered.wait)
    return told


async def test_what_comes_during_a_call_goes_into_the_next_together() -> None:
    sink = GatedSink()
    intake = Intake(sink, {})
    async with trio.open_nursery() as nursery:
        told = await bring(
            nursery, intake, sink, [raw(b"a")], [raw(b"b"), raw(b"c", BAD)], [raw(b"d")], [raw(b"e", BAD)]
        )
        sink.go.set()
    assert sink.calls == [[b"a"], [b"b", b"c", b"d", b"e"]]
    assert told == [[True], [True, False], [True], [False]]


async def test_packed_blocks_are_unpacked_one_by_one_and_each_gets_its_own_verdict() -> None:
    sink = GatedSink()
    sink.go.set()
    too_much = packed(b"5", bytes(LIMIT + 1))
    blocks = [raw(b"1"), packed(b"2", BAD), raw(b"3", BAD), packed(b"4", b"good"), too_much]
    intake = Intake(sink, dict.fromkeys([b"2", b"4", b"5"], LIMIT))
    assert await intake.accept(blocks) == [True, False, False, True, False]
    assert sink.calls == [[b"1", b"3"], [b"2"], [b"4"], [b"5"]]


@pytest.mark.parametrize("error", [DiskFull("the disk is full"), ZeroDivisionError("a bug")])
async def test_an_error_reaches_all_whose_blocks_were_in_the_call(error: Exception) -> None:
    sink = GatedSink(error)
    async with trio.open_nursery() as nursery:
        told = await bring(nursery, Intake(sink, {}), sink, [raw(b"a")], [raw(b"b")], [raw(b"c")])
        sink.go.set()
    assert told == [[True], error, error]


async def test_a_cancelled_session_leaves_nothing_and_holds_nobody_up() -> None:
    sink = GatedSink()
    intake = Intake(sink, {})
    async with trio.open_nursery() as nursery:
        first = await bring(nursery, intake, sink, [raw(b"a")])
        async with trio.open_nursery() as leaving:
            await bring(leaving, intake, sink, [raw(b"b")])
            last = await bring(nursery, intake, sink, [raw(b"c")])
            leaving.cancel_scope.cancel()
        sink.go.set()
    assert [key for call in sink.calls for key in call] == [b"a", b"c"]
    assert (first, last) == ([[True]], [[True]])


@pytest.mark.parametrize("said", [0, 1 << 40])
async def test_a_call_is_bounded_whatever_peers_say_of_their_blocks(said: int) -> None:
    payload = bytes(CALL_BYTES // 4)
    sink = GatedSink()
    async with trio.open_nursery() as nursery:
        blocks = [[raw(bytes([number]), payload, size=said)] for number in range(12)]
        told = await bring(nursery, Intake(sink, {}), sink, *blocks)
        sink.go.set()
    assert told == [[True]] * 12
    assert [len(call) for call in sink.calls] == [1, 4, 4, 3]

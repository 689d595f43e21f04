"""An object is hashed by those who bring its chunks, in its order, whoever comes first."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from p2pnode.errors import ChunkUnavailable, DiskFull
from p2pnode.swarm.verifying import Follower, Recent
from protocols.exchange.messages import Buffer, Payload

SIZE = 1000


class Export:
    """Notes what it is fed; at most one thread at a time may be in it."""

    def __init__(self, fail_at: int = -1) -> None:
        self.fed: list[bytes] = []
        self._inside = threading.Lock()
        self._fail_at = fail_at

    def check(self) -> None: ...

    def begin_object(self, index: int) -> None: ...

    def feed(self, data: Buffer) -> None:
        assert self._inside.acquire(blocking=False), "two threads feed at once"
        if len(self.fed) == self._fail_at:
            self._inside.release()
            raise DiskFull("the disk is full")
        self.fed.append(bytes(data))
        self._inside.release()

    def end_object(self) -> None: ...

    def finish(self) -> Path | None: ...

    def abort(self) -> None: ...


def offset(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


def chunks(number: int) -> dict[bytes, bytes]:
    return {n.to_bytes(32, "big"): n.to_bytes(2, "big") * (SIZE // 2) for n in range(number)}


def bring(follower: Follower, recent: Recent, digest: bytes, pieces: Payload) -> None:
    """What a sink does with a good chunk."""
    if not follower.offer(digest, pieces):
        recent.put(digest, pieces)
    follower.go_on()


def nothing(digest: bytes) -> Payload:
    raise ChunkUnavailable("not here")


def test_chunks_in_order_are_fed_as_they_come() -> None:
    parts, export, recent = chunks(20), Export(), Recent(offset)
    follower = Follower(export, list(parts), recent)
    for number, (digest, data) in enumerate(parts.items(), 1):
        bring(follower, recent, digest, (data[:7], data[7:]))
        assert follower.at == number
    assert b"".join(export.fed) == b"".join(parts.values())
    assert recent._size == 0, "none of them was kept"


@pytest.mark.parametrize("seed", range(5))
def test_any_order_is_put_right_by_many_threads(seed: int) -> None:
    parts, export, recent = chunks(400), Export(), Recent(offset)
    order = list(parts)
    random.Random(seed).shuffle(order)
    follower = Follower(export, list(parts), recent)

    def work(its: Sequence[bytes]) -> None:
        for digest in its:
            bring(follower, recent, digest, (parts[digest],))

    threads = [threading.Thread(target=work, args=(order[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert follower.at == 400 and follower.next is None
    assert export.fed == list(parts.values())


def test_what_came_before_or_comes_twice_is_read() -> None:
    parts, export, recent = chunks(4), Export(), Recent(offset)
    a, b, c, d = parts
    digests = [a, b, a, c, d]
    follower = Follower(export, digests, recent)
    for digest in (b, c, d):
        bring(follower, recent, digest, (parts[digest],))
    assert follower.at == 0
    read: list[bytes] = []

    def from_disk(digest: bytes) -> Payload:
        read.append(digest)
        return (parts[digest],)

    follower.catch_up(1, from_disk)
    assert follower.at == 1
    follower.catch_up(5, from_disk)
    assert read == [a, a]
    assert export.fed == [parts[digest] for digest in digests]


def test_what_cannot_be_read_is_the_next_one_and_may_come_again() -> None:
    parts, export, recent = chunks(3), Export(), Recent(offset)
    follower = Follower(export, list(parts), recent)
    first, *rest = parts
    bring(follower, recent, first, (parts[first],))
    with pytest.raises(ChunkUnavailable):
        follower.catch_up(3, nothing)
    assert follower.at == 1
    for digest in rest:
        bring(follower, recent, digest, (parts[digest],))
    assert export.fed == list(parts.values())


def test_an_error_of_the_export_is_the_fetchs_not_the_peers() -> None:
    parts, export, recent = chunks(10), Export(fail_at=4), Recent(offset)
    follower = Follower(export, list(parts), recent)
    for digest, data in parts.items():
        bring(follower, recent, digest, (data,))  # raises nothing
    assert follower.at == 4
    with pytest.raises(DiskFull):
        follower.check()


def test_a_bug_of_the_export_ends_the_fetch_and_nothing_is_fed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, export, recent = chunks(3), Export(), Recent(offset)
    follower = Follower(export, list(parts), recent)
    first, *_ = parts
    feed = export.feed

    def broken(data: Buffer) -> None:
        if export.fed:
            raise ZeroDivisionError
        feed(data)

    monkeypatch.setattr(export, "feed", broken)
    with pytest.raises(ZeroDivisionError):
        bring(follower, recent, first, (parts[first][:7], parts[first][7:]))
    follower.catch_up(3, nothing)
    assert follower.at == 0 and len(export.fed) == 1
    with pytest.raises(ZeroDivisionError):
        follower.check()


def test_nothing_is_fed_after_the_stop() -> None:
    parts, export, recent = chunks(10), Export(), Recent(offset)
    follower = Follower(export, list(parts), recent)
    first, *rest = parts
    bring(follower, recent, first, (parts[first],))
    follower.stop()
    for digest in rest:
        bring(follower, recent, digest, (parts[digest],))
    follower.catch_up(10, nothing)
    assert follower.at == 1 and len(export.fed) == 1

from __future__ import annotations

from collections import Counter

import pytest

from protocols.exchange.messages import MAX_IDS, Priority
from protocols.exchange.uploads import MAX_QUEUED, QUANTUM, Uploads
from tests.protocols.simulator import make_keys

KEYS = make_keys(3000)


def serve(uploads: Uploads, sizes: dict[str, int], turns: int) -> tuple[Counter[str], list[bytes]]:
    """Bytes sent to each peer by a connection that takes everything at once, and the keys in order."""
    sent, keys = Counter[str](), []
    for _ in range(turns):
        turn = uploads.next()
        if turn is None:
            break
        peer, key = turn
        uploads.queued(peer, key, sizes[peer])
        uploads.sent(peer, sizes[peer])
        sent[peer] += sizes[peer]
        keys.append(key)
    return sent, keys


@pytest.mark.parametrize("large", [256 << 10, 1 << 20, 4 << 20])
def test_equal_bytes_whatever_the_size_of_chunks(large: int) -> None:
    uploads = Uploads()
    uploads.want("small", KEYS, Priority.NORMAL)
    uploads.want("large", KEYS, Priority.NORMAL)
    sent, _ = serve(uploads, {"small": 64 << 10, "large": large}, 1000)
    assert abs(sent["small"] - sent["large"]) <= 2 * (large + QUANTUM)


def test_no_debt_from_being_alone() -> None:
    uploads = Uploads()
    uploads.want("first", KEYS, Priority.NORMAL)
    serve(uploads, {"first": 4 << 20}, 500)
    uploads.want("second", KEYS, Priority.NORMAL)
    sent, _ = serve(uploads, {"first": 4 << 20, "second": 4 << 20}, 100)
    assert abs(sent["first"] - sent["second"]) <= 16 << 20


def test_priorities_come_first_in_order_and_wants_move_between_them() -> None:
    uploads = Uploads()
    uploads.want("a", KEYS[:10], Priority.BACKGROUND)
    uploads.want("b", KEYS[10:20], Priority.NORMAL)
    uploads.want("a", KEYS[5:8], Priority.INTERACTIVE)
    assert uploads.waiting("a") == 10
    _, keys = serve(uploads, {"a": 1000, "b": 1000}, 100)
    assert keys[:3] == KEYS[5:8] and set(keys[3:13]) == set(KEYS[10:20]) and len(keys) == 20


def test_a_seed_hands_out_everything_once_before_anything_twice() -> None:
    uploads = Uploads()
    for peer in "abcd":
        uploads.want(peer, KEYS[:64], Priority.NORMAL)
    _, keys = serve(uploads, dict.fromkeys("abcd", 256 << 10), 64)
    assert len(set(keys)) == 64


def test_a_peer_that_does_not_read_is_not_read_for() -> None:
    uploads = Uploads()
    uploads.want("stuck", KEYS, Priority.NORMAL)
    uploads.want("fine", KEYS[:5], Priority.NORMAL)
    taken = Counter[str]()
    while (turn := uploads.next()) is not None:
        peer, key = turn
        uploads.queued(peer, key, 1 << 20)
        taken[peer] += 1
        if peer == "fine":
            uploads.sent(peer, 1 << 20)
    assert taken == {"stuck": MAX_QUEUED >> 20, "fine": 5}
    uploads.leave("stuck")
    assert uploads.next() is None and uploads.waiting("stuck") == 0


def test_too_many_wants_are_dropped_and_cancelled_ones_are_not_served() -> None:
    uploads = Uploads()
    many = make_keys(2 * MAX_IDS + 1)
    assert uploads.want("a", many[:-1], Priority.NORMAL)
    assert not uploads.want("a", many[-1:], Priority.NORMAL)
    assert uploads.waiting("a") == 0
    uploads.want("a", KEYS[:3], Priority.NORMAL)
    uploads.cancel("a", KEYS[:2])
    _, keys = serve(uploads, {"a": 1}, 9)
    assert keys == KEYS[2:3]

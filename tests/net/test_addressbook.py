from __future__ import annotations

import contextlib
import json
import logging
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.net.addressbook import (
    FAILURES_TO_FORGET,
    HEARD_TTL,
    MAX_ADDRS,
    MAX_PEERS,
    REACHED_TTL,
    AddressBook,
    Book,
)
from p2pnode.net.identity import peer_id_of

ALICE, BOB, CAROL = (peer_id_of(bytes([n]) * 32) for n in (1, 2, 3))
A, B, C = (f"/ip4/192.0.2.{n}/tcp/4001" for n in (1, 2, 3))


def test_the_address_that_worked_comes_first() -> None:
    book = Book()
    book.heard(ALICE, [A, B, C], 0)
    book.reached(ALICE, B, 10)
    book.failed(ALICE, A, 20)
    assert book.addrs(ALICE, 20) == [B, C, A]
    book.failed(ALICE, B, 30)  # it worked once, but not last time
    assert book.addrs(ALICE, 30) == [C, B, A]
    book.reached(ALICE, A, 40)
    assert book.addrs(ALICE, 40)[0] == A


def test_hearsay_ages_and_success_lasts_longer() -> None:
    book = Book()
    book.heard(ALICE, [A, B], 0)
    book.reached(ALICE, B, 1)
    assert book.addrs(ALICE, HEARD_TTL + 2) == [B]
    assert book.addrs(ALICE, REACHED_TTL + 2) == []
    assert book.known(REACHED_TTL + 2) == []


def test_an_address_that_only_fails_is_dropped_even_when_still_advertised() -> None:
    book = Book()
    book.heard(ALICE, [A, B], 0)
    for second in range(FAILURES_TO_FORGET):
        book.failed(ALICE, A, HEARD_TTL + second)
    book.heard(ALICE, [B], HEARD_TTL + 10)
    assert book.addrs(ALICE, HEARD_TTL + 10) == [B]


def test_addresses_without_the_peer_and_of_nobody_else() -> None:
    book = Book()
    book.heard(ALICE, [f"{A}/p2p/{ALICE}", f"{B}/p2p/{BOB}", "rubbish"], 0)
    book.heard("not a peer", [A], 0)
    assert book.peers.keys() == {ALICE}
    assert book.addrs(ALICE, 0) == [A]


def test_bounds_hold_and_reached_peers_survive_a_flood() -> None:
    book = Book()
    book.reached(ALICE, A, 1)
    for n in range(MAX_PEERS * 2):
        peer = peer_id_of(n.to_bytes(32, "big"))
        book.heard(peer, [A], 2 + n)
    assert len(book.peers) <= MAX_PEERS
    assert book.addrs(ALICE, 10) == [A]
    book.heard(ALICE, [f"/ip4/192.0.2.9/tcp/{port}" for port in range(1, 100)], 3)
    book.heard(ALICE, [f"/ip4/192.0.2.10/tcp/{port}" for port in range(1, 100)], 4)
    assert len(book.addrs(ALICE, 10)) == MAX_ADDRS
    assert book.addrs(ALICE, 10)[0] == A


def test_known_peers_begin_with_the_latest_reached() -> None:
    book = Book()
    book.reached(ALICE, A, 1)
    book.reached(BOB, A, 2)
    book.heard(CAROL, [A], 3)
    assert book.known(3) == [BOB, ALICE, CAROL]


def test_round_trip() -> None:
    book = Book()
    book.heard(ALICE, [A, B], 5)
    book.reached(ALICE, B, 6)
    book.failed(ALICE, A, 7)
    assert Book.decode(book.encode(), 10).peers == book.peers


def test_a_clock_that_was_set_back_does_not_make_entries_eternal() -> None:
    book = Book()
    book.reached(ALICE, A, 1e9)
    again = Book.decode(book.encode(), 1000)
    assert again.addrs(ALICE, 1000 + REACHED_TTL + 1) == []


@given(st.binary(max_size=200))
def test_any_bytes_are_a_book_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        Book.decode(data, 0)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from([ALICE, A, "x"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([ALICE, BOB, A, B, "x"]), inner, max_size=3)
    ),
)


@given(_json)
def test_any_document_yields_only_valid_entries(peers: object) -> None:
    try:
        book = Book.decode(json.dumps({"version": 1, "peers": peers}).encode(), 100)
    except ValueError:
        return
    for peer, entries in book.peers.items():
        assert peer in (ALICE, BOB)
        assert entries.keys() <= {A, B}
        assert all(entry.heard <= 100 and entry.failures >= 0 for entry in entries.values())
    book.known(200)


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    book = AddressBook(path, clock=lambda: 100.0)
    book.heard(ALICE, [A])
    book.reached(ALICE, B)
    assert book.changed
    book.save()
    assert not book.changed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = AddressBook(path, clock=lambda: 101.0)
    assert again.addrs(ALICE) == [B, A]
    assert again.peers() == [ALICE]
    again.forget(ALICE)
    again.save()
    assert len(AddressBook(path)) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["peers.json"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version": 2, "peers": {}}', b"\xff\xfe", b"[" * 100_000])
def test_a_corrupt_file_means_an_empty_book_and_a_warning(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.json"
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        book = AddressBook(path)
    assert len(book) == 0
    assert str(path) in caplog.text


def test_a_directory_that_vanished_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = AddressBook(tmp_path / "gone" / "peers.json")
    book.heard(ALICE, [A])
    book.save()
    assert "could not be saved" in caplog.text

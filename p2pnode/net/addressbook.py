"""Where peers were heard of and reached: bounded, ranked, and kept in the home across restarts.

`Book` decides and holds no file and no clock: every method takes `now` (seconds since the epoch). `AddressBook` is the
one a node uses: a `Book` with a clock and a JSON file that is replaced atomically. What a file or a stranger says is
validated before it enters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pnode.errors import UsageError
from p2pnode.net.addresses import check_peer_id, valid

log = logging.getLogger(__name__)

FILE_NAME = "peers.json"
VERSION = 1
MAX_PEERS = 2000
MAX_ADDRS = 16
HEARD_TTL = 24 * 3600.0  # s an address lives on hearsay alone
REACHED_TTL = 30 * 24 * 3600.0  # s it lives after we last connected over it
FAILURES_TO_FORGET = 8  # in a row, without a success within HEARD_TTL
MAX_FILE_BYTES = 32 << 20  # MAX_PEERS * MAX_ADDRS addresses of full length, with room


@dataclass(slots=True)
class Entry:
    """What is known of one address of one peer. Times are seconds since the epoch, 0 for never."""

    heard: float
    reached: float = 0.0
    failed: float = 0.0
    failures: int = 0  # in a row

    def rank(self) -> tuple[bool, float, int, float]:
        """Sort key, best first: worked last time we tried, latest success, fewest failures, latest news."""
        return (self.failures > 0, -self.reached, self.failures, -self.heard)

    def expired(self, now: float) -> bool:
        if self.failures >= FAILURES_TO_FORGET and now - self.reached > HEARD_TTL:
            return True
        lasting = self.reached + REACHED_TTL if self.reached else 0.0
        return now > max(self.heard + HEARD_TTL, lasting)


@dataclass(slots=True)
class Book:
    """Peers and their addresses, at most MAX_PEERS times MAX_ADDRS. Deterministic."""

    peers: dict[str, dict[str, Entry]] = field(default_factory=dict)
    changed: bool = False

    def heard(self, peer: str, addrs: Iterable[str], now: float) -> None:
        """Somebody says `peer` is at `addrs`. Malformed and undiallable ones are ignored."""
        try:
            check_peer_id(peer)
        except UsageError:
            return
        for addr in valid(addrs, peer, MAX_ADDRS):
            self._entry(peer, addr, now).heard = now

    def reached(self, peer: str, addr: str, now: float) -> None:
        """We connected to `peer` over `addr`."""
        for text in valid([addr], peer):
            entry = self._entry(peer, text, now)
            entry.heard = entry.reached = now
            entry.failures = 0

    def failed(self, peer: str, addr: str, now: float) -> None:
        """A dial of `addr` failed. Unknown addresses are not worth an entry."""
        entry = self.peers.get(peer, {}).get(addr)
        if entry is not None:
            entry.failed = now
            entry.failures += 1
            self.changed = True

    def addrs(self, peer: str, now: float) -> list[str]:
        """Addresses of `peer`, best first."""
        self._drop_expired(peer, now)
        entries = self.peers.get(peer, {})
        return sorted(entries, key=lambda addr: entries[addr].rank())

    def known(self, now: float) -> list[str]:
        """Peers with at least one address, the latest reached first."""
        for peer in list(self.peers):
            self._drop_expired(peer, now)
        return sorted(self.peers, key=self._worth, reverse=True)

    def forget(self, peer: str) -> None:
        if self.peers.pop(peer, None) is not None:
            self.changed = True

    def _worth(self, peer: str) -> tuple[float, float]:
        """Peers that we really reached outlive any number of peers that somebody only spoke of."""
        entries = self.peers[peer].values()
        return max(entry.reached for entry in entries), max(entry.heard for entry in entries)

    def _entry(self, peer: str, addr: str, now: float) -> Entry:
        self.changed = True
        entries = self.peers.get(peer)
        if entries is None:
            if len(self.peers) >= MAX_PEERS:
                self._evict(now)
            entries = self.peers[peer] = {}
        entry = entries.get(addr)
        if entry is None:
            if len(entries) >= MAX_ADDRS:
                del entries[max(entries, key=lambda known: entries[known].rank())]
            entry = entries[addr] = Entry(heard=now)
        return entry

    def _evict(self, now: float) -> None:
        # A twentieth at once, so that a flood of new names costs a sort per hundred of them and not one each.
        for peer in self.known(now)[MAX_PEERS - MAX_PEERS // 20 :]:
            del self.peers[peer]

    def _drop_expired(self, peer: str, now: float) -> None:
        entries = self.peers.get(peer)
        if entries is None:
            return
        for addr in [addr for addr, entry in entries.items() if entry.expired(now)]:
            del entries[addr]
            self.changed = True
        if not entries:
            del self.peers[peer]

    def encode(self) -> bytes:
        peers = {
            peer: {addr: [entry.heard, entry.reached, entry.failed, entry.failures] for addr, entry in entries.items()}
            for peer, entries in self.peers.items()
        }
        return json.dumps({"version": VERSION, "peers": peers}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes, now: float) -> Book:
        """The book in `data`; entries that break a rule are left out. Raises `ValueError` when it is no book at all.

        Times in the future (a clock that was set back) count as now.
        """
        try:
            document = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise ValueError(f"not an address book of version {VERSION}")
        peers = document.get("peers")
        if not isinstance(peers, dict):
            raise ValueError("it has no peers")
        book = cls()
        for peer, entries in list(peers.items())[:MAX_PEERS]:
            if isinstance(entries, dict):
                book._restore(peer, entries, now)
        book.changed = False
        return book

    def _restore(self, peer: str, entries: dict[str, Any], now: float) -> None:
        with contextlib.suppress(UsageError):
            check_peer_id(peer)
            for addr in valid(entries, peer, MAX_ADDRS):
                match entries.get(addr):
                    case [
                        int() | float() as heard,
                        int() | float() as reached,
                        int() | float() as failed,
                        int() as row,
                    ]:
                        entry = self._entry(peer, addr, now)
                        entry.heard, entry.reached, entry.failed = (min(t, now) for t in (heard, reached, failed))
                        entry.failures = max(0, row)


class AddressBook:
    """A `Book` with a clock and, unless `path` is None, a file. Loading and saving block; run `save` in a thread."""

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._book = self._load()

    def heard(self, peer: str, addrs: Iterable[str]) -> None:
        """Somebody (identify, a provider record, a link, mDNS) says that `peer` is at `addrs`."""
        self._book.heard(peer, addrs, self._clock())

    def reached(self, peer: str, addr: str) -> None:
        """We connected to `peer` over `addr`."""
        self._book.reached(peer, addr, self._clock())

    def failed(self, peer: str, addr: str) -> None:
        """A dial of `addr` failed."""
        self._book.failed(peer, addr, self._clock())

    def addrs(self, peer: str) -> list[str]:
        """Addresses of `peer`, best first, without /p2p/<peer>."""
        return self._book.addrs(peer, self._clock())

    def peers(self) -> list[str]:
        """Peers with at least one address, the latest reached first."""
        return self._book.known(self._clock())

    def forget(self, peer: str) -> None:
        self._book.forget(peer)

    def __len__(self) -> int:
        return len(self._book.peers)

    @property
    def changed(self) -> bool:
        """Whether `snapshot` would hold anything that the file does not."""
        return self._book.changed

    def snapshot(self) -> bytes:
        """What `write` is to put into the file; taken at once, so that the writing may happen in another thread."""
        self._book.changed = False
        return self._book.encode()

    def write(self, data: bytes) -> None:
        """Replace the file by `data`. A failure is logged: an address book is a convenience, never a reason to stop."""
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
            temporary.replace(self.path)
        except OSError as exc:
            log.warning("the address book %s could not be saved: %s", self.path, exc.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def save(self) -> None:
        """Write the file now if anything changed. Blocks."""
        if self.changed:
            self.write(self.snapshot())

    def _load(self) -> Book:
        if self.path is None:
            return Book()
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise ValueError("it is too large")
            return Book.decode(data, self._clock())
        except FileNotFoundError:
            return Book()
        except (OSError, ValueError) as exc:
            log.warning("the address book %s is not usable (%s); starting with an empty one", self.path, exc)
            return Book()

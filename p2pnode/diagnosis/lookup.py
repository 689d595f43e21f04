"""A DHT look-up that is watched: who was asked, who answered how fast, who named whom.

The same steps as `DHTRouter.find`, with the same look-up table, one position at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from p2pnode.diagnosis.scene import Stopwatch
from p2pnode.errors import RemoteError
from p2pnode.net.dht import DHTRouter
from protocols.announce.kbuckets import K, key_position, peer_position
from protocols.announce.lookup import Lookup
from protocols.announce.messages import MAX_ADDRS, MAX_TTL, Find, Found, PeerInfo

TIMEOUT = 9.0  # s; `find` has as many
MAX_NAMED = 64  # peers kept of an answer's claims


@dataclass(slots=True)
class Named:
    """A peer that others named, or that this node knows itself. `age` in seconds of its record where this node keeps
    one, else None."""

    addrs: tuple[str, ...] = ()
    by: int = 0  # how many others said so
    age: float | None = None


@dataclass(slots=True)
class Trace:
    """What came of a look-up. `failures` has why each peer did not answer; times in seconds."""

    seconds: float = 0.0
    answered: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    named: dict[str, Named] = field(default_factory=dict)

    @property
    def asked(self) -> int:
        return len(self.answered) + len(self.failures)


async def find_peer(router: DHTRouter, me: str, peer: str) -> Trace:
    """Where the DHT says that `peer` is: `named` has it, or nobody."""
    position = peer_position(peer)
    trace = Trace()
    if (known := router.table.get(peer)) is not None:
        _name(trace, known, by=0)

    def read(found: Found) -> None:
        for info in found.closer:
            if info.peer == peer:
                _name(trace, info)

    await _walk(router, me, position, (), trace, read)
    return trace


async def find_providers(router: DHTRouter, me: str, key: bytes) -> Trace:
    """Who is recorded to have `key`: `named` has them."""
    trace = Trace()
    now = trio.current_time()
    for info in router.records.providers(key, now):
        _name(trace, info, by=0)
        expiry = router.records.expiry(key, info.peer)
        if expiry is not None and info.peer in trace.named:
            trace.named[info.peer].age = max(0.0, MAX_TTL - (expiry - now))

    def read(found: Found) -> None:
        for info in found.providers[0] if found.providers else ():
            if info.peer != me:
                _name(trace, info)

    await _walk(router, me, key_position(key), (key,), trace, read)
    return trace


async def _walk(
    router: DHTRouter, me: str, position: int, keys: tuple[bytes, ...], trace: Trace, read: Callable[[Found], None]
) -> None:
    lookup = Lookup(position, router.table.closest(position, K), me=me)
    message = Find(keys, position.to_bytes(32, "big"))
    began = Stopwatch()

    async def ask(info: PeerInfo) -> None:
        watch = Stopwatch()
        try:
            found = await router.ask(info, message)
        except RemoteError as exc:
            trace.failures[info.peer] = str(exc)
            lookup.failed(info.peer)
        else:
            trace.answered[info.peer] = watch.seconds
            read(found)
            lookup.answered(info.peer, found.closer)
        start()

    def start() -> None:
        for info in lookup.next_queries():
            nursery.start_soon(ask, info)

    with trio.move_on_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            start()
    trace.seconds = began.seconds


def _name(trace: Trace, info: PeerInfo, by: int = 1) -> None:
    if info.peer in trace.named or len(trace.named) < MAX_NAMED:
        named = trace.named.setdefault(info.peer, Named())
        named.addrs = tuple(dict.fromkeys(named.addrs + info.addrs))[:MAX_ADDRS]
        named.by += by

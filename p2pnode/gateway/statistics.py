"""What a gateway has been asked, and what it gave: counted since its start."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass

from p2pnode.gateway.http import Body, Response
from p2pnode.gateway.routes import Kind


class Origin(enum.StrEnum):
    """Where a NAR was when Nix asked for it: whole in the store, in the swarm, or only in an upstream cache."""

    STORE = "store"
    SWARM = "swarm"
    UPSTREAM = "upstream"


@dataclass(frozen=True, slots=True)
class Served:
    """NARs whose sending began (each range counts), and the bytes of them that clients took: compressed ones, where
    they were asked for compressed."""

    nars: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class GatewayStatistics:
    """A snapshot. `requests`: all, good and bad; `nar_misses`: NARs that could not be had; `in_progress`: NARs being
    sent now; `connections`: of clients, idle ones included."""

    requests: int
    narinfo_hits: int
    narinfo_misses: int
    nar_misses: int
    store: Served
    swarm: Served
    upstream: Served
    in_progress: int
    connections: int

    @property
    def nars(self) -> int:
        return self.store.nars + self.swarm.nars + self.upstream.nars

    @property
    def bytes(self) -> int:
        return self.store.bytes + self.swarm.bytes + self.upstream.bytes

    def to_dict(self) -> dict[str, object]:
        """As `p2pnode --json status` prints it; the sums are in it, so that no reader need add."""
        return asdict(self) | {"nars": self.nars, "bytes": self.bytes}


class Counts:
    """The counters, for one gateway. Not thread-safe: its requests are tasks of one thread."""

    def __init__(self) -> None:
        self._requests = 0
        self._narinfos: Counter[bool] = Counter()
        self._nar_misses = 0
        self._nars: Counter[Origin] = Counter()
        self._bytes: Counter[Origin] = Counter()
        self._in_progress = 0

    def asked(self) -> None:
        self._requests += 1

    def answered(self, kind: Kind, response: Response) -> None:
        """What became of a look-up or of a NAR, the bytes of a body aside."""
        if kind is Kind.NARINFO:
            self._narinfos[response.status == 200] += 1
        elif kind is not Kind.CACHE_INFO and response.status == 404:
            self._nar_misses += 1

    async def body(self, origin: Origin, pieces: Body) -> AsyncIterator[bytes | memoryview]:
        """`pieces` as they come. A piece counts when the next one is taken: then it has gone out."""
        with self._sending(origin):
            async with aclosing(pieces) as source:  # type: ignore[type-var]
                async for piece in source:
                    yield piece
                    self._bytes[origin] += len(piece)

    @contextmanager
    def _sending(self, origin: Origin) -> Iterator[None]:
        self._nars[origin] += 1
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1

    def snapshot(self, connections: int) -> GatewayStatistics:
        return GatewayStatistics(
            requests=self._requests,
            narinfo_hits=self._narinfos[True],
            narinfo_misses=self._narinfos[False],
            nar_misses=self._nar_misses,
            **{str(each): Served(self._nars[each], self._bytes[each]) for each in Origin},
            in_progress=self._in_progress,
            connections=connections,
        )

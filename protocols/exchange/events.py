"""What a `Swarm` is told (events) and what it answers (actions). A *key* is a block's binary CID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocols.exchange.messages import Priority
from protocols.exchange.picker import Order


@dataclass(frozen=True, slots=True)
class AddDownload:
    """Fetch `keys` (with `sizes` in bytes, in the image's order), except where `here` is true."""

    id: bytes
    keys: Sequence[bytes]
    sizes: Sequence[int]
    here: Sequence[int]
    order: Order = Order.RAREST
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class RemoveDownload:
    id: bytes


@dataclass(frozen=True, slots=True)
class PeerJoined:
    peer: str


@dataclass(frozen=True, slots=True)
class PeerLeft:
    peer: str


@dataclass(frozen=True, slots=True)
class PeerHas:
    """All a peer has of a download: a bit field of `count` bits, or None for everything.

    `count` 0 with None: everything, however many that is (manifest blocks, before their number is known).
    """

    peer: str
    id: bytes
    count: int
    bits: bytes | None


@dataclass(frozen=True, slots=True)
class PeerGot:
    """More that a peer has of a download, as (first, number) ranges."""

    peer: str
    id: bytes
    ranges: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class PeerHolds:
    """Provider records say that a peer outside an image's own swarm holds these blocks."""

    peer: str
    keys: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class PeerNear:
    """A peer is on our own network (or no longer): what it has should come from it and not over the line to others."""

    peer: str
    near: bool


@dataclass(frozen=True, slots=True)
class PeerRtt:
    """The round trip time to a peer is `seconds`, as the network tells."""

    peer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PeerProgress:
    """Some bytes of a block came from a peer: it has not stalled."""

    peer: str


@dataclass(frozen=True, slots=True)
class BlockChecked:
    """A whole block came from a peer and was hashed: `good`, or not what its key promises."""

    peer: str
    key: bytes
    size: int
    good: bool


@dataclass(frozen=True, slots=True)
class PeerLacks:
    """A peer answered DONT_HAVE."""

    peer: str
    keys: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class PeerBusy:
    """A peer dropped our wants and asks to be left alone for `seconds`."""

    peer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PeerMisbehaved:
    """A peer broke the protocol in a way that need not be malice; `points` are taken off its score."""

    peer: str
    points: int
    reason: str


@dataclass(frozen=True, slots=True)
class BlocksHere:
    """Blocks arrived by another way (an import, another protocol)."""

    keys: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class BlocksLost:
    """Blocks that were here turned out damaged or gone: fetch them again."""

    keys: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    AddDownload
    | RemoveDownload
    | PeerJoined
    | PeerLeft
    | PeerHas
    | PeerGot
    | PeerHolds
    | PeerNear
    | PeerRtt
    | PeerProgress
    | BlockChecked
    | PeerLacks
    | PeerBusy
    | PeerMisbehaved
    | BlocksHere
    | BlocksLost
    | Tick
)


@dataclass(frozen=True, slots=True)
class Request:
    """Send a WANT."""

    peer: str
    keys: tuple[bytes, ...]
    priority: Priority


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Send a CANCEL."""

    peer: str
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Ban:
    """Close the session and refuse the peer for `seconds`. Its `PeerLeft` is already taken as handled."""

    peer: str
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class FindProviders:
    """Look for peers of a download, and for holders of `keys`, which nobody connected has (may be empty)."""

    id: bytes
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class DownloadDone:
    """Every block of the download is here."""

    id: bytes


Action = Request | CancelRequest | Ban | FindProviders | DownloadDone

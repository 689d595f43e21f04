"""Messages of `/p2pnode/announce/1` and their frames.

A frame is a 4-byte big-endian length and that many bytes of canonical CBOR: one message, a map whose "t" names its
type. The side that opened the stream sends requests and the other answers each with one message, in order. The first
request is HELLO; the opener may send the next one behind it without waiting.

    HELLO    -> HELLO            who I am reachable as; also a ping
    ANNOUNCE -> ACK              I have these keys, for so long (the provider is the stream's authenticated peer)
    WITHDRAW -> ACK              I no longer have these keys (or: any key)
    FIND     -> FOUND            who has these keys, and whom do you know near this position?

Any request may be answered by an ACK with a refusal instead. Whatever else arrives breaks the protocol and ends the
stream.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocols import dagcbor
from protocols.errors import FrameError

MAX_FRAME = 256 * 1024  # bytes of CBOR; some 6,500 keys of an image's chunks, a quarter second at 1 MiB/s
HEADER = 4
MIN_KEY = 32  # a bare SHA-256
MAX_KEY = 64  # our longest are 36 (CIDv1 of a BLAKE3 hash); a CIDv1 with a 32-byte hash never passes 48
MAX_KEYS = 4096  # of one ANNOUNCE or WITHDRAW: decoding takes a Python node about 5 ms, so others are not starved
MAX_FIND_KEYS = 64  # of one FIND: its answer has to fit one frame
MAX_PEER_ID = 128  # characters; base58 of an Ed25519 id has 52, of an RSA id 46
# A relayed address names two peer ids: /ip6/<39>/tcp/<5>/p2p/<52>/p2p-circuit/p2p/<52> has 180 characters.
MAX_ADDR = 256
MAX_ADDRS = 16  # per peer; libp2p's peer stores keep as many for one peer
MAX_ADDR_BYTES = 2048  # all addresses of one peer together: what one sender can make us remember
MAX_PROVIDERS = 20  # per key in one answer; as many as libp2p's kad-dht answers
MAX_CLOSER = 20  # Kademlia's k
MAX_TTL = 1800  # seconds. Kademlia forgets after 24 h, IPFS after 48 h; our nodes come and go with their images
MAX_RETRY_AFTER = 3600 * 1000  # milliseconds


class Refusal(enum.Enum):
    """Why a request was not (wholly) served."""

    RATE = "rate"  # more bytes than this node takes from one peer
    FULL = "full"  # this node stores no more records, from this peer or at all


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A peer id (base58 text) and multiaddrs it may be reached at."""

    peer: str
    addrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """The sender's own addresses. Answered by the other's HELLO."""

    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Announce:
    """The sender has the content of `keys` and says so for `ttl` seconds."""

    keys: tuple[bytes, ...]
    ttl: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Forget the sender's records of `keys`; all of them if None."""

    keys: tuple[bytes, ...] | None


@dataclass(frozen=True, slots=True)
class Find:
    """Who has each of `keys`, and which peers are nearest to the 32-byte position `target` (None: not asked)."""

    keys: tuple[bytes, ...]
    target: bytes | None


@dataclass(frozen=True, slots=True)
class Ack:
    """The first `accepted` keys of the request took effect; the rest did not, for the reason given.

    With a refusal, the same request makes sense again after `retry_after` milliseconds.
    """

    accepted: int
    refusal: Refusal | None = None
    retry_after: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """`providers[i]` have the i-th key of the FIND; `closer` are near its target."""

    providers: tuple[tuple[PeerInfo, ...], ...]
    closer: tuple[PeerInfo, ...]


Message = Hello | Announce | Withdraw | Find | Ack | Found


def encode(message: Message) -> bytes:
    """The whole frame of `message`. Raises `FrameError` if it is larger than a frame may be."""
    payload = dagcbor.encode(_to_map(message))
    if len(payload) > MAX_FRAME:
        raise FrameError(f"a message of {len(payload)} bytes does not fit a frame of {MAX_FRAME}")
    return len(payload).to_bytes(HEADER, "big") + payload


def decode(payload: bytes) -> Message:
    """The message in a frame's `payload`. Raises `FrameError` or `DecodeError`; nothing else, whatever the bytes."""
    value = dagcbor.decode(payload)
    if not isinstance(value, dict):
        raise FrameError("an announce message that is not a map")
    kind = value.pop("t", None)
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise FrameError("an announce message of unknown type")
    message = read(value)
    if value:
        raise FrameError(f"an announce message {kind!r} with unknown fields")
    return message


def fit(providers: Sequence[Sequence[PeerInfo]], closer: Sequence[PeerInfo]) -> Found:
    """A FOUND that fits one frame: every key's first provider before any key's second, `closer` before them all."""
    room = MAX_FRAME - 1024
    known: set[str] = set()
    kept: list[list[PeerInfo]] = [[] for _ in providers]
    near = tuple(closer[:MAX_CLOSER])
    room -= sum(_size(info) for info in near) + 3 * len(kept)
    for turn in range(MAX_PROVIDERS):
        for index, infos in enumerate(providers):
            if turn >= len(infos):
                continue
            info = infos[turn]
            cost = 3 if info.peer in known else 3 + _size(info)
            if cost <= room:
                room -= cost
                known.add(info.peer)
                kept[index].append(info)
    return Found(tuple(tuple(infos) for infos in kept), near)


def clean_addrs(addrs: Sequence[str]) -> tuple[str, ...]:
    """What of our own address list a HELLO may carry."""
    kept: list[str] = []
    room = MAX_ADDR_BYTES
    for addr in dict.fromkeys(addrs):
        if len(kept) < MAX_ADDRS and _is_addr(addr) and len(addr) <= room:
            kept.append(addr)
            room -= len(addr)
    return tuple(kept)


def batches(keys: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """`keys` cut into pieces that each fit one ANNOUNCE or WITHDRAW."""
    result: list[tuple[bytes, ...]] = []
    start, room = 0, MAX_FRAME - 256
    for index, key in enumerate(keys):
        cost = len(key) + 2
        if index - start == MAX_KEYS or cost > room:
            result.append(tuple(keys[start:index]))
            start, room = index, MAX_FRAME - 256
        room -= cost
    if start < len(keys):
        result.append(tuple(keys[start:]))
    return result


class FrameBuffer:
    """Cuts received bytes into frames; holds at most one frame and one read more."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def partial(self) -> bool:
        """Is a frame begun?"""
        return bool(self._buffer)

    def next_frame(self) -> bytes | None:
        """The next whole frame's payload, or None until more was fed. Raises `FrameError` for an oversized one."""
        if len(self._buffer) < HEADER:
            return None
        length = int.from_bytes(self._buffer[:HEADER], "big")
        if length > MAX_FRAME:
            raise FrameError(f"a frame of {length} bytes; at most {MAX_FRAME} are allowed")
        if len(self._buffer) < HEADER + length:
            return None
        payload = bytes(self._buffer[HEADER : HEADER + length])
        del self._buffer[: HEADER + length]
        return payload


def _size(info: PeerInfo) -> int:
    return 8 + len(info.peer) + sum(3 + len(addr) for addr in info.addrs)


def _to_map(message: Message) -> dict[str, Any]:
    match message:
        case Hello():
            return {"t": "hello", "addrs": list(message.addrs)}
        case Announce():
            return {"t": "announce", "keys": list(message.keys), "ttl": message.ttl}
        case Withdraw():
            return {"t": "withdraw", "keys": None if message.keys is None else list(message.keys)}
        case Find():
            return {"t": "find", "keys": list(message.keys), "target": message.target}
        case Ack():
            if message.refusal is None:
                return {"t": "ack", "accepted": message.accepted}
            return {
                "t": "ack",
                "accepted": message.accepted,
                "refusal": message.refusal.value,
                "retry_after": message.retry_after,
            }
        case Found():
            # Each provider's addresses go over the wire once, however many keys it has.
            table: dict[str, int] = {}
            peers: list[list[Any]] = []
            index: list[list[int]] = []
            for infos in message.providers:
                row = []
                for info in infos:
                    if info.peer not in table:
                        table[info.peer] = len(peers)
                        peers.append([info.peer, list(info.addrs)])
                    row.append(table[info.peer])
                index.append(row)
            closer = [[info.peer, list(info.addrs)] for info in message.closer]
            return {"t": "found", "peers": peers, "providers": index, "closer": closer}


def _take_list(value: dict[str, Any], name: str, limit: int) -> list[Any]:
    items = value.pop(name, None)
    if not isinstance(items, list) or len(items) > limit:
        raise FrameError(f"{name!r} is not a list of at most {limit}")
    return items


def _take_int(value: dict[str, Any], name: str, low: int, high: int) -> int:
    number = value.pop(name, None)
    if type(number) is not int or not low <= number <= high:
        raise FrameError(f"{name!r} is not a number from {low} to {high}")
    return number


def _keys(items: list[Any]) -> tuple[bytes, ...]:
    for key in items:
        if not isinstance(key, bytes) or not MIN_KEY <= len(key) <= MAX_KEY:
            raise FrameError(f"a key that is not {MIN_KEY} to {MAX_KEY} bytes")
    return tuple(items)


def _is_addr(addr: Any) -> bool:
    return (
        isinstance(addr, str)
        and 1 < len(addr) <= MAX_ADDR
        and addr[0] == "/"
        and addr.isascii()
        and addr.isprintable()
        and " " not in addr
    )


def _addrs(items: Any) -> tuple[str, ...]:
    if not isinstance(items, list) or len(items) > MAX_ADDRS:
        raise FrameError(f"addresses that are not a list of at most {MAX_ADDRS}")
    if not all(_is_addr(addr) for addr in items) or sum(map(len, items)) > MAX_ADDR_BYTES:
        raise FrameError("an address that is no multiaddr, or addresses past their limit")
    return tuple(items)


def _peer(item: Any) -> PeerInfo:
    if not isinstance(item, list) or len(item) != 2:
        raise FrameError("a peer that is not a pair of id and addresses")
    peer, addrs = item
    if not isinstance(peer, str) or not 1 <= len(peer) <= MAX_PEER_ID or not (peer.isascii() and peer.isprintable()):
        raise FrameError("a peer id that is not text of a fitting length")
    return PeerInfo(peer, _addrs(addrs))


def _read_hello(value: dict[str, Any]) -> Hello:
    return Hello(_addrs(value.pop("addrs", None)))


def _read_announce(value: dict[str, Any]) -> Announce:
    return Announce(_keys(_take_list(value, "keys", MAX_KEYS)), _take_int(value, "ttl", 1, MAX_TTL))


def _read_withdraw(value: dict[str, Any]) -> Withdraw:
    if "keys" in value and value["keys"] is None:
        del value["keys"]
        return Withdraw(None)
    return Withdraw(_keys(_take_list(value, "keys", MAX_KEYS)))


def _read_find(value: dict[str, Any]) -> Find:
    keys = _keys(_take_list(value, "keys", MAX_FIND_KEYS))
    if "target" not in value:
        raise FrameError("a find without target")
    target = value.pop("target")
    if target is not None and (not isinstance(target, bytes) or len(target) != 32):
        raise FrameError("a target that is not 32 bytes")
    return Find(keys, target)


def _read_ack(value: dict[str, Any]) -> Ack:
    accepted = _take_int(value, "accepted", 0, MAX_KEYS)
    if "refusal" not in value:
        return Ack(accepted)
    reason = value.pop("refusal")
    try:
        refusal = Refusal(reason)
    except ValueError as exc:
        raise FrameError("a refusal for an unknown reason") from exc
    return Ack(accepted, refusal, _take_int(value, "retry_after", 0, MAX_RETRY_AFTER))


def _read_found(value: dict[str, Any]) -> Found:
    peers = [_peer(item) for item in _take_list(value, "peers", MAX_FIND_KEYS * MAX_PROVIDERS)]
    if len({info.peer for info in peers}) != len(peers):
        raise FrameError("a peer listed twice")
    providers = []
    for row in _take_list(value, "providers", MAX_FIND_KEYS):
        if not isinstance(row, list) or len(row) > MAX_PROVIDERS:
            raise FrameError(f"providers that are not a list of at most {MAX_PROVIDERS}")
        if not all(type(index) is int and 0 <= index < len(peers) for index in row) or len(set(row)) != len(row):
            raise FrameError("a provider that is not in the list of peers, or twice")
        providers.append(tuple(peers[index] for index in row))
    closer = tuple(_peer(item) for item in _take_list(value, "closer", MAX_CLOSER))
    return Found(tuple(providers), closer)


_READERS: dict[str, Callable[[dict[str, Any]], Message]] = {
    "hello": _read_hello,
    "announce": _read_announce,
    "withdraw": _read_withdraw,
    "find": _read_find,
    "ack": _read_ack,
    "found": _read_found,
}

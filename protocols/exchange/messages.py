"""Frames of the exchange protocol.

A frame is an 8-byte prefix (u32 length of what follows the prefix, u8 type, u24 header length; big endian), the
header in canonical CBOR, and for BLOCK the payload. Payloads stay out of the CBOR so that they go from disk to socket
and from socket to disk without being copied through an encoder.

Type numbers from 0x80 up are *ignorable*: a node that does not know one skips it. Any other unknown type ends the
session.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from protocols import dagcbor
from protocols.cid import CID, CID_SIZE, DIGEST_SIZE, Codec
from protocols.errors import CIDError, DecodeError, FrameError
from protocols.manifest import MAX_CHUNK, MAX_CHUNKS, MAX_OBJECTS

Buffer = bytes | bytearray | memoryview
Payload = Sequence[Buffer]

VERSION = 1
PREFIX_SIZE = 8
MAX_HEADER = 1 << 20  # the bit field of MAX_CHUNKS chunks takes half of it
MAX_IDS = 4096  # per WANT, DONT_HAVE or CANCEL frame
MAX_RANGES = 4096
MAX_TEXT = 256
MAX_RECORDS = 4096  # paths per RECORDS frame
MAX_SIGNATURES = 64  # per path and frame, as in a narinfo
MAX_SIGNATURE = 352  # a key's name of 256 characters, a colon, and 64 bytes in base 64
MAX_REFERENCES = 16384  # per path, in images that do not have them
MAX_BASE_NAME = 244  # 32 digits, a dash, a name of 211
MAX_CA = 256
RECORDS_SIZE = 512 << 10  # of one frame, so that a long list of records does not hold up what is behind it
IGNORABLE = 0x80
BLOCK_SIZE_AT = 40  # in a BLOCK's usual header: array of 3, byte string of 36, one byte of encoding, then the size
MIN_PIECE = 4096  # smaller pieces of a payload are joined, so that a million one-byte reads cost what they hold
JOINED_PIECE = 64 << 10


_BLOCK_HEADER = bytes((0x83, 0x58, CID_SIZE))
_UINT_WIDTHS = {0x18: 1, 0x19: 2, 0x1A: 4}  # RFC 8949, section 3: bytes that follow
_CID_PREFIXES = {CID(codec, bytes(DIGEST_SIZE)).to_bytes()[: CID_SIZE - DIGEST_SIZE] for codec in Codec}


class Encoding(enum.IntEnum):
    """How a BLOCK's payload is coded. DELTA (zstd with base chunks) is reserved."""

    RAW = 0
    ZSTD = 1
    DELTA = 2


class Priority(enum.IntEnum):
    """Lower is served first. INTERACTIVE: somebody waits for this very chunk (VM boot, HTTP gateway)."""

    INTERACTIVE = 0
    NORMAL = 1
    BACKGROUND = 2


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame both ways. `features` and `namespaces` are for later versions; unknown ones are ignored."""

    TYPE: ClassVar[int] = 1
    version: int = VERSION
    agent: str = ""
    features: tuple[str, ...] = ()
    encodings: tuple[int, ...] = (Encoding.RAW, Encoding.ZSTD)
    namespaces: tuple[str, ...] = ()
    max_wants: int = MAX_IDS


@dataclass(frozen=True, slots=True)
class Interest:
    """Tell me (or, `active` false, no longer tell me) what you have of image `root`."""

    TYPE: ClassVar[int] = 2
    root: CID
    active: bool = True


@dataclass(frozen=True, slots=True)
class Availability:
    """What the sender has of `root`: one bit per distinct chunk, most significant bit first, unused bits zero.

    `bits` None: all `count` of them, or with `count` 0: nothing, not even the manifest. (An image that has no chunks,
    as an empty file has none, is `count` 0 with empty `bits`.)
    """

    TYPE: ClassVar[int] = 3
    root: CID
    count: int
    bits: bytes | None = None


@dataclass(frozen=True, slots=True)
class Have:
    """Chunks of `root` the sender has got since its AVAILABILITY, as (first, number) ranges of bit numbers."""

    TYPE: ClassVar[int] = 4
    root: CID
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PathRecord:
    """What the sender says of one store path of an image, none of it vouched for by the image's id.

    `number`: of the object in the image. `signatures`: `NAME:BASE64` each. `references`: base names of all paths it
    refers to, sorted; None: those that the image has, which is all of them in a closure. `deriver`: base name. `ca`:
    a content address beyond that in the image.
    """

    number: int
    signatures: tuple[str, ...] = ()
    references: tuple[str, ...] | None = None
    deriver: str | None = None
    ca: str | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """Records beside an image: sent after AVAILABILITY, and again when there are new ones. Ignorable.

    `paths` ascend by number. `more`: another frame follows at once; the last one may be empty, and says that this is
    all the sender has.
    """

    TYPE: ClassVar[int] = 0x85
    root: CID
    paths: tuple[PathRecord, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Want:
    """Send these blocks, in this order. Answered block by block with BLOCK or DONT_HAVE."""

    TYPE: ClassVar[int] = 6
    ids: tuple[bytes, ...]
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class Block:
    """A block's bytes, in pieces as the stream cut them. `size` is that of the decoded payload, in bytes."""

    TYPE: ClassVar[int] = 7
    id: bytes
    encoding: Encoding
    size: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class DontHave:
    """I cannot send these blocks; ask somebody else."""

    TYPE: ClassVar[int] = 8
    ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """I no longer want these blocks. Those on their way may still arrive."""

    TYPE: ClassVar[int] = 9
    ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Busy:
    """Your wants were dropped; ask again after `retry_after` milliseconds."""

    TYPE: ClassVar[int] = 10
    retry_after: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender closes the session, and why."""

    TYPE: ClassVar[int] = 11
    reason: str


Message = Hello | Interest | Availability | Have | Records | Want | Block | DontHave | Cancel | Busy | Goodbye


def encode(message: Message) -> list[Buffer]:
    """The buffers of a message's frame, to be sent one after the other; a BLOCK's payload is not copied."""
    payload: Payload = ()
    if isinstance(message, Block):
        header, payload = _encoded_block_header(message), message.payload
    else:
        header = dagcbor.encode(_header(message))
    total = len(header) + sum(map(len, payload))
    prefix = total.to_bytes(4, "big") + bytes((message.TYPE,)) + len(header).to_bytes(3, "big")
    return [prefix + header, *payload]


def _encoded_block_header(block: Block) -> bytes:
    """`[id, encoding, size]` as `dagcbor.encode` has it, which took a tenth of a provider's Python."""
    size = block.size
    if len(block.id) != CID_SIZE or block.encoding >= 24 or not 0x10000 <= size <= 0xFFFFFFFF:
        return dagcbor.encode([block.id, int(block.encoding), size])
    return b"%b%b%c\x1a%b" % (_BLOCK_HEADER, block.id, block.encoding, size.to_bytes(4, "big"))


def _header(message: Message) -> Any:
    match message:
        case Hello():
            return {
                "v": message.version,
                "agent": message.agent,
                "features": list(message.features),
                "encodings": list(message.encodings),
                "namespaces": list(message.namespaces),
                "max_wants": message.max_wants,
            }
        case Interest(root=root, active=active):
            return [root, active]
        case Availability(root=root, count=count, bits=bits):
            return [root, count, bits]
        case Have(root=root, ranges=ranges):
            return [root, [list(pair) for pair in ranges]]
        case Records(root=root, paths=paths, more=more):
            return [root, {"more": more, "paths": [_path_record_value(each) for each in paths]}]
        case Want(ids=ids, priority=priority):
            return [list(ids), int(priority)]
        case DontHave(ids=ids) | Cancel(ids=ids):
            return list(ids)
        case Busy(retry_after=retry_after):
            return retry_after
        case Goodbye(reason=reason):
            return reason[:MAX_TEXT]


def _path_record_value(record: PathRecord) -> Any:
    optional = {
        "sigs": list(record.signatures) or None,
        "refs": None if record.references is None else list(record.references),
        "deriver": record.deriver,
        "ca": record.ca,
    }
    return [record.number, {key: value for key, value in optional.items() if value is not None}]


def records_frames(root: CID, paths: Sequence[PathRecord]) -> Iterator[Records]:
    """RECORDS frames that say all of `paths`, which ascend by number, within the limits of a frame; at least one."""
    batch: list[PathRecord] = []
    size = 0
    for record in paths:
        texts = (*record.signatures, *(record.references or ()), record.deriver or "", record.ca or "")
        taken = sum(map(len, texts)) + 3 * len(texts) + 64
        if taken > RECORDS_SIZE:
            continue  # one path that refers to 10,000 others: whoever wants it can have its closure
        if batch and (size + taken > RECORDS_SIZE or len(batch) == MAX_RECORDS):
            yield Records(root, tuple(batch), more=True)
            batch, size = [], 0
        batch.append(record)
        size += taken
    yield Records(root, tuple(batch))


class FrameReader:
    """Cuts a byte stream into messages. `feed` never keeps more than one frame; sizes are checked before any buffer
    for them exists. Payloads are slices of what was fed, not copies: that must not change afterwards."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._block: tuple[bytes, Encoding, int] | None = None
        self._payload: list[Buffer] = []
        self._filled = 0
        self._left = 0  # of the payload

    @property
    def buffered(self) -> int:
        """Bytes held of a frame that is not complete."""
        return len(self._buffer) + self._filled

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return self._block is not None or len(self._buffer) > 0

    def feed(self, data: Buffer) -> Iterator[Message]:
        """Messages completed by `data`. Raises `FrameError`; the stream is of no use after that."""
        view = memoryview(data)
        while True:
            if self._block is not None:
                piece, view = view[: self._left], view[self._left :]
                self._keep(piece)
                if self._left:
                    return
                key, encoding, size = self._block
                message = Block(key, encoding, size, self._payload)
                self._block, self._payload, self._filled = None, [], 0
                yield message
                continue
            need = self._frame_size() - len(self._buffer)
            self._buffer += view[:need]
            view = view[need:]
            if len(self._buffer) < self._frame_size():
                if not len(view):
                    return
                continue
            parsed = self._parse()
            self._buffer.clear()
            if parsed is not None:
                yield parsed

    def _keep(self, piece: memoryview) -> None:
        size = len(piece)
        self._left -= size
        self._filled += size
        if size >= MIN_PIECE:
            self._payload.append(piece)
            return
        last = self._payload[-1] if self._payload else None
        if isinstance(last, bytearray) and len(last) < JOINED_PIECE:
            last += piece
        elif size:
            self._payload.append(bytearray(piece))

    def _frame_size(self) -> int:
        """Bytes wanted in the buffer: the prefix, then prefix and header (a skipped frame's body counts as header)."""
        if len(self._buffer) < PREFIX_SIZE:
            return PREFIX_SIZE
        total = int.from_bytes(self._buffer[:4], "big")
        kind = self._buffer[4]
        header = int.from_bytes(self._buffer[5:8], "big")
        if header > MAX_HEADER or header > total:
            raise FrameError(f"a frame header of {header} bytes in a frame of {total}")
        if kind == Block.TYPE:
            if total - header > MAX_CHUNK:
                raise FrameError(f"a block payload of {total - header} bytes is over the limit of {MAX_CHUNK}")
        elif total != header:
            raise FrameError(f"a frame of type {kind} with a payload")
        return PREFIX_SIZE + header

    def _parse(self) -> Message | None:
        kind = self._buffer[4]
        decoder = _DECODERS.get(kind)
        if decoder is None:
            if kind & IGNORABLE:
                return None
            raise FrameError(f"unknown frame type {kind}")
        total = int.from_bytes(self._buffer[:4], "big")
        header = bytes(self._buffer[PREFIX_SIZE:])
        try:
            value = (_usual_block_header(header) if kind == Block.TYPE else None) or dagcbor.decode(header)
        except DecodeError as exc:
            raise FrameError(f"frame of type {kind}: {exc}") from exc
        if kind != Block.TYPE:
            return decoder(value)
        key, encoding, size = _block_header(value)
        length = total - len(header)
        if encoding is Encoding.RAW and length != size:
            raise FrameError(f"a raw block of {size} bytes with a payload of {length}")
        if length == 0:
            raise FrameError("a block without a payload")
        self._block, self._payload, self._filled, self._left = (key, encoding, size), [], 0, length
        return None


def _bad(name: str) -> FrameError:
    return FrameError(f"a malformed {name} frame")


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _texts(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64 and all(isinstance(v, str) and len(v) <= MAX_TEXT for v in value)
    )


def _hello(value: Any) -> Hello:
    # Later versions may add fields: HELLO is where they are negotiated.
    match value:
        case {
            "v": int(version),
            "agent": str(agent),
            "features": features,
            "encodings": list(encodings),
            "namespaces": namespaces,
            "max_wants": max_wants,
        } if (
            len(agent) <= MAX_TEXT
            and _texts(features)
            and _texts(namespaces)
            and len(encodings) <= 64
            and all(_is_int(e, 0, 255) for e in encodings)
            and _is_int(max_wants, 1, 1 << 32)
            and _is_int(version, 1, 1 << 16)
        ):
            return Hello(version, agent, tuple(features), tuple(encodings), tuple(namespaces), max_wants)
    raise _bad("HELLO")


def _interest(value: Any) -> Interest:
    match value:
        case [CID() as root, bool(active)]:
            return Interest(root, active)
    raise _bad("INTEREST")


def _availability(value: Any) -> Availability:
    match value:
        case [CID() as root, count, None] if _is_int(count, 0, MAX_CHUNKS):
            return Availability(root, count)
        case [CID() as root, count, bytes(bits)] if _is_int(count, 0, MAX_CHUNKS):
            spare = -count % 8
            if len(bits) != (count + 7) // 8 or (spare and bits[-1] & ((1 << spare) - 1)):
                raise FrameError("an AVAILABILITY frame whose bits do not fit its count")
            return Availability(root, count, bits)
    raise _bad("AVAILABILITY")


def _have(value: Any) -> Have:
    match value:
        case [CID() as root, list(pairs)] if 0 < len(pairs) <= MAX_RANGES:
            ranges = []
            behind = 0
            for pair in pairs:
                match pair:
                    case [int(first), int(number)] if behind <= first and 0 < number <= MAX_CHUNKS - first:
                        behind = first + number
                        ranges.append((first, number))
                    case _:
                        raise _bad("HAVE")
            return Have(root, tuple(ranges))
    raise _bad("HAVE")


def _records(value: Any) -> Records:
    # Later versions may add fields to the maps.
    match value:
        case [CID() as root, {"paths": list(items), "more": bool(more)}] if len(items) <= MAX_RECORDS:
            paths = []
            behind = 0
            for item in items:
                paths.append(_path_record(item, behind))
                behind = paths[-1].number + 1
            return Records(root, tuple(paths), more)
    raise _bad("RECORDS")


def _path_record(value: Any, lowest: int) -> PathRecord:
    match value:
        case [number, dict(said)] if _is_int(number, lowest, MAX_OBJECTS - 1):
            references = said.get("refs")
            return PathRecord(
                number,
                _words(said.get("sigs", []), MAX_SIGNATURES, MAX_SIGNATURE),
                None if "refs" not in said else _words(references, MAX_REFERENCES, MAX_BASE_NAME, ascending=True),
                None if "deriver" not in said else _words([said["deriver"]], 1, MAX_BASE_NAME)[0],
                None if "ca" not in said else _words([said["ca"]], 1, MAX_CA)[0],
            )
    raise _bad("RECORDS")


def _words(value: Any, most: int, longest: int, *, ascending: bool = False) -> tuple[str, ...]:
    """Distinct texts of printable ASCII without blanks: what Nix's formats can hold of them."""
    if not isinstance(value, list) or len(value) > most:
        raise _bad("RECORDS")
    for text in value:
        if not isinstance(text, str) or not 0 < len(text) <= longest or not text.isascii() or not text.isprintable():
            raise _bad("RECORDS")
        if " " in text:
            raise _bad("RECORDS")
    if len(set(value)) != len(value) or (ascending and value != sorted(value)):
        raise _bad("RECORDS")
    return tuple(value)


def _id_list(value: Any, name: str) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_IDS:
        raise _bad(name)
    for key in value:
        _check_id(key, name)
    return tuple(value)


def _check_id(key: Any, name: str) -> None:
    if not isinstance(key, bytes) or len(key) != CID_SIZE:
        raise _bad(name)
    if key[: CID_SIZE - DIGEST_SIZE] in _CID_PREFIXES:
        return
    try:
        CID.from_bytes(key)
    except CIDError as exc:
        raise FrameError(f"a {name} frame: {exc}") from exc


def _want(value: Any) -> Want:
    match value:
        case [ids, priority] if _is_int(priority, 0, max(Priority)):
            return Want(_id_list(ids, "WANT"), Priority(priority))
    raise _bad("WANT")


def _usual_block_header(header: bytes) -> list[Any] | None:
    """What `dagcbor.decode` makes of [id, encoding, size] in its canonical form; None: let that have a look.

    There is one of these per chunk, and the general decoder took a tenth of a fetch's Python."""
    if header[:3] != _BLOCK_HEADER or len(header) < BLOCK_SIZE_AT + 1 or header[BLOCK_SIZE_AT - 1] >= 24:
        return None
    width = _UINT_WIDTHS.get(header[BLOCK_SIZE_AT])
    if width is None or len(header) != BLOCK_SIZE_AT + 1 + width:
        return None
    size = int.from_bytes(header[BLOCK_SIZE_AT + 1 :], "big")
    if size < 24 or size >> 4 * width == 0:  # not the shortest form
        return None
    return [header[3 : 3 + CID_SIZE], header[BLOCK_SIZE_AT - 1], size]


def _block_header(value: Any) -> tuple[bytes, Encoding, int]:
    match value:
        case [bytes(key), encoding, size] if _is_int(encoding, 0, max(Encoding)) and _is_int(size, 1, MAX_CHUNK):
            _check_id(key, "BLOCK")
            return key, Encoding(encoding), size
    raise _bad("BLOCK")


def _busy(value: Any) -> Busy:
    if _is_int(value, 0, 1 << 24):
        return Busy(value)
    raise _bad("BUSY")


def _goodbye(value: Any) -> Goodbye:
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        return Goodbye(value)
    raise _bad("GOODBYE")


_DECODERS: dict[int, Callable[[Any], Message]] = {
    Hello.TYPE: _hello,
    Interest.TYPE: _interest,
    Availability.TYPE: _availability,
    Have.TYPE: _have,
    Records.TYPE: _records,
    Want.TYPE: _want,
    Block.TYPE: lambda value: Block(*_block_header(value), ()),
    DontHave.TYPE: lambda value: DontHave(_id_list(value, "DONT_HAVE")),
    Cancel.TYPE: lambda value: Cancel(_id_list(value, "CANCEL")),
    Busy.TYPE: _busy,
    Goodbye.TYPE: _goodbye,
}


def ranges_of(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Bit numbers, in any order, as ascending (first, number) ranges."""
    first = number = -1
    for index in sorted(set(indices)):
        if index == first + number:
            number += 1
            continue
        if number > 0:
            yield first, number
        first, number = index, 1
    if number > 0:
        yield first, number

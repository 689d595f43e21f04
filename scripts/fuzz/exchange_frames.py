"""Frames of the exchange protocol: bytes that claim to be frames, cut anywhere.

Asserted: only `FrameError` is raised; what is held of an incomplete frame is bounded by its kind; how the bytes were
cut makes no difference; a message that was accepted survives being encoded and decoded again.
"""

from __future__ import annotations

from fuzz.choices import Choices
from protocols import dagcbor
from protocols.cid import CID, Codec
from protocols.errors import FrameError
from protocols.exchange import messages as m
from protocols.manifest import MAX_CHUNK

ROOT = CID(Codec.DAG_CBOR, bytes(32))
KEYS = tuple(CID(Codec.RAW, bytes([i]) * 32).to_bytes() for i in range(4))
GENUINE: tuple[m.Message, ...] = (
    m.Hello(agent="fuzz", features=("a",), namespaces=("n",)),
    m.Interest(ROOT),
    m.Availability(ROOT, 12, b"\xff\xf0"),
    m.Availability(ROOT, 3),
    m.Have(ROOT, ((0, 2), (5, 1))),
    m.Records(ROOT, (m.PathRecord(0, ("k:A",), ("a",), "d", "c"), m.PathRecord(5)), more=True),
    m.Want(KEYS, m.Priority.INTERACTIVE),
    m.Block(KEYS[0], m.Encoding.RAW, 5, (b"he", b"llo")),
    m.Block(KEYS[1], m.Encoding.ZSTD, 70_000, (bytes(300),)),
    m.DontHave(KEYS[:1]),
    m.Cancel(KEYS[1:]),
    m.Busy(1000),
    m.Goodbye("enough"),
)
SIZES = (0, 1, 7, 8, 255, 256, 65_535, m.MAX_HEADER, m.MAX_HEADER + 1, MAX_CHUNK, MAX_CHUNK + 1, 0xFFFFFF)
MAX_WIRE = 1 << 17


def check(data: bytes) -> None:
    """Raises AssertionError when an invariant of the module's text is broken."""
    choices = Choices(data)
    cut = choices.of((1, 7, 8, 9, 64, 1000, 65_519))
    wire = bytearray()
    while choices.left and len(wire) < MAX_WIRE:
        wire += piece(choices)
    messages, failure = feed(bytes(wire), cut)
    whole, whole_failure = feed(bytes(wire), max(1, len(wire)))
    assert messages == whole and failure == whole_failure, "the result depends on how the bytes were cut"
    again = b"".join(bytes(part) for message in messages for part in m.encode(message))
    assert feed(again, 4096) == (messages, None), "an accepted message does not survive a round trip"


def piece(choices: Choices) -> bytes:
    kind = choices.below(6)
    if kind == 0:
        return choices.bytes(choices.below(64))
    frame = bytearray(b"".join(bytes(part) for part in m.encode(choices.of(GENUINE))))
    if kind == 1:
        return bytes(frame)
    if kind == 2:  # a byte of it is something else
        frame[choices.below(256) % len(frame)] = choices.below(256)
        return bytes(frame)
    if kind == 3:  # a size that is a lie
        frame[:8] = choices.of(SIZES).to_bytes(4, "big") + frame[4:5] + choices.of(SIZES).to_bytes(3, "big")
        return bytes(frame)
    header = choices.bytes(choices.below(128)) if kind == 4 else dagcbor.encode(value(choices, 3))
    payload = choices.bytes(choices.below(16)) if choices.below(4) == 3 else b""
    number = choices.of((1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 0, 12, 0x7F, 0x80, 0x85, 0xFF))
    total = len(header) + len(payload)
    return total.to_bytes(4, "big") + bytes([number]) + len(header).to_bytes(3, "big") + header + payload


def value(choices: Choices, depth: int) -> object:
    """A value that CBOR can say, of the kinds headers are made of."""
    kind = choices.below(10 if depth else 7)
    if kind == 0:
        return choices.of((0, 1, 2, 255, 1 << 16, 1 << 24, 1 << 32, -1, 1 << 22, (1 << 22) + 1))
    if kind == 1:
        return choices.of((True, False, None))
    if kind == 2:
        return choices.bytes(choices.below(40))
    if kind == 3:
        return choices.of(KEYS)
    if kind == 4:
        return ROOT
    if kind == 5:
        return "x" * choices.of((0, 1, 256, 257))
    if kind == 6:
        return choices.below(256)
    if kind == 7:
        return {name: value(choices, depth - 1) for name in ("v", "agent", "features")[: choices.below(4)]}
    return [value(choices, depth - 1) for _ in range(choices.below(5))]


def feed(wire: bytes, cut: int) -> tuple[list[m.Message], str | None]:
    reader = m.FrameReader()
    messages: list[m.Message] = []
    for pos in range(0, len(wire), cut):
        try:
            for message in reader.feed(wire[pos : pos + cut]):
                if isinstance(message, m.Block):
                    payload = b"".join(message.payload)
                    assert 0 < len(payload) <= MAX_CHUNK
                    assert len(message.payload) <= 4 + len(payload) // 2048, "small pieces cost objects"
                    message = m.Block(message.id, message.encoding, message.size, (payload,))
                messages.append(message)
        except FrameError as exc:
            return messages, str(exc)
        assert reader.buffered <= max(m.PREFIX_SIZE + m.MAX_HEADER, MAX_CHUNK)
    return messages, None

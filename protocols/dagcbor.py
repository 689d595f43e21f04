"""Canonical DAG-CBOR (https://ipld.io/specs/codecs/dag-cbor/spec/), the subset this project uses.

Values: None, bool, int (64 bit), bytes, str, list, dict with str keys, and `CID` (tag 42). No floats: nothing here
needs them, and their canonical form is a trap for second implementations. A list of one or more pairs of a raw CID and
an int below 2^32 is decoded as one `ChunkList`.

Encoding is cbor2's. Decoding is ours, because it must refuse what a general decoder takes: longer forms than
needed, map keys out of order or repeated, indefinite lengths, every tag but 42 (cbor2 would build bignums, dates,
regular expressions and shared references from a stranger's bytes), and anything deep or large before allocating it.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import cbor2

from protocols import chunk_list
from protocols.chunk_list import ChunkList
from protocols.cid import CID
from protocols.errors import CIDError, DecodeError

MAX_DEPTH = 12  # the deepest value of ours is 6 levels; a stack overflow would need some hundred
_SIMPLE = {0xF4: False, 0xF5: True, 0xF6: None}


def _encode_ours(encoder: cbor2.CBOREncoder, value: Any) -> None:
    if isinstance(value, ChunkList):
        encoder.write(value.encode())
        return
    if not isinstance(value, CID):
        raise TypeError(f"cannot encode {type(value).__name__} as DAG-CBOR")
    # The identity multibase prefix 0x00 is part of tag 42 in DAG-CBOR.
    encoder.encode(cbor2.CBORTag(42, b"\x00" + value.to_bytes()))


def encode(value: Any) -> bytes:
    """The canonical DAG-CBOR bytes of `value`; map keys are sorted by length, then bytewise."""
    buffer = BytesIO()
    cbor2.CBOREncoder(buffer, canonical=True, default=_encode_ours).encode(value)
    return buffer.getvalue()


def decode(data: bytes | memoryview) -> Any:
    """The value of canonical DAG-CBOR `data`, all of it. Raises `DecodeError` for anything else.

    Memory is proportional to `len(data)`; the caller bounds that.
    """
    buffer = bytes(data)
    value, end = _item(buffer, 0, 0)
    if end != len(buffer):
        raise DecodeError(f"{len(buffer) - end} bytes after the end of the CBOR value")
    return value


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """(major type, argument, offset behind it) of the item head at `at`."""
    if at >= len(data):
        raise DecodeError("CBOR ends too early")
    first = data[at]
    major, info = first >> 5, first & 31
    at += 1
    if info < 24:
        return major, info, at
    if info > 27:
        raise DecodeError("CBOR of indefinite or reserved length")
    width = 1 << (info - 24)
    if at + width > len(data):
        raise DecodeError("CBOR ends too early")
    argument = int.from_bytes(data[at : at + width], "big")
    if major != 7 and argument < (24, 1 << 8, 1 << 16, 1 << 32)[info - 24]:
        raise DecodeError("CBOR number not in its shortest form")
    return major, argument, at + width


def _item(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    start = at
    major, argument, at = _head(data, at)
    if major == 0:
        return argument, at
    if major == 1:
        return -1 - argument, at
    if major == 2 or major == 3:
        end = at + argument
        if end > len(data):
            raise DecodeError("CBOR string longer than its block")
        if major == 2:
            return data[at:end], end
        try:
            return data[at:end].decode(), end
        except UnicodeDecodeError as exc:
            raise DecodeError("CBOR text that is not UTF-8") from exc
    if depth >= MAX_DEPTH:
        raise DecodeError(f"CBOR nested deeper than {MAX_DEPTH}")
    if major == 4:
        if argument > len(data) - at:
            raise DecodeError("CBOR list longer than its block")
        # The pairs and the links in them are two levels more, and these are not looked at one by one.
        if depth + 2 < MAX_DEPTH and (chunks := chunk_list.scan(data, at, argument)) is not None:
            return chunks
        items = []
        for _ in range(argument):
            value, at = _item(data, at, depth + 1)
            items.append(value)
        return items, at
    if major == 5:
        return _map(data, at, argument, depth)
    if major == 6:
        if argument != 42:
            raise DecodeError(f"CBOR tag {argument} is not part of DAG-CBOR")
        value, at = _item(data, at, depth + 1)
        if not isinstance(value, bytes) or value[:1] != b"\x00":
            raise DecodeError("a link without its identity prefix")
        try:
            return CID.from_bytes(value[1:]), at
        except CIDError as exc:
            raise DecodeError(str(exc)) from exc
    if data[start] in _SIMPLE:  # not the argument: f8 f4 is a longer form of f4
        return _SIMPLE[data[start]], at
    raise DecodeError("a CBOR float, undefined or simple value")


def _map(data: bytes, at: int, pairs: int, depth: int) -> tuple[dict[str, Any], int]:
    if pairs > (len(data) - at) // 2:
        raise DecodeError("CBOR map longer than its block")
    result: dict[str, Any] = {}
    last: tuple[int, bytes] | None = None
    for _ in range(pairs):
        start = at
        key, at = _item(data, at, depth + 1)
        if not isinstance(key, str):
            raise DecodeError("a CBOR map key that is not text")
        order = (at - start, data[start:at])
        if last is not None and order <= last:
            raise DecodeError("CBOR map keys out of order or repeated")
        last = order
        result[key], at = _item(data, at, depth + 1)
    return result, at

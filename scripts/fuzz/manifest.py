"""Manifests and the CBOR they are made of: blocks of an image with anything in them wrong.

Asserted: only `DecodeError` and `ManifestError` are raised; bytes that decode are the only bytes for their value; an
image that is accepted keeps the rules (names, order, sizes that add up) and encodes to its own id again.
"""

from __future__ import annotations

from typing import Any

from fuzz.choices import Choices
from protocols import dagcbor
from protocols import manifest as mf
from protocols.cid import CID, Codec
from protocols.errors import DecodeError, ManifestError

CHUNKING = ["fixed", 4096]
NAMES = ("a", "b", "c", "dir/e", "z" * 1024, "..", "/abs", "a/../b", "", "a//b", ".", "\0", "ä", "z" * 1025)
NUMBERS = (0, 1, 2, 15, 16, 17, 4095, 4096, 4097, 1 << 20, 1 << 22, (1 << 22) + 1, 1 << 46, (1 << 46) + 1, 1 << 63, -1)
CHUNK_COUNTS = (0, 1, 2, 16, 17, 40)
MAX_DEPTH = 6


def check(data: bytes) -> None:
    """Raises AssertionError when an invariant of the module's text is broken."""
    choices = Choices(data)
    if choices.below(4) == 0:
        check_cbor(choices.rest())
    else:
        check_manifest(choices)


def check_cbor(data: bytes) -> None:
    try:
        value = dagcbor.decode(data)
    except DecodeError:
        return
    assert dagcbor.encode(value) == data, "two encodings of one value"


class Builder:
    """The blocks of an image, made from the leaves up so that links fit, each perhaps with something wrong in it."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.blocks: dict[CID, bytes] = {}

    def put(self, value: Any) -> CID:
        if self.choices.below(4) == 0:
            value = spoiled(self.choices, value, MAX_DEPTH)
        try:
            data = dagcbor.encode(value)
        except (DecodeError, ValueError, TypeError, OverflowError):
            data = dagcbor.encode(None)  # nothing that can be said in CBOR
        if self.choices.below(16) == 15 and data:
            at = self.choices.below(256) % len(data)
            data = data[:at] + self.choices.bytes(1) + data[at + 1 :]
        cid = CID.of(Codec.DAG_CBOR, data)
        self.blocks[cid] = data
        return cid

    def image(self) -> CID:
        names = sorted(
            {self.choices.of(NAMES[:4] if self.choices.below(4) else NAMES) for _ in range(1 + self.choices.below(4))}
        )
        objects = [self.object(name) for name in names]
        top: dict[str, Any] = {
            "v": 1,
            "kind": self.choices.of(("file", "directory", "closure", "microvm")),
            "attrs": {},
        }
        return self.put(top | self.list_of("objects", objects))

    def object(self, name: str) -> dict[str, Any]:
        count = self.choices.of(CHUNK_COUNTS)
        seed = self.choices.below(4)
        pairs = [[CID(Codec.RAW, bytes([seed, i]) * 16), 4096] for i in range(count)]
        if pairs:
            pairs[-1][1] = 1 + self.choices.below(256)
        size = sum(pair[1] for pair in pairs)
        layout: Any = {"chunking": CHUNKING, "chunks": pairs}
        if count > mf.INLINE_CHUNKS or self.choices.below(8) == 0:
            layout = self.put({"v": 1, "size": size, "chunking": CHUNKING} | self.list_of("chunks", pairs))
        return {"path": name, "size": size, self.choices.of(("nar", "blake3")): bytes(32), "layout": layout}

    def list_of(self, name: str, items: list[Any]) -> dict[str, Any]:
        if self.choices.below(8):
            return {name: items}
        middle = len(items) // 2
        leaves = [[self.put({name: part}), len(part)] for part in (items[:middle], items[middle:])]
        if self.choices.below(4) == 0:
            leaves = [[self.put({"tree": leaves}), len(items)]]
        return {"tree": leaves}


def spoiled(choices: Choices, value: Any, depth: int) -> Any:
    """`value` with one thing in it changed, added or missing."""
    if depth and isinstance(value, dict) and value and choices.below(4):
        name = choices.of(sorted(value))
        if choices.below(8) == 0:
            return {key: value[key] for key in value if key != name}
        if choices.below(8) == 0:
            return value | {"more": anything(choices, 2)}
        return value | {name: spoiled(choices, value[name], depth - 1)}
    if depth and isinstance(value, list) and value and choices.below(4):
        at = choices.below(len(value) % 256 or 1)
        kind = choices.below(6)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, value[at]]
        return [*value[:at], spoiled(choices, value[at], depth - 1), *value[at + 1 :]]
    return anything(choices, 2)


def anything(choices: Choices, depth: int) -> Any:
    kind = choices.below(9 if depth else 7)
    if kind < 2:
        return choices.of(NUMBERS)
    if kind == 2:
        return choices.of(NAMES)
    if kind == 3:
        return choices.of((True, False, None, 1.5))
    if kind == 4:
        return choices.bytes(choices.of((0, 31, 32, 33)))
    if kind == 5:
        return CID(choices.of((Codec.RAW, Codec.DAG_CBOR)), bytes([choices.below(4)]) * 32)
    if kind == 6:
        return ["fastcdc", *(choices.of((0, 64, 4096, 1 << 20, 1 << 22, True)) for _ in range(5))]
    if kind == 7:
        return [anything(choices, depth - 1) for _ in range(choices.below(4))]
    return {choices.of(NAMES[:5]): anything(choices, depth - 1) for _ in range(choices.below(4))}


def check_manifest(choices: Choices) -> None:
    builder = Builder(choices)
    root = builder.image()
    try:
        assembler = mf.ImageAssembler(root)
        while assembler.missing:
            assert len(assembler.missing) <= mf.MAX_OBJECTS
            known = [cid for cid in sorted(assembler.missing) if cid in builder.blocks]
            if not known:
                return  # it links to a block that nobody has
            assembler.add(known[0], builder.blocks[known[0]])
            assert known[0] not in assembler.missing
        image = assembler.image()
    except ManifestError:
        return
    assert image.id == root
    assert mf.encode_image(image.kind, image.attributes, image.objects).id == root
    assert [obj.path for obj in image.objects] == sorted({obj.path for obj in image.objects})
    for obj in image.objects:
        assert (obj.nar_hash is None) != (obj.file_hash is None)
        assert not obj.path.startswith("/") and ".." not in obj.path.split("/") and 0 < len(obj.path) <= mf.MAX_PATH
        assert sum(obj.layout.sizes) == obj.size
        assert all(0 <= ref < len(image.objects) for ref in obj.references)
    assert set(image.blocks) <= set(builder.blocks)

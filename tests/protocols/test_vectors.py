"""The code against the literal test vectors that a second implementation would use."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from protocols import dagcbor
from protocols.cid import CID, Codec
from protocols.errors import CIDError, DecodeError, FrameError, ManifestError
from protocols.exchange import messages
from protocols.manifest import ImageAssembler, encode_image

FOLDER = Path(__file__).parent.parent / "vectors" / "protocol"


def load(name: str, section: str) -> list[Any]:
    return [pytest.param(case, id=case.get("why") or case.get("what")) for case in raw(name, section)]


def shown(value: Any) -> Any:
    """A field as it stands in the vectors: links as text, bytes in hex."""
    match value:
        case CID():
            return str(value)
        case bytes() | bytearray():
            return value.hex()
        case tuple():
            return [shown(part) for part in value]
        case messages.PathRecord():
            return {field.name: shown(getattr(value, field.name)) for field in fields(value)}
    return value


def raw(name: str, section: str) -> list[Any]:
    return list(json.loads((FOLDER / f"{name}.json").read_text())[section])


@pytest.mark.parametrize("case", load("cids", "valid"))
def test_cids(case: dict[str, str]) -> None:
    cid = CID.of(Codec[case["codec"].upper().replace("-", "_")], bytes.fromhex(case["data"]))
    assert (str(cid), cid.to_bytes().hex()) == (case["text"], case["binary"])
    assert CID.parse(case["text"]) == CID.from_bytes(bytes.fromhex(case["binary"])) == cid


@pytest.mark.parametrize("case", load("cids", "reject_text"))
def test_cid_texts_refused(case: dict[str, str]) -> None:
    with pytest.raises(CIDError):
        CID.parse(case["text"])


@pytest.mark.parametrize("case", load("cids", "reject_binary"))
def test_cid_bytes_refused(case: dict[str, str]) -> None:
    with pytest.raises(CIDError):
        CID.from_bytes(bytes.fromhex(case["hex"]))


@pytest.mark.parametrize("case", load("dagcbor", "valid"))
def test_dagcbor(case: dict[str, Any]) -> None:
    assert dagcbor.encode(case["json"]).hex() == case["hex"]
    assert dagcbor.decode(bytes.fromhex(case["hex"])) == case["json"]


@pytest.mark.parametrize("case", load("dagcbor", "reject"))
def test_dagcbor_refused(case: dict[str, str]) -> None:
    with pytest.raises(DecodeError):
        dagcbor.decode(bytes.fromhex(case["hex"]))


@pytest.mark.parametrize("case", load("manifests", "images"))
def test_manifests(case: dict[str, Any]) -> None:
    blocks = {CID.parse(text): bytes.fromhex(data) for text, data in case["blocks"].items()}
    assembler = ImageAssembler(CID.parse(case["id"]))
    while assembler.missing:
        cid = min(assembler.missing)
        assembler.add(cid, blocks[cid])
    image = assembler.image()
    assert (image.kind, image.attributes) == (case["kind"], case["attributes"])
    assert case["objects"] == [
        {
            "path": obj.path,
            "size": obj.size,
            "nar": obj.nar_hash and obj.nar_hash.hex(),
            "blake3": obj.file_hash and obj.file_hash.hex(),
            "refs": list(obj.references),
            "ca": obj.ca,
            "chunking": obj.layout.chunking.to_value(),
            "chunks": [[d.hex(), s] for d, s in zip(obj.layout.digests, obj.layout.sizes, strict=True)],
        }
        for obj in image.objects
    ]
    assert encode_image(image.kind, image.attributes, image.objects).blocks == blocks


@pytest.mark.parametrize("case", load("manifests", "reject"))
def test_manifests_refused(case: dict[str, str]) -> None:
    data = bytes.fromhex(case["block"])
    root = CID.of(Codec.DAG_CBOR, data)
    assembler = ImageAssembler(root)
    with pytest.raises(ManifestError):
        assembler.add(root, data)
        assembler.image()


@pytest.mark.parametrize("case", load("frames", "valid"))
def test_frames(case: dict[str, Any]) -> None:
    (message,) = messages.FrameReader().feed(bytes.fromhex(case["hex"]))
    assert type(message).__name__ == case["type"]
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    if isinstance(message, messages.Block):
        values["payload"] = b"".join(message.payload)
    assert {name: shown(value) for name, value in values.items()} == case["fields"]
    assert b"".join(map(bytes, messages.encode(message))).hex() == case["hex"]


def test_every_message_type_has_a_vector() -> None:
    assert {case["type"] for case in raw("frames", "valid")} == {t.__name__ for t in messages.Message.__args__}


@pytest.mark.parametrize("case", load("frames", "skipped"))
def test_frames_skipped(case: dict[str, str]) -> None:
    assert list(messages.FrameReader().feed(bytes.fromhex(case["hex"]))) == []


@pytest.mark.parametrize("case", load("frames", "reject"))
def test_frames_refused(case: dict[str, str]) -> None:
    with pytest.raises(FrameError):
        list(messages.FrameReader().feed(bytes.fromhex(case["hex"])))

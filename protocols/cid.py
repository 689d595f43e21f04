"""Content identifiers: CIDv1 with BLAKE3-256 (https://github.com/multiformats/cid).

Two codecs: `raw` for chunks, `dag-cbor` for manifest blocks. Binary form, 36 bytes: version 1, codec, multihash code
0x1e (blake3), length 32, digest. Text form: lower-case base32 without padding behind the multibase prefix `b`.
"""

from __future__ import annotations

import base64
import enum
from dataclasses import dataclass

from blake3 import blake3

from protocols.errors import CIDError

DIGEST_SIZE = 32
CID_SIZE = 36
TEXT_SIZE = 59  # "b" + ceil(36 * 8 / 5) digits


class Codec(enum.IntEnum):
    RAW = 0x55
    DAG_CBOR = 0x71


_HEADS = {codec: bytes((1, codec, 0x1E, DIGEST_SIZE)) for codec in Codec}
_CODECS = {head: codec for codec, head in _HEADS.items()}


@dataclass(frozen=True, slots=True, order=True)
class CID:
    """The name of a block: what its bytes are (`codec`) and their BLAKE3-256 `digest` (32 bytes)."""

    codec: Codec
    digest: bytes

    @classmethod
    def of(cls, codec: Codec, data: bytes | bytearray | memoryview) -> CID:
        """The CID of a block with these bytes."""
        return cls(codec, blake3(data).digest())

    @classmethod
    def from_bytes(cls, data: bytes) -> CID:
        """Parse the binary form. Raises `CIDError`."""
        codec = _CODECS.get(bytes(data[:4]))
        if codec is None or len(data) != CID_SIZE:
            raise CIDError("not a CIDv1 of a raw or dag-cbor block with a BLAKE3-256 hash")
        return cls(codec, bytes(data[4:]))

    @classmethod
    def parse(cls, text: str) -> CID:
        """Parse the text form. Raises `CIDError`."""
        if len(text) != TEXT_SIZE or text[0] != "b":
            raise CIDError(f"an id has {TEXT_SIZE} characters and starts with b")
        try:
            data = base64.b32decode(text[1:].upper() + "======")
        except ValueError as exc:
            raise CIDError("an id has only the letters a-z and the digits 2-7") from exc
        cid = cls.from_bytes(data)
        if str(cid) != text:
            raise CIDError("an id in a spelling that is not canonical")
        return cid

    def to_bytes(self) -> bytes:
        return _HEADS[self.codec] + self.digest

    def matches(self, data: bytes | bytearray | memoryview) -> bool:
        """Whether these are the block's bytes."""
        return blake3(data).digest() == self.digest

    def __str__(self) -> str:
        return "b" + base64.b32encode(self.to_bytes()).decode().lower().rstrip("=")

"""The form in which finished objects of an import are kept, so that unchanged content is not read again."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from protocols import dagcbor
from protocols.errors import ProtocolError
from protocols.manifest import Chunking, ImageObject, Layout


@dataclass(frozen=True, slots=True)
class ImportKey:
    """What must be equal for a finished object to be taken again.

    `path`: absolute path of the file or tree. `fingerprint`: of its metadata, or a registered hash.
    """

    path: bytes
    chunking: Chunking
    fingerprint: bytes

    @classmethod
    def registered(cls, path: Path, chunking: Chunking, nar_hash: bytes) -> Self:
        """Of a store path: the NAR hash that Nix has for it stands for its contents."""
        return cls(os.fsencode(path), chunking, b"registered:" + nar_hash)

    @property
    def chunking_bytes(self) -> bytes:
        return dagcbor.encode(self.chunking.to_value())


def encode_object(obj: ImageObject) -> bytes:
    """Canonical CBOR: [path, size, NAR hash, file hash, ca, chunking, digests joined, sizes as u32 joined]."""
    layout = obj.layout
    sizes = struct.pack(f"<{len(layout.sizes)}I", *layout.sizes)
    return dagcbor.encode(
        [
            obj.path,
            obj.size,
            obj.nar_hash,
            obj.file_hash,
            obj.ca,
            layout.chunking.to_value(),
            b"".join(layout.digests),
            sizes,
        ]
    )


def decode_object(data: bytes) -> ImageObject | None:
    """What `encode_object` was given, without references; None if the bytes are damaged."""
    try:
        path, size, nar_hash, file_hash, ca, chunking, digests, sizes = dagcbor.decode(data)
        layout = Layout(
            Chunking.from_value(chunking),
            tuple(digests[i : i + 32] for i in range(0, len(digests), 32)),
            struct.unpack(f"<{len(sizes) // 4}I", sizes),
        )
        layout.check()
    except (ProtocolError, ValueError, TypeError, struct.error):
        return None
    if layout.size != size or len(layout.digests) != len(layout.sizes):
        return None
    return ImageObject(path, size, layout, nar_hash, file_hash, ca=ca)

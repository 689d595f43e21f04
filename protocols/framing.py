"""Frames of the request protocols: a length (uint32, big endian) and one value in canonical DAG-CBOR."""

from __future__ import annotations

from typing import Any

from protocols import dagcbor
from protocols.errors import FrameError

PREFIX = 4


def frame(value: dict[str, Any]) -> bytes:
    """The frame of a value."""
    body = dagcbor.encode(value)
    return len(body).to_bytes(PREFIX, "big") + body


def frame_length(prefix: bytes, limit: int) -> int:
    """Bytes of the body behind a frame's 4-byte prefix. Raises FrameError above `limit`."""
    length = int.from_bytes(prefix, "big")
    if not 0 < length <= limit:
        raise FrameError(f"a frame of {length} bytes, where at most {limit} can be")
    return length

"""The 12-byte header of a Yamux frame and its numbers."""

from __future__ import annotations

import enum
import struct

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
HEADER_SIZE = HEADER.size

INITIAL_WINDOW = 256 * 1024  # fixed by the spec, both directions
MAX_SEND_WINDOW = (1 << 32) - 1  # credit beyond what a length field can say is an overflow

# Header and payload together fill one Noise message: 65535 - 16 (Poly1305 tag) - 12. Peers accept any size up to
# the window (go-yamux sends 64 KiB), so this costs nothing and saves a second, 17-byte record per frame.
MAX_PAYLOAD = 65507

TYPE_DATA = 0
TYPE_WINDOW_UPDATE = 1
TYPE_PING = 2
TYPE_GO_AWAY = 3

SYN = 1
ACK = 2
FIN = 4
RST = 8


class GoAwayCode(enum.IntEnum):
    """Why a session ends. Peers may send others (go-libp2p: 0x1005, collected by the connection manager)."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


def control(kind: int, flags: int, stream_id: int, value: int = 0) -> bytes:
    """A frame without payload."""
    return HEADER.pack(0, kind, flags, stream_id, value)

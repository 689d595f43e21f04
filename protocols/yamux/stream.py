"""One stream of a session: what was sent, received and agreed on it so far."""

from __future__ import annotations

from collections import deque
from typing import Any

from protocols.yamux.frames import INITIAL_WINDOW

SEND_HIGH = 1 << 20  # `Stream.backlog` at which a writer should wait: one write batch, so that one stream fills a link
SEND_LOW = 1 << 19  # and below which it is told to go on
PART_COST = 200  # bytes of bookkeeping per queued part, so that a million one-byte writes count as what they cost


class Stream:
    """One stream of a session. Read-only outside of `Session`, but for `owner`."""

    __slots__ = (
        "accepted",
        "acked",
        "backlog",
        "buffered",
        "chunks",
        "ended",
        "epoch",
        "extra",
        "fin_received",
        "fin_sent",
        "finishing",
        "id",
        "in_ready",
        "linger_until",
        "outbound",
        "owner",
        "parts",
        "queued",
        "recv_window",
        "reset",
        "send_window",
        "want_room",
        "window",
    )

    def __init__(self, stream_id: int, outbound: bool, now: float) -> None:
        self.id = stream_id
        self.outbound = outbound
        self.accepted = outbound
        self.acked = not outbound
        self.reset: str | None = None  # why it was aborted
        self.owner: Any = None  # whatever the user of the session keeps with it
        # sending
        self.send_window = INITIAL_WINDOW
        self.parts: deque[memoryview] = deque()
        self.queued = 0  # payload bytes in `parts`
        self.backlog = 0  # the same with PART_COST per part
        self.in_ready = False
        self.want_room = False
        self.finishing = False
        self.fin_sent = False
        self.linger_until: float | None = None
        # receiving
        self.window = INITIAL_WINDOW  # bytes the peer may have sent that were not yet read
        self.recv_window = INITIAL_WINDOW  # of which it may still send
        self.chunks: deque[memoryview | bytearray] = deque()
        self.buffered = 0
        self.extra = 0  # window reserved in the budget beyond the initial one
        self.epoch = now  # time of the last window update
        self.fin_received = False
        self.ended = False  # FIN received, and the body of the frame it came on

    @property
    def full(self) -> bool:
        """Whether a writer should wait for `StreamWritable` before sending more."""
        return self.backlog >= SEND_HIGH

    def __repr__(self) -> str:
        return f"<Stream {self.id}>"

"""Yamux (/yamux/1.0.0): many flow-controlled streams over one ordered byte stream. Sans-IO.

Sources: https://github.com/hashicorp/yamux/blob/master/spec.md and https://github.com/libp2p/specs/tree/master/yamux.

session = Session(initiator=True, now=clock())
events = session.receive(bytes_from_the_peer, clock())      # what happened
frames = session.data_to_send(1 << 20, clock())             # what to write; one tuple of buffers per frame
"""

from protocols.yamux.events import (
    Event,
    GoAwayReceived,
    OpenAllowed,
    SessionClosed,
    StreamOpened,
    StreamReadable,
    StreamReset,
    StreamWritable,
)
from protocols.yamux.flow import Budget, Limits
from protocols.yamux.frames import INITIAL_WINDOW, MAX_PAYLOAD, GoAwayCode
from protocols.yamux.session import Session
from protocols.yamux.stream import Stream

__all__ = [
    "INITIAL_WINDOW",
    "MAX_PAYLOAD",
    "Budget",
    "Event",
    "GoAwayCode",
    "GoAwayReceived",
    "Limits",
    "OpenAllowed",
    "Session",
    "SessionClosed",
    "Stream",
    "StreamOpened",
    "StreamReadable",
    "StreamReset",
    "StreamWritable",
]

"""One peer's exchange stream: which frames may come when, and what they may ask for.

Transitions (h11's model: all that changes the state is in this file):

    state   HELLO        GOODBYE   any other
    NEW     -> OPEN      -> DONE   violation
    OPEN    violation    -> DONE   stays
    DONE    ignored      ignored   ignored
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from protocols.cid import CID
from protocols.errors import FrameError
from protocols.exchange.messages import (
    VERSION,
    Block,
    Buffer,
    FrameReader,
    Goodbye,
    Hello,
    Interest,
    Message,
    encode,
)

MAX_INTERESTS = 256  # images one peer may follow here


class State(enum.Enum):
    NEW = "new"
    OPEN = "open"
    DONE = "done"


class Session:
    """The protocol state of one stream. Both sides send HELLO first, without waiting for the other's."""

    def __init__(self, agent: str) -> None:
        self.state = State.NEW
        self.hello: Hello | None = None
        self.interests: set[CID] = set()
        self._agent = agent
        self._reader = FrameReader()

    def greeting(self) -> list[Buffer]:
        """What to send first."""
        return encode(Hello(agent=self._agent))

    @property
    def receiving_block(self) -> bool:
        """Whether a part of a frame is here and the rest is awaited."""
        return self._reader.in_frame

    def receive(self, data: Buffer) -> Iterator[Message]:
        """Messages completed by `data`. Raises `FrameError` for a violation: send GOODBYE and close."""
        for message in self._reader.feed(data):
            if self.state is State.DONE:
                return
            self._check(message)
            yield message

    def _check(self, message: Message) -> None:
        match message:
            case Goodbye():
                self.state = State.DONE
            case Hello(version=version):
                if self.state is not State.NEW:
                    raise FrameError("a second HELLO")
                if version != VERSION:
                    raise FrameError(f"the peer speaks exchange version {version}, this node speaks {VERSION}")
                self.hello = message
                self.state = State.OPEN
            case _ if self.state is State.NEW:
                raise FrameError("a frame before HELLO")
            case Interest(root=root, active=True):
                if root not in self.interests and len(self.interests) >= MAX_INTERESTS:
                    raise FrameError(f"interest in more than {MAX_INTERESTS} images")
                self.interests.add(root)
            case Interest(root=root):
                self.interests.discard(root)
            case Block(encoding=encoding) if encoding not in Hello().encodings:
                raise FrameError(f"a block in encoding {encoding.name}, which was not offered")

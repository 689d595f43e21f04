"""Frames of a length and a body over a stream, for the protocols of one request and one answer."""

from __future__ import annotations

from p2pnode.net.transport import Stream, receive_exactly
from protocols.framing import PREFIX, frame_length


async def receive_frame(stream: Stream, limit: int) -> bytes | None:
    """The body of the next frame, of at most `limit` bytes; None at the end of the stream.

    Raises FrameError, StreamClosed.
    """
    begin = await stream.receive_some(PREFIX)
    if not begin:
        return None
    prefix = begin + await receive_exactly(stream, PREFIX - len(begin))
    return await receive_exactly(stream, frame_length(prefix, limit))

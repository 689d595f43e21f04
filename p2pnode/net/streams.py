"""`transport.Stream` over a libp2p stream: plain bytes in and out, and one exception for everything that goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from p2pnode.errors import StreamClosed
from p2pnode.net.hardening import LIBRARY_ERRORS
from p2pnode.net.transport import Buffer
from p2pnode.net.yamux import YamuxStream

CLOSE_TIMEOUT = 2.0  # s a goodbye may wait for the connection's socket


class NetworkStream:
    """One stream after protocol negotiation.

    Reads and writes go to the muxed stream directly: the library's NetStream around it adds a lock and a state machine
    per call and nothing that we use. Closing goes through NetStream, which keeps the books of the connection.
    """

    __slots__ = ("_muxed", "_net", "_peer")

    def __init__(self, net_stream: Any) -> None:
        self._net = net_stream
        self._muxed: YamuxStream = net_stream.muxed_stream
        self._peer = str(net_stream.muxed_conn.peer_id)

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def relayed(self) -> bool:
        """Whether a relay carries the bytes of this stream."""
        return bool(self._muxed.muxed_conn.get_connection_type() is ConnectionType.RELAYED)

    @property
    def rtt(self) -> float | None:
        """The smallest round trip of late, by the kernel, which knows nothing of busy processes; through a relay that
        of the muxer's pings. Seconds."""
        return self._muxed.muxed_conn.path_rtt

    async def send_all(self, data: Buffer) -> None:
        await self.send_parts([data])

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        # The muxer queues by reference: what its owner may still change is copied.
        kept = [part if _immutable(part) else bytes(part) for part in parts]
        try:
            await self._muxed.send_parts(kept)
        except LIBRARY_ERRORS as exc:
            raise StreamClosed(f"the stream to peer {self._peer} is closed: {exc}") from exc

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            return await self._muxed.receive_some(max_bytes)
        except MuxedStreamEOF:
            return b""
        except LIBRARY_ERRORS as exc:
            raise StreamClosed(f"the stream from peer {self._peer} is closed: {exc}") from exc

    async def receive_parts(self, max_bytes: int) -> Sequence[Buffer]:
        try:
            return await self._muxed.receive_parts(max_bytes)
        except MuxedStreamEOF:
            return ()
        except LIBRARY_ERRORS as exc:
            raise StreamClosed(f"the stream from peer {self._peer} is closed: {exc}") from exc

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
            try:
                await self._net.close()
            except LIBRARY_ERRORS:
                await self._net.reset()

    async def reset(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
            await self._net.reset()


def _immutable(part: Buffer) -> bool:
    """Whether `part` is bytes, or a view through which nobody writes: of bytes, or of what a peer sent."""
    return isinstance(part, bytes) or (isinstance(part, memoryview) and part.readonly)

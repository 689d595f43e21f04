"""A peer that speaks Noise and Yamux frame by frame, as it likes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from multiaddr import Multiaddr

from p2pnode.net.noise import NoiseTransport
from protocols.yamux.frames import HEADER, HEADER_SIZE, TYPE_DATA, TYPE_GO_AWAY, TYPE_WINDOW_UPDATE

GONE = (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)


def frame(kind: int, flags: int, stream_id: int, value: int, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, value) + body


def text(*messages: str) -> bytes:
    """multistream-select messages."""
    return b"".join(bytes([len(m) + 1]) + m.encode() + b"\n" for m in messages)


class Hostile:
    """An authenticated connection on which Yamux was agreed. `code` is that of a GO_AWAY that came."""

    def __init__(self, secured: Any) -> None:
        self._secured = secured
        self._buffer = bytearray()
        self.code: int | None = None
        self.ended = "open"  # how

    async def send(self, *frames: bytes) -> None:
        """Raises one of GONE when the other side has hung up."""
        for start in range(0, len(frames), 4096):
            await self._secured.write_parts([(part,) for part in frames[start : start + 4096]])

    async def frames(self) -> AsyncIterator[tuple[int, int, int, int, bytes]]:
        """What the other side sends (type, flags, stream, length, body), until it hangs up."""
        try:
            while batch := await self._secured.read_batch():
                for record in batch:
                    self._buffer += record
                for parsed in self._parse():
                    yield parsed
            self.ended = "end of stream"
        except GONE as exc:
            self.ended = str(exc)

    def _parse(self) -> list[tuple[int, int, int, int, bytes]]:
        parsed = []
        while len(self._buffer) >= HEADER_SIZE:
            _, kind, flags, stream_id, length = HEADER.unpack_from(self._buffer)
            size = HEADER_SIZE + (length if kind == TYPE_DATA else 0)
            if len(self._buffer) < size:
                break
            parsed.append((kind, flags, stream_id, length, bytes(self._buffer[HEADER_SIZE:size])))
            del self._buffer[:size]
            if kind == TYPE_GO_AWAY:
                self.code = length
        return parsed

    async def closed(self) -> None:
        """Read, and do nothing else, until the other side hangs up."""
        async for _ in self.frames():
            pass

    async def open(self, stream_id: int, protocol: str) -> None:
        """Open a stream for `protocol`, without waiting for an answer."""
        said = text("/multistream/1.0.0", protocol)
        await self.send(frame(TYPE_WINDOW_UPDATE, 1, stream_id, 0), frame(TYPE_DATA, 0, stream_id, len(said), said))


@asynccontextmanager
async def tcp(addr: str, source: str | None = None) -> AsyncIterator[trio.SocketStream]:
    """A TCP connection to a multiaddr, from the address `source`."""
    target = Multiaddr(addr)
    host, port = target.value_for_protocol("ip4"), int(target.value_for_protocol("tcp"))
    stream = await trio.open_tcp_stream(host, port, local_address=source)
    async with stream:
        yield stream


@asynccontextmanager
async def hostile(addr: str, source: str | None = None) -> AsyncIterator[Hostile]:
    """A connection as `Hostile`, to a multiaddr with its peer id, under an identity nobody has seen."""
    async with tcp(addr, source) as stream:
        raw = RawConnection(TrioTCPStream(stream), True)
        await _select(raw, "/noise")
        transport = NoiseTransport(create_new_key_pair(), noise_privkey=create_noise_key_pair().private_key)
        secured = await transport.secure_outbound(raw, ID.from_string(addr.rsplit("/", 1)[1]))
        await _select(secured, "/yamux/1.0.0")
        yield Hostile(secured)


async def _select(conn: Any, protocol: str) -> None:
    await MultiselectClient().select_one_of([protocol], MultiselectCommunicator(conn))

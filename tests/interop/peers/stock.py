"""py-libp2p as its authors ship it, none of our corrections: python -m tests.interop.peers.stock"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.host.ping import PingService
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from tests.interop.peers.control import Counter, serve
from tests.interop.peers.traffic import (
    ABORT,
    ABORT_AFTER,
    AFTER_END,
    ECHO,
    HANDLERS,
    Pipe,
    echo,
    exchange,
    exchange_on_all,
    exchange_until_reset,
    open_all,
)


class StockPipe:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def send_all(self, data: bytes) -> None:
        await self.stream.write(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            data: bytes = await self.stream.read(max_bytes)
            return data
        except StreamEOF:
            if self.stream.muxed_stream.reset_received:  # the library reports a reset as an end
                raise StreamError("reset by the peer") from None
            return b""

    async def close_write(self) -> None:
        await self.stream.muxed_stream.close()

    async def reset(self) -> None:
        await self.stream.reset()


class Connects(INotifee):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seen = Counter()

    async def connected(self, network: Any, conn: Any) -> None:
        self.seen.add()

    async def disconnected(self, network: Any, conn: Any) -> None: ...

    async def opened_stream(self, network: Any, stream: Any) -> None: ...

    async def closed_stream(self, network: Any, stream: Any) -> None: ...

    async def listen(self, network: Any, multiaddr: Any) -> None: ...

    async def listen_close(self, network: Any, multiaddr: Any) -> None: ...


class StockPeer:
    def __init__(self, host: Any) -> None:
        self.host = host
        self.resets = Counter()
        self.connects = Connects()
        host.get_network().register_notifee(self.connects)
        for protocol, handler in HANDLERS.items():
            host.set_stream_handler(protocol, self._serving(handler))

    def _serving(self, handler: Any) -> Any:
        async def run(stream: Any) -> None:
            try:
                await handler(StockPipe(stream))
            except StreamError:
                if handler is echo:
                    self.resets.add()

        return run

    async def open(self, peer: str, protocol: str) -> Pipe:
        return StockPipe(await self._new_stream(peer, protocol))

    async def _new_stream(self, peer: str, protocol: str) -> Any:
        peer_id = ID.from_string(peer)
        while not self.host.get_network().get_connections(peer_id):  # it serves streams a moment before
            await self.connects.seen.beyond(self.connects.seen.count)
        return await self.host.new_stream(peer_id, [protocol])

    async def connect(self, addr: str) -> str:
        info = info_from_p2p_addr(Multiaddr(addr))
        await self.host.connect(info)
        (conn,) = self.host.get_network().get_connections(info.peer_id)
        assert type(conn.muxed_conn) is Yamux
        return str(conn.muxed_conn.peer_id)

    async def echo(self, peer: str, size: int, streams: int) -> None:
        pipes = await open_all(streams, lambda: self.open(peer, ECHO))
        await exchange_on_all(pipes, size, half_close=True)

    async def after_end(self, peer: str, size: int) -> None:
        await exchange(await self.open(peer, AFTER_END), size, half_close=True)

    async def reset(self, peer: str) -> None:
        pipe = await self.open(peer, ECHO)
        await exchange(pipe, ABORT_AFTER, half_close=False)
        await pipe.reset()

    async def aborted(self, peer: str) -> str:
        return await exchange_until_reset(await self.open(peer, ABORT), (StreamError, EOFError))

    async def identify(self, peer: str) -> dict[str, Any]:
        stream = await self._new_stream(peer, "/ipfs/id/1.0.0")
        data = b""
        while piece := await StockPipe(stream).receive_some(1 << 16):
            data += piece
        message = Identify.FromString(data[2 if data[0] & 0x80 else 1 :])  # after a varint of one or two bytes
        return {"agent": message.agent_version, "protocols": list(message.protocols)}

    async def ping(self, peer: str) -> None:
        await PingService(self.host).ping(ID.from_string(peer), 3)


async def main() -> None:
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    host = new_host(key_pair=create_new_key_pair())
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        peer = StockPeer(host)
        await serve(
            {
                "peer": str(host.get_id()),
                "addr": str(host.get_addrs()[0]),
                "version": f"py-libp2p {version('libp2p')}",
            },
            {
                "connect": peer.connect,
                "echo": peer.echo,
                "after_end": peer.after_end,
                "reset": peer.reset,
                "aborted": peer.aborted,
                "identify": peer.identify,
                "ping": peer.ping,
                "resets": peer.resets.beyond,
            },
        )
        with trio.move_on_after(2, shield=True):
            await host.close()


if __name__ == "__main__":
    trio.run(main)

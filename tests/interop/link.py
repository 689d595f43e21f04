"""Our end: a whole `Network` that serves the test protocols, connected to a peer process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from p2pnode.errors import StreamClosed
from p2pnode.net.addressbook import AddressBook
from p2pnode.net.identity import Identity
from p2pnode.net.network import Network
from p2pnode.net.streams import NetworkStream
from p2pnode.net.transport import Stream
from tests.interop.peers.control import Counter
from tests.interop.peers.traffic import HANDLERS, Pipe, exchange
from tests.interop.remote import Remote

AGENT = "p2pnode-interop/1"
PING = "/ipfs/ping/1.0.0"


class OurPipe:
    def __init__(self, stream: Stream) -> None:
        assert isinstance(stream, NetworkStream)
        self.send_all = stream.send_all
        self.receive_some = stream.receive_some
        self.reset = stream.reset
        self.aclose = stream.aclose
        self.close_write = stream._muxed.close_write  # `Stream` has no half-close that goes on reading


@dataclass(slots=True)
class Link:
    net: Network
    remote: Remote
    we_dialled: bool
    ends: Counter  # of streams that the peer opened and both sides ended
    resets: Counter  # of those it reset

    async def open(self, protocol: str) -> OurPipe:
        return OurPipe(await self.net.open_stream(self.remote.peer, protocol))

    async def ping(self) -> None:
        pipe = await self.open(PING)
        for _ in range(3):
            await exchange(pipe, 32, half_close=False)
        await pipe.aclose()


@asynccontextmanager
async def linked(remote: Remote, *, we_dial: bool) -> AsyncIterator[Link]:
    async with node() as net:
        link = Link(net, remote, we_dial, Counter(), Counter())
        for protocol, handler in HANDLERS.items():
            net.handle(protocol, _serving(handler, link))
        up = Counter()
        net.on_connect(lambda _: up.add())
        if we_dial:
            await net.connect(remote.peer, [remote.addr])
            await link.ping()  # a peer that answers knows the connection too
        else:
            assert await remote.call("connect", addr=net.addrs()[0]) == net.peer_id
            await up.beyond(0)
        yield link


@asynccontextmanager
async def node() -> AsyncIterator[Network]:
    async with Network.open(
        identity=Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"], address_book=AddressBook(), agent=AGENT
    ) as net:
        yield net


def _serving(handler: Callable[[Pipe], Awaitable[None]], link: Link) -> Callable[[Stream], Awaitable[None]]:
    async def serve(stream: Stream) -> None:
        try:
            await handler(OurPipe(stream))
        except StreamClosed:
            link.resets.add()
            raise
        link.ends.add()

    return serve

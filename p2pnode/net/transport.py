"""What the node needs of a network: authenticated peers and byte streams to them.

`Network` (network.py, libp2p) is the real one; `MemoryNetwork` (memory.py) its in-memory twin for tests and
simulations. Peer ids are the base58 text form of libp2p peer ids; addresses are multiaddr strings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from p2pnode.errors import StreamClosed

Buffer = bytes | bytearray | memoryview


class Stream(Protocol):
    """One ordered, reliable byte stream to an authenticated peer.

    Any method may raise `StreamClosed` once the peer reset the stream or the connection is lost. An end of stream
    is `b""` from `receive_some`; it is never proof that everything was received: protocols are length-prefixed.
    Reading and writing may be cancelled at any point; a cancelled write leaves the stream unusable for writing (it
    must be closed), a cancelled read loses nothing.
    """

    @property
    def peer(self) -> str:
        """The authenticated peer id of the other side."""

    @property
    def relayed(self) -> bool:
        """Whether a relay carries the bytes of this stream."""

    @property
    def rtt(self) -> float | None:
        """The network's round trip time to the peer in seconds, None if unknown."""

    async def send_all(self, data: Buffer) -> None:
        """Send all of `data`; waits while the peer's window is full."""

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        """Send several buffers one after the other without joining them."""

    async def receive_some(self, max_bytes: int) -> bytes:
        """Up to `max_bytes`, as soon as something is there; `b""` at the end of the stream."""

    async def receive_parts(self, max_bytes: int) -> Sequence[Buffer]:
        """Like `receive_some`, in the pieces it came in, none of them copied; empty at the end of the stream.

        The pieces must not be written to."""

    async def aclose(self) -> None:
        """Finish: half-close our side and forget the stream. Never raises for a peer's fault."""

    async def reset(self) -> None:
        """Abort both directions at once."""


StreamHandler = Callable[[Stream], Awaitable[None]]


async def receive_exactly(stream: Stream, size: int) -> bytes:
    """The next `size` bytes, and not one more. Raises `StreamClosed` if the stream ends before."""
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            raise StreamClosed(f"peer {stream.peer} ended a stream after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)


@dataclass(frozen=True, slots=True)
class Connection:
    """One peer we are connected to, as `status` and `peers` show it."""

    peer: str
    addr: str
    direction: str  # "in" or "out"
    since: float  # trio clock, seconds
    rtt: float | None  # seconds, None before the first ping came back
    relayed: bool = False  # through a third peer's relay, whose limits it is under


class Transport(Protocol):
    """A node's network: its own id and addresses, dialling, streams, and who is connected."""

    @property
    def peer_id(self) -> str: ...

    def addrs(self) -> list[str]:
        """Addresses others can dial, each ending in /p2p/<our id>."""

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve `protocol`. A handler's exception is logged and resets its stream, nothing more."""

    async def connect(self, peer: str, addrs: Sequence[str] = ()) -> None:
        """Be connected to `peer`, trying `addrs` and what the address book knows. Raises `PeerUnreachable`."""

    async def open_stream(self, peer: str, protocol: str) -> Stream:
        """A new stream, over a direct connection if there is one, connecting first if need be. Raises
        `PeerUnreachable`, or `StreamClosed` if the peer does not speak `protocol`."""

    def connections(self) -> list[Connection]: ...

    def near(self, peer: str) -> bool:
        """Whether a direct connection to `peer` stays within this machine's own networks."""

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` (synchronously, must not block) when the last connection to a peer ends."""

    def on_connect(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` when the first connection to a peer is up."""

    def on_upgrade(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer)` (synchronously, must not block) when the first direct connection to a peer is up to
        whom there were only relayed ones. Streams opened from now on use the direct one."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Somebody who says they have a key's content."""

    peer: str
    addrs: tuple[str, ...]


class Router(Protocol):
    """Finds who has what: provider records by 32-byte or longer keys (binary CIDs, or b"nar" + NAR sha256)."""

    def provide(self, keys: Sequence[bytes]) -> None:
        """Announce `keys` from now on: soon, and again at half their life until `withdraw`. Returns at once."""

    def withdraw(self, keys: Sequence[bytes]) -> None:
        """Stop announcing `keys` and tell the responsible peers. Returns at once."""

    async def find(self, keys: Sequence[bytes]) -> dict[bytes, list[Provider]]:
        """Current providers of each key, never ourselves; keys without any are absent. Bounded in time (<= 10 s)."""

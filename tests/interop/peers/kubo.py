"""kubo (go-libp2p), from the shared library in PyPI's kubo-python: python -m tests.interop.peers.kubo LIBRARY [RELAY]

With the address of a relay it believes that it is private, and reserves a place there.

Its streams are reached through `ipfs p2p`: streams of a protocol end in TCP servers of this process, and TCP
connections to its forwards become streams. kubo joins both directions of such a stream: the end of one closes the
other too.
"""

from __future__ import annotations

import ctypes
import json
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import trio

from tests.interop.peers.control import Counter, serve
from tests.interop.peers.traffic import (
    ABORT,
    ABORT_AFTER,
    ECHO,
    HANDLERS,
    Pipe,
    echo,
    exchange,
    exchange_on_all,
    exchange_until_reset,
    open_all,
)


class TcpPipe:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.send_all = stream.send_all
        self.receive_some = stream.receive_some

    async def close_write(self) -> None:
        await self.stream.send_eof()

    async def reset(self) -> None:
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.stream.aclose()


class Kubo:
    """A node whose repository is the (empty) directory `repo`: only TCP on loopback, no routing, no bootstrap peers."""

    def __init__(self, library: str, repo: Path, relay: str | None) -> None:
        self._library = ctypes.CDLL(library)
        self._repo = str(repo).encode()
        for name in ("GetNodeID", "GetNodeMultiAddrs", "ListPeersIDs", "P2PListForwards"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self.call("CreateRepo")
        path = repo / "config"
        path.write_text(json.dumps(confined(json.loads(path.read_text()), relay)))
        self.call("RunNode")

    def call(self, name: str, *args: str | int) -> None:
        """A function that returns how many things it did, or (ConnectToPeer, CleanupNode) 0 when all is well."""
        result = self._call(name, args)
        if result < (0 if name in ("ConnectToPeer", "CleanupNode") else 1):
            raise RuntimeError(f"kubo's {name}{args} returned {result}")

    def ask(self, name: str) -> str:
        text: bytes = self._call(name, ())
        return text.decode()

    def _call(self, name: str, args: tuple[str | int, ...]) -> Any:
        return getattr(self._library, name)(self._repo, *(a.encode() if isinstance(a, str) else a for a in args))


def confined(config: dict[str, Any], relay: str | None) -> dict[str, Any]:
    off = {"Enabled": False}
    config["Bootstrap"] = []
    config["Routing"] = {"Type": "none"}
    config["Addresses"].update(Swarm=["/ip4/127.0.0.1/tcp/0"], API="/ip4/127.0.0.1/tcp/0", Gateway="")
    config["Discovery"] = {"MDNS": off}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    config["Experimental"]["Libp2pStreamMounting"] = True
    config["Swarm"].update(
        DisableNatPortMap=True,
        RelayClient=off,
        RelayService=off,
        EnableHolePunching=False,
        Transports={"Network": {"QUIC": False, "Relay": False, "Websocket": False, "WebTransport": False}},
    )
    if relay is not None:
        config["Internal"]["Libp2pForceReachability"] = "private"
        config["Swarm"]["RelayClient"] = {"Enabled": True, "StaticRelays": [relay]}
        config["Swarm"]["Transports"]["Network"]["Relay"] = True
    return config


class KuboPeer:
    def __init__(self, kubo: Kubo, nursery: trio.Nursery) -> None:
        self.kubo = kubo
        self._nursery = nursery
        self.resets = Counter()
        self._forwards: dict[tuple[str, str], int] = {}

    async def listen(self) -> None:
        for protocol in (ECHO, ABORT):
            port = await self._tcp_server(protocol)
            await self._call("P2PListen", protocol, f"/ip4/127.0.0.1/tcp/{port}")

    async def _tcp_server(self, protocol: str) -> int:
        handler = HANDLERS[protocol]

        async def run(stream: trio.SocketStream) -> None:
            try:
                await handler(TcpPipe(stream))
            except trio.BrokenResourceError:
                pass
            finally:
                await trio.aclose_forcefully(stream)
                if handler is echo:
                    self.resets.add()  # kubo closes the TCP connection when the stream was reset, and when it ended

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=512)
        self._nursery.start_soon(trio.serve_listeners, run, [listener])
        port: int = listener.socket.getsockname()[1]
        return port

    async def _call(self, name: str, *args: str | int) -> None:
        await trio.to_thread.run_sync(self.kubo.call, name, *args)

    async def _open(self, peer: str, protocol: str, count: int = 1) -> list[Pipe]:
        port = self._forwards.get((peer, protocol)) or await self._forward(peer, protocol)

        async def one() -> Pipe:
            return TcpPipe(await trio.open_tcp_stream("127.0.0.1", port))

        return await open_all(count, one)

    async def _forward(self, peer: str, protocol: str) -> int:
        """The TCP port that leads to `protocol` at `peer`. It stays: kubo would close all other streams with it."""
        await self._call("P2PForward", protocol, "/ip4/127.0.0.1/tcp/0", peer)
        for forward in json.loads(await trio.to_thread.run_sync(self.kubo.ask, "P2PListForwards"))["LocalForwards"]:
            if forward["Protocol"] == protocol and forward["TargetAddress"] == f"/p2p/{peer}":
                port = int(forward["ListenAddress"].rsplit("/", 1)[1])
                self._forwards[peer, protocol] = port
                return port
        raise RuntimeError(f"kubo does not forward {protocol} to {peer}")

    async def connect(self, addr: str) -> str:
        await self._call("ConnectToPeer", addr)
        peer = addr.rsplit("/", 1)[1]
        if peer not in (known := await trio.to_thread.run_sync(self.kubo.ask, "ListPeersIDs")):
            raise RuntimeError(f"not connected: {known}")
        return peer

    async def echo(self, peer: str, size: int, streams: int) -> None:
        pipes = await self._open(peer, ECHO, streams)
        await exchange_on_all(pipes, size, half_close=False)
        for pipe in pipes:
            await pipe.close_write()

    async def reset(self, peer: str) -> None:
        (pipe,) = await self._open(peer, ECHO)
        await exchange(pipe, ABORT_AFTER, half_close=False)
        await pipe.reset()

    async def aborted(self, peer: str) -> str:
        (pipe,) = await self._open(peer, ABORT)
        return await exchange_until_reset(pipe, (trio.BrokenResourceError, EOFError))


async def main(library: str, relay: str | None = None) -> None:
    kubo = Kubo(library, Path.cwd(), relay)
    async with trio.open_nursery() as nursery:
        peer = KuboPeer(kubo, nursery)
        await peer.listen()
        name = kubo.ask("GetNodeID").removeprefix("ID:")
        addr = next(addr for addr in json.loads(kubo.ask("GetNodeMultiAddrs")) if "p2p-circuit" not in addr)
        await serve(
            {"peer": name, "addr": f"{addr}/p2p/{name}", "version": "kubo-python"},
            {
                "connect": peer.connect,
                "echo": peer.echo,
                "reset": peer.reset,
                "aborted": peer.aborted,
                "resets": peer.resets.beyond,
            },
        )
        nursery.cancel_scope.cancel()
    kubo.call("CleanupNode")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])

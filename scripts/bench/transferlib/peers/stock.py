"""Stock py-libp2p, none of our corrections: serves a file, fetches it over one stream, or pings other nodes.

stock.py serve FILE ADDRESS             prints {"addr"} once it listens
stock.py fetch OUT MULTIADDR ADDRESS    prints {"seconds", "security", "muxer"}
stock.py ping INTERVAL MULTIADDR...     prints {"peer": index, "at": time.monotonic, "seconds"} of each answer
stock.py nothing                        loads what it needs

The protocol: the server sends eight bytes, the length, and as many bytes of the file; the client answers with one
byte, so that neither takes the end of a stream for the end of the data.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

FILE = "/x/bench/file/1"
PING = "/ipfs/ping/1.0.0"
PIECE = 1 << 20  # bytes in a write: the library cuts them into frames as it likes
DONE = b"\x06"


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def exactly(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))  # raises at the end
    return data


async def serve(path: Path, address: str) -> None:
    async def send(stream: Any) -> None:
        with path.open("rb") as file:
            await stream.write(os.fstat(file.fileno()).st_size.to_bytes(8, "big"))
            while piece := file.read(PIECE):
                await stream.write(piece)
        await exactly(stream, 1)
        await stream.close()

    host = new_host(key_pair=create_new_key_pair())
    host.set_stream_handler(FILE, send)
    async with host.run([Multiaddr(f"/ip4/{address}/tcp/0")]):
        say({"addr": str(host.get_addrs()[0])})
        await trio.sleep_forever()


async def fetch(out: Path, addr: str, address: str) -> None:
    host = new_host(key_pair=create_new_key_pair())
    async with host.run([Multiaddr(f"/ip4/{address}/tcp/0")]):
        began = time.monotonic()
        info = info_from_p2p_addr(Multiaddr(addr))
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, [FILE])
        left = int.from_bytes(await exactly(stream, 8), "big")
        with out.open("wb") as file:
            while left:
                data = await stream.read(min(left, PIECE))
                file.write(data)
                left -= len(data)
        seconds = time.monotonic() - began
        await stream.write(DONE)
        muxed = stream.muxed_conn
        say({"seconds": seconds, "security": type(muxed.secured_conn).__name__, "muxer": type(muxed).__name__})
        with trio.move_on_after(2):
            await host.close()
        os._exit(0)  # the library's tasks take seconds to end, which is no part of a transfer


async def ping(interval: float, addrs: list[str]) -> None:
    host = new_host(key_pair=create_new_key_pair())

    async def one(index: int, addr: str) -> None:
        info = info_from_p2p_addr(Multiaddr(addr))
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, [PING])
        while True:
            payload = os.urandom(32)
            at = time.monotonic()
            await stream.write(payload)
            if await exactly(stream, 32) != payload:
                raise ValueError("the answer to a ping was something else")
            say({"peer": index, "at": at, "seconds": time.monotonic() - at})
            await trio.sleep(interval)

    async with host.run([]), trio.open_nursery() as nursery:
        for index, addr in enumerate(addrs):
            nursery.start_soon(one, index, addr)


def main(what: str, *args: str) -> None:
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    if what == "serve":
        trio.run(serve, Path(args[0]), args[1])
    elif what == "fetch":
        trio.run(fetch, Path(args[0]), args[1], args[2])
    elif what == "ping":
        trio.run(ping, float(args[0]), list(args[1:]))
    else:
        os._exit(0)  # as `fetch` does


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A libp2p peer for the muxer tests and measurements: serves /echo, /sink and /source until stdin ends.

python -m tests.net.peers.yamux_peer stock|ours      prints its address
"""

from __future__ import annotations

import logging
import resource
import sys

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from multiaddr import Multiaddr


def make_host(kind: str):
    if kind == "stock":
        return new_host(key_pair=create_new_key_pair())
    from p2pnode.net.noise import security_options
    from p2pnode.net.yamux import install

    install()
    key_pair = create_new_key_pair()
    return new_host(key_pair=key_pair, sec_opt=security_options(key_pair))


async def echo(stream) -> None:
    try:
        while True:
            await stream.write(await stream.read(65536))
    except StreamEOF:
        await stream.close()
    except StreamError:
        await stream.reset()


async def sink(stream) -> None:
    """Count bytes until the end of the stream, then answer with the count."""
    total = 0
    parts = getattr(stream.muxed_stream, "receive_parts", None)
    try:
        while True:
            if parts is not None:
                total += sum(map(len, await parts(1 << 20)))
            else:
                total += len(await stream.muxed_stream.read(1 << 20))
    except EOFError:
        await stream.write(total.to_bytes(8, "big"))
        await stream.close()


async def cpu(stream) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    await stream.write(int((usage.ru_utime + usage.ru_stime) * 1e6).to_bytes(8, "big"))
    await stream.close()


async def silent(stream) -> None:
    """Never reads."""
    await trio.sleep_forever()


async def main(kind: str) -> None:
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    host = make_host(kind)
    for name, handler in (("/echo", echo), ("/sink", sink), ("/cpu", cpu), ("/silent", silent)):
        host.set_stream_handler(name, handler)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        print(host.get_addrs()[0], flush=True)
        stdin = trio.lowlevel.FdStream(0)
        while await stdin.receive_some():
            pass
        with trio.move_on_after(3, shield=True):
            await host.close()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])

#!/usr/bin/env python3
"""Run an ordinary node that misbehaves on purpose: p2pnode with a fault in what it serves.

    scripts/faulty.py [--lie | --lie-manifest | --stall] [--after BYTES] [--rate BYTES/S] -- P2PNODE ARGUMENTS...

--lie            one byte of every chunk it sends is wrong
--lie-manifest   one byte of every manifest block it sends is wrong
--stall          it claims what it has, keeps the connection, and never sends a block
--after BYTES    it behaves until it has served so much
--rate BYTES/S   it sends no faster than this, to all peers together (64K, 2M)

For tests and experiments only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio
from swarmlib.content import parse_size

from p2pnode.net.transport import Buffer
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.session import PeerSession
from protocols.cid import CID, Codec

SMALL = 16 << 10  # control frames are not slowed down: a slow disk or line is meant, not a slow mind


@dataclass(frozen=True, slots=True)
class Faults:
    """See the module's text."""

    lie: bool
    lie_manifest: bool
    stall: bool
    after: int
    rate: float | None


def inject(faults: Faults) -> None:
    """Change the classes that serve blocks. A renamed method ends in AttributeError, never in a node without fault."""
    if faults.lie or faults.lie_manifest:
        _lie(faults)
    if faults.stall:
        _stall(faults)
    if faults.rate is not None:
        _slow(faults.rate)


def _lie(faults: Faults) -> None:
    honest = Exchange._send_block
    served = 0

    def send_block(self: Exchange, session: PeerSession, key: bytes, payload: Buffer) -> None:
        nonlocal served
        served += len(payload)
        manifest = CID.from_bytes(key).codec is Codec.DAG_CBOR
        if served > faults.after and (faults.lie_manifest if manifest else faults.lie):
            payload = bytearray(payload)
            payload[len(payload) // 2] ^= 0x55
        honest(self, session, key, payload)

    Exchange._send_block = send_block  # type: ignore[method-assign]


def _stall(faults: Faults) -> None:
    honest = PeerSession.send_block
    served = 0

    def send_block(self: PeerSession, block: Any) -> None:
        nonlocal served
        if served < faults.after:
            served += block.size
            honest(self, block)

    PeerSession.send_block = send_block  # type: ignore[method-assign]


def _slow(rate: float) -> None:
    honest = PeerSession._send
    free_at = 0.0  # when the line has sent all that was given to it

    async def send(self: PeerSession, parts: Sequence[Any]) -> None:
        nonlocal free_at
        size = sum(map(len, parts))
        if size > SMALL:
            free_at = max(free_at, trio.current_time()) + size / rate
            await trio.sleep_until(free_at)
        await honest(self, parts)

    PeerSession._send = send  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lie", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lie-manifest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stall", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--after", type=parse_size, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=parse_size, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", metavar="P2PNODE ARGUMENTS")
    given = parser.parse_args()
    inject(Faults(given.lie, given.lie_manifest, given.stall, given.after, given.rate))

    from p2pnode.cli.main import main as node

    sys.argv = ["p2pnode", *given.arguments]
    node()


if __name__ == "__main__":
    main()

"""Asking one peer what it has of an image, without fetching anything of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from p2pnode.errors import RemoteError
from p2pnode.swarm.exchange import Exchange
from protocols.cid import CID
from protocols.exchange.messages import Availability


async def holdings(exchange: Exchange, peer: str, root: CID) -> Availability:
    """What `peer` says it has of image `root`. Waits as long as the peer lets us.

    Raises `RemoteError` when there can be no session with it, or it ends.
    """
    answers: list[Availability] = []
    answered = trio.Event()

    def heard(other: str, message: Availability) -> None:
        if other == peer and message.root == root:
            answers.append(message)
            answered.set()

    await exchange.join(peer)
    exchange.availability_callbacks.append(heard)
    try:
        while not answers:
            if not exchange.follow(peer, root):
                raise RemoteError(f"peer {peer} ended the session")
            await _first(answered.wait, exchange.left)  # a session that ended may have been replaced by another
        return answers[0]
    finally:
        exchange.availability_callbacks.remove(heard)
        exchange.follow(peer, root, active=False)


async def _first(*waits: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(each: Callable[[], Awaitable[None]]) -> None:
            await each()
            nursery.cancel_scope.cancel()

        for each in waits:
            nursery.start_soon(wait, each)

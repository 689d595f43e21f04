"""When peers on our own network can be left alone with what is still wanted.

Neighbours who fetch the same image share it out among themselves (`swarm.Swarm`): each gets its part from elsewhere,
and the rest from the others. Peers elsewhere rest meanwhile, unless neighbours turn out to be slow, or get nothing
either.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocols.exchange.state import Download, Peer

NEAR_GRACE = 1.0  # s that neighbours may take for one chunk, or be without a new one, before others are asked
NEAR_ENOUGH = 0.25  # of the rate of all others: a line that is shared is worth sparing
NEAR_SLOW = 10.0  # s for which neighbours that are too slow get no privilege


def left_to_neighbours(d: Download, peers: Iterable[Peer], now: float) -> bool:
    """Whether peers elsewhere should not be asked for what neighbours have, or are about to get."""
    if now < d.near_slow_until:
        return False
    rates = {True: 0.0, False: 0.0}
    there = False
    waited = -1.0  # s for the next block of a neighbour; negative: none owes us any
    for peer in peers:
        if d.id in peer.has and peer.resting_until <= now:
            rates[peer.near] += peer.window.rate
            there |= peer.near
            if peer.near and peer.in_flight:
                first, _ = next(iter(peer.in_flight.values()))
                waited = max(waited, now - max(first, peer.answered))
    if not there or not rates[False]:
        return False  # none is awake, or what they would be compared with is not known yet
    if d.near_progress is None:
        d.near_progress = now
    if waited < 0:  # they have nothing for us now, and may be getting it
        return now - d.near_progress < NEAR_GRACE
    if rates[True] >= NEAR_ENOUGH * rates[False] or (waited < NEAR_GRACE and not rates[True]):
        return True
    d.near_slow_until = now + NEAR_SLOW
    return False

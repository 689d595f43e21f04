"""The in-memory world that the tests of the exchange share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.swarm.test_exchange import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(tmp_path, nursery)
        yield world
        nursery.cancel_scope.cancel()
    for peer in world.peers:
        peer.store.close()

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from tests.interop import installation
from tests.interop.link import Link, linked
from tests.interop.remote import Remote

TEST_TIMEOUT = 60.0  # s
PEERS = {"js": installation.js_libp2p, "kubo": installation.kubo, "stock": installation.stock_py_libp2p}


@pytest.fixture(scope="session", params=PEERS)
def installed(request: pytest.FixtureRequest) -> Iterator[Remote]:
    """A peer of each implementation, its software installed. Skips when there is no way to the registry."""
    remote = Remote(request.param, PEERS[request.param]())
    yield remote
    remote.stop()


@pytest.fixture
async def remote(installed: Remote) -> Remote:
    """The peer, running."""
    await installed.ensure()
    return installed


@pytest.fixture(params=["we-dial", "they-dial"])
async def link(request: pytest.FixtureRequest, remote: Remote) -> AsyncIterator[Link]:
    """A node of ours, connected to the peer."""
    with trio.fail_after(TEST_TIMEOUT):
        async with linked(remote, we_dial=request.param == "we-dial") as link:
            yield link

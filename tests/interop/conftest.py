from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from tests.interop import installation
from tests.interop.link import Link, linked
from tests.interop.remote import Remote

TEST_TIMEOUT = 60.0  # s


@pytest.fixture(scope="session")
def remotes() -> Iterator[dict[str, Remote]]:
    all_of_them = [
        Remote("js", installation.js_libp2p),
        Remote("kubo", installation.kubo, needs_folder=True),
        Remote("stock", installation.stock_py_libp2p),
    ]
    yield {remote.name: remote for remote in all_of_them}
    for remote in all_of_them:
        remote.stop()


@pytest.fixture(params=["js", "kubo", "stock"])
async def remote(request: pytest.FixtureRequest, remotes: dict[str, Remote]) -> Remote:
    """A running peer of each implementation."""
    remote: Remote = remotes[request.param]
    await remote.ensure(remote.install())
    return remote


@pytest.fixture(params=["we-dial", "they-dial"])
async def link(request: pytest.FixtureRequest, remote: Remote) -> AsyncIterator[Link]:
    """A node of ours, connected to the peer."""
    with trio.fail_after(TEST_TIMEOUT):
        async with linked(remote, we_dial=request.param == "we-dial") as link:
            yield link

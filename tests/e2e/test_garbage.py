"""What Nix collects as garbage, a running node no longer promises to anybody."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2pnode import announcing
from p2pnode.config import Config
from p2pnode.node import Node
from p2pnode.progress import silent
from p2pnode.swarm.exchange import Exchange
from p2pnode.swarm.holdings import chunk_key
from protocols.cid import CID
from tests.nix.stores import ChrootStore

pytestmark = pytest.mark.nix


def announced_for(node: Node, spec: str) -> list[bytes]:
    """The keys of an image of one path and one chunk: of itself, its path, its chunk."""
    image = node._store.image(CID.parse(spec))
    assert image is not None
    (obj,) = image.objects
    return [image.id.to_bytes(), *announcing.nar_keys(image), *map(chunk_key, obj.layout.digests)]


async def test_collected_paths_are_withdrawn(
    tmp_path: Path, nix_store_command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "SURVEY_INTERVAL", 0.05)
    telling, told = trio.open_memory_channel[str](10)
    tell = Exchange.tell

    async def tell_us_too(self: Exchange, root: CID) -> None:
        await telling.send(str(root))
        await tell(self, root)

    monkeypatch.setattr(Exchange, "tell", tell_us_too)
    store = ChrootStore(tmp_path / "store")
    paths = []
    for name in ("collected", "kept"):
        (tmp_path / name).write_bytes(name.encode() * 100_000)
        paths.append(store.add(tmp_path / name))
    config = Config(
        home=tmp_path / "home",
        listen=("/ip4/127.0.0.1/tcp/0",),
        mdns=False,
        upnp=False,
        reachability="public",
        nix_store=store.root,
    )
    async with Node.open(config) as node:
        results = [await node.provide(str(path), kind=None, name=None, report=silent) for path in paths]
        keys = [announced_for(node, result["image"]) for result in results]
        assert all(key in node._router._plan for some in keys for key in some)
        with trio.fail_after(20):
            assert [await told.receive() for _ in paths] == [result["image"] for result in results]
            store.nix_store("--delete", paths[0])
            assert await told.receive() == results[0]["image"]
        assert told.statistics().current_buffer_used == 0
        assert not any(key in node._router._plan for key in keys[0])
        assert all(key in node._router._plan for key in keys[1])
        shown = {each["image"]: each["complete"] for each in await node.images()}
        assert shown == {results[0]["image"]: False, results[1]["image"]: True}
        assert (await node.verify(results[1]["image"], silent))["ok"]

"""Nodes with gateways over an in-memory network: stores, exchange, HTTP and signatures are real."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio

from p2pnode.gateway.gateway import Gateway, Services, Settings
from p2pnode.gateway.peers import NarinfoServer
from p2pnode.gateway.records import PathRecords, part_of
from p2pnode.images.objects import ImportRun
from p2pnode.images.paths import keep_registered
from p2pnode.net.memory import MemoryNetwork
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.hashes import nix32_encode
from p2pnode.nix.narmap import dump
from p2pnode.nix.signatures import SecretKey, SignedInfo
from p2pnode.nix.storepath import StorePath
from p2pnode.nix.trust import TrustedKeys
from p2pnode.nix.trust_policy import Trust
from p2pnode.progress import silent
from p2pnode.store.records import Origin
from p2pnode.swarm.holdings import chunk_key
from protocols.cid import CID
from protocols.manifest import FASTCDC, Image, ImageObject, Kind, encode_image
from protocols.narinfo import nar_key, provider_key
from tests.nix.caches import KEYS, SECRET
from tests.swarm.peers import BasePeer, BaseWorld

DEMANDED = Trust(KEYS, demanded=True)
NOT_DEMANDED = Trust(TrustedKeys(), demanded=False)


Closure = Mapping[str, tuple[bytes, Sequence[str]]]


@dataclass(frozen=True)
class Path_:
    """One path of a test closure: what is registered, and its NAR."""

    signed: SignedInfo
    nar: bytes

    @property
    def path(self) -> StorePath:
        return self.signed.info.path

    @property
    def narinfo_url(self) -> str:
        return f"/{self.path.digest}.narinfo"

    @property
    def nar_url(self) -> str:
        return f"/nar/{nix32_encode(self.signed.info.nar_hash)}.nar"


class Node(BasePeer):
    """One with records of store paths."""

    def __init__(self, home: Path, network: MemoryNetwork, registry: dict[bytes, set[str]]) -> None:
        super().__init__(home, network, registry)
        self.records = PathRecords(self.store)
        self.server = NarinfoServer(network, self.records)
        self.locks: dict[CID, trio.Lock] = {}
        self._announced: set[CID] = set()
        self._news = trio.Event()

    def _announce(self, image: Image) -> None:
        super()._announce(image)
        self._announced.add(image.id)
        self._news.set()
        self._news = trio.Event()

    async def announces(self, count: int) -> None:
        """Wait until so many images were announced: one from an upstream cache is when all that it brings is kept."""
        with trio.fail_after(10):
            while len(self._announced) < count:
                await self._news.wait()

    def services(self) -> Services:
        return Services(
            self.network,
            self.router,
            self.store,
            self.exchange,
            self.fetcher,
            self.records,
            self._discover,
            self._announce,
            lambda root: self.locks.setdefault(root, trio.Lock()),
            trio.lowlevel.checkpoint,
        )

    def provide(self, closure: Closure, key: SecretKey | None = SECRET) -> list[Path_]:
        """Provide a closure of single files, name -> (contents, names of references); references first."""
        run = ImportRun(self.store, FASTCDC, silent, lambda: False)
        made: dict[str, Path_] = {}
        objects: dict[str, ImageObject] = {}
        for name, (data, references) in closure.items():
            digest = nix32_encode(hashlib.sha256(name.encode() + data[:64]).digest()[:20])
            path = StorePath(digest, name)
            tree = self.home / "nix" / "store" / path.base_name
            tree.parent.mkdir(parents=True, exist_ok=True)
            tree.write_bytes(data)
            obj = objects[path.base_name] = run.nar(tree, path.base_name)
            assert obj.nar_hash is not None
            info = PathInfo(
                path, obj.nar_hash, obj.size, tuple(sorted(made[each].path for each in references)), None, None
            )
            signatures = () if key is None else (key.sign(info),)
            made[name] = Path_(SignedInfo(info, signatures), b"".join(map(bytes, dump(tree))))
        order = sorted(objects)
        numbers = {base_name: number for number, base_name in enumerate(order)}
        finished = []
        for base_name in order:
            each = next(each for each in made.values() if each.path.base_name == base_name)
            references = tuple(sorted(numbers[ref.base_name] for ref in each.signed.info.references))
            obj = objects[base_name]
            finished.append(ImageObject(base_name, obj.size, obj.layout, obj.nar_hash, None, references, None))
        attributes = {"root": numbers[list(made.values())[-1].path.base_name]}
        encoded = encode_image(Kind.CLOSURE, attributes, finished)
        image = Image(encoded.id, Kind.CLOSURE, attributes, tuple(finished), tuple(encoded.blocks))
        self.store.put_blocks(encoded.blocks)
        self.store.add_image(image, name="closure", origin=Origin.PROVIDED, complete=True, path=str(self.home))
        keep_registered(self.store, image, [each.signed for each in made.values()])
        self.records.learn(image)
        keys = [image.id.to_bytes(), *map(chunk_key, image.chunks)]
        for each in made.values():
            keys += [nar_key(each.signed.info.nar_hash), provider_key(part_of(each.path))]
        self.router.provide(keys)
        return list(made.values())


class World(BaseWorld):
    """The network, and the gateways that were opened in it."""

    def __init__(self, tmp_path: Path, nursery: trio.Nursery) -> None:
        super().__init__(tmp_path, nursery)
        self.gateways: list[Gateway] = []

    async def node(self, name: str) -> Node:
        return await self.add(Node(self.tmp_path / name, self.fabric.node(name), self.registry))

    async def gateway(self, node: Node, trust: Trust = DEMANDED, **settings: object) -> httpx.AsyncClient:
        """A client of a gateway of `node`; no request of it waits for more than 20 s."""
        chosen = Settings(**{"host": "127.0.0.1", "port": 0, **settings})  # type: ignore[arg-type]

        async def run(task_status: trio.TaskStatus[httpx.AsyncClient]) -> None:
            async with Gateway.open(chosen, node.services(), trust, node.home / "spool") as gateway:
                url = f"http://{gateway.addresses[0]}"
                async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
                    self.gateways.append(gateway)
                    task_status.started(client)
                    await trio.sleep_forever()

        client: httpx.AsyncClient = await self.nursery.start(run)
        return client

"""Give nodes parts of an image, before their daemons start: what a half-finished fetch would have left them with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from p2pnode.store import Store
from p2pnode.store.records import Origin
from protocols.cid import CID
from swarmlib.process import SwarmError

_BATCH = 64


def shares(chunks: int, nodes: int, copies: int) -> list[list[int]]:
    """Chunk numbers for each node: every chunk at `copies` of them in turn, none at all of them."""
    if not 1 <= copies < nodes:
        raise SwarmError(f"--copies must be from 1 to {nodes - 1}, or a provider would hold everything")
    return [[chunk for chunk in range(chunks) if (node - chunk) % nodes < copies] for node in range(nodes)]


def give(source: Path, image_id: str, homes: Sequence[Path], copies: int) -> int:
    """Put a share of an image that `source` (a home) holds into each of `homes`; returns the number of chunks."""
    id = CID.parse(image_id)
    with Store.open(source) as store:
        image = store.image(id)
        if image is None:
            raise SwarmError(f"{source} does not hold image {image_id}")
        blocks = {cid: block for cid in image.blocks if (block := store.block(cid)) is not None}
        digests = list(image.chunks)
        for home, numbers in zip(homes, shares(len(digests), len(homes), copies), strict=True):
            _give(store, home, id, blocks, [digests[number] for number in numbers])
    return len(digests)


def _give(source: Store, home: Path, id: CID, blocks: dict[CID, bytes], digests: Sequence[bytes]) -> None:
    with Store.open(home) as store:
        store.put_blocks(blocks)
        image = store.image(id) or _decode(id, blocks)
        store.add_image(image, name="split", origin=Origin.FETCHED, complete=False, path=None)
        landing = store.landing(image)
        try:
            for start in range(0, len(digests), _BATCH):
                batch = digests[start : start + _BATCH]
                _check(landing.accept_many([(digest, (source.read(digest),)) for digest in batch]))
        finally:
            landing.close()


def _decode(id: CID, blocks: dict[CID, bytes]):  # type: ignore[no-untyped-def]
    from protocols.manifest import ImageAssembler

    assembler = ImageAssembler(id)
    while assembler.missing:
        for cid in sorted(assembler.missing):
            assembler.add(cid, blocks[cid])
    return assembler.image()


def _check(verdicts: Collection[bool]) -> None:
    if not all(verdicts):
        raise SwarmError("the source's chunks do not match their hashes")

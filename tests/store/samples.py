"""Images made of random bytes, and what a fetch does with them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from p2pnode.images.exporter import exporter
from p2pnode.store import Store
from p2pnode.store.records import Origin
from protocols.manifest import Chunking, Image, ImageAssembler, ImageObject, Kind, Layout, encode_image

CHUNK = 4096


def sample_file(seed: int, chunks: int, *, zeros: Iterable[int] = ()) -> tuple[Image, dict, dict[bytes, bytes], bytes]:
    """A `file` image cut into 4 KiB: the image, its manifest blocks, its chunks, its bytes."""
    source = random.Random(seed)
    holes = set(zeros)
    parts = [bytes(CHUNK) if i in holes else source.randbytes(CHUNK) for i in range(chunks)]
    data = b"".join(parts)
    digests = tuple(blake3(part).digest() for part in parts)
    layout = Layout(Chunking.fixed(CHUNK), digests, (CHUNK,) * chunks)
    obj = ImageObject("file", len(data), layout, file_hash=blake3(data).digest())
    encoded = encode_image(Kind.FILE, {}, [obj])
    assembler = ImageAssembler(encoded.id)
    while assembler.missing:
        for cid in sorted(assembler.missing):
            assembler.add(cid, encoded.blocks[cid])
    return assembler.image(), encoded.blocks, dict(zip(digests, parts, strict=True)), data


def add(store: Store, image: Image, blocks: dict, name: str = "sample") -> None:
    store.put_blocks(blocks)
    store.add_image(image, name=name, origin=Origin.FETCHED, complete=False, path=None)


def export(store: Store, image: Image, out: Path | None, *, force: bool = False, keep_chunks: bool = False) -> None:
    """What the fetcher does once all chunks are here."""
    target = exporter(store, image, out, force=force, keep_chunks=keep_chunks)
    target.check()
    for number, obj in enumerate(image.objects):
        target.begin_object(number)
        for digest in obj.layout.digests:
            target.feed(store.read(digest))
        target.end_object()
    path = target.finish()
    store.mark_complete(image.id, None if path is None else str(path))

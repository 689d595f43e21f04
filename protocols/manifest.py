"""Manifests: image > object > layout > chunk, as canonical DAG-CBOR blocks (format in README.md, manifest.cddl).

`encode_image` turns a description into blocks; `ImageAssembler` turns blocks that arrive in any order, from anybody,
back into an `Image`, strictly and bounded: every block is hashed, counts are checked against what the parent
promised before anything is asked for, and a manifest that is not in canonical form is refused, so that one content
has one id.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

from protocols import dagcbor
from protocols.chunk_list import ChunkList
from protocols.cid import CID, DIGEST_SIZE, Codec
from protocols.errors import DecodeError, ManifestError

Leaf = TypeVar("Leaf", list[Any], ChunkList)

FORMAT_VERSION = 1
MAX_BLOCK = 1 << 20  # kubo refuses blocks over 2 MiB; half of it leaves room for envelopes
MAX_CHUNK = 4 << 20
MAX_CHUNKS = 1 << 22  # 1 TiB at the usual 256 KiB
MAX_MANIFEST = 512 << 20  # all blocks of one image: MAX_CHUNKS chunks take 200 MB, MAX_OBJECTS usual objects as much
MAX_OBJECTS = 1 << 18  # the largest NixOS closures have some 10,000 paths
MAX_SIZE = 1 << 46
MAX_PATH = 1024
MAX_CA = 256
MAX_TREE_DEPTH = 3
INLINE_CHUNKS = 16  # up to 4 MiB of content: most store paths need no layout block of their own
LEAF_CHUNKS = 4096  # 47 bytes each: leaves of 190 KiB
LEAF_BYTES = 256 << 10  # object lists are cut by encoded size, as objects differ widely
FANOUT = 4096


class Kind(enum.StrEnum):
    """What an image is made of, and so who can import and export it."""

    MICROVM = "microvm"
    CONTAINER = "container"
    STORE_PATH = "store-path"
    CLOSURE = "closure"
    FILE = "file"
    DIRECTORY = "directory"


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a stream was cut. Part of the format: other parameters share no chunks.

    `fastcdc`: FastCDC 2020 with the reference gear table (sizes in bytes). `fixed`: min = avg = max.
    """

    algorithm: str
    min_size: int
    avg_size: int
    max_size: int
    normalisation: int = 0
    seed: int = 0

    @classmethod
    def fixed(cls, size: int) -> Chunking:
        return cls("fixed", size, size, size)

    def to_value(self) -> list[Any]:
        if self.algorithm == "fixed":
            return ["fixed", self.max_size]
        return [self.algorithm, self.min_size, self.avg_size, self.max_size, self.normalisation, self.seed]

    @classmethod
    def from_value(cls, value: Any) -> Chunking:
        match value:
            case list() if any(isinstance(part, bool) for part in value):
                pass  # `true` would be taken for 1, and encoded as `true` again
            case ["fixed", int(size)] if 4096 <= size <= MAX_CHUNK:
                return cls.fixed(size)
            case ["fastcdc", int(low), int(avg), int(high), int(norm), int(seed)] if (
                64 <= low <= avg <= high <= MAX_CHUNK and 0 <= norm <= 3 and 0 <= seed < 1 << 64
            ):
                return cls("fastcdc", low, avg, high, norm, seed)
        raise ManifestError("unknown chunking parameters")

    def check_size(self, size: int, *, last: bool) -> None:
        if not 0 < size <= self.max_size or (not last and size < self.min_size):
            raise ManifestError(f"a chunk of {size} bytes cannot come from this chunking")


FASTCDC = Chunking("fastcdc", 64 << 10, 256 << 10, 1 << 20, 2, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """One stream (a NAR or a file) as its ordered chunks: BLAKE3 digests and sizes in bytes, side by side."""

    chunking: Chunking
    digests: tuple[bytes, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def check(self) -> None:
        """Raises ManifestError for sizes that cannot come from the chunking."""
        if self.sizes:
            self.chunking.check_size(self.sizes[-1], last=True)
        for size in set(self.sizes[:-1]):
            self.chunking.check_size(size, last=False)


@dataclass(frozen=True, slots=True)
class ImageObject:
    """One NAR or file of an image.

    `path`: base name of a store path, or a relative name. Exactly one of `nar_hash` (SHA-256 of the NAR) and
    `file_hash` (BLAKE3 of the file) is set; `size` is that of the NAR or file, in bytes. `references` are indices
    into the image's objects.
    """

    path: str
    size: int
    layout: Layout
    nar_hash: bytes | None = None
    file_hash: bytes | None = None
    references: tuple[int, ...] = ()
    ca: str | None = None

    @property
    def is_nar(self) -> bool:
        return self.nar_hash is not None


@dataclass(frozen=True)
class Image:
    """A whole manifest. `blocks` are the CIDs of all blocks it is made of, the image block first."""

    id: CID
    kind: Kind
    attributes: Mapping[str, Any]
    objects: tuple[ImageObject, ...]
    blocks: tuple[CID, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all objects together, duplicates included."""
        return sum(obj.size for obj in self.objects)

    @cached_property
    def chunks(self) -> dict[bytes, int]:
        """The distinct chunks, digest to size in bytes, in order of first appearance.

        Positions in this order are the bit numbers of AVAILABILITY frames.
        """
        return dict(pair for obj in self.objects for pair in zip(obj.layout.digests, obj.layout.sizes, strict=True))

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of the distinct chunks together."""
        return sum(self.chunks.values())


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image block's CID and all blocks of its manifest."""

    id: CID
    blocks: dict[CID, bytes]


def encode_image(kind: Kind, attributes: Mapping[str, Any], objects: Sequence[ImageObject]) -> EncodedImage:
    """The blocks of an image. Objects must be in order of path. Raises `ManifestError` if it breaks a limit."""
    _check_objects(objects)
    _check_attributes(attributes, len(objects))
    return _encode(kind, attributes, objects)


def _encode(kind: Kind, attributes: Mapping[str, Any], objects: Sequence[ImageObject]) -> EncodedImage:
    blocks: dict[CID, bytes] = {}
    values = [_object_value(obj, blocks) for obj in objects]
    top: dict[str, Any] = {"v": FORMAT_VERSION, "kind": str(kind), "attrs": dict(attributes)}
    top |= _tree("objects", list(_leaves_by_bytes(values)), blocks)
    root = _put(top, blocks)
    return EncodedImage(root, {root: blocks.pop(root), **blocks})


@dataclass(frozen=True, slots=True)
class EncodedLayout:
    """The root of the DAG of one NAR or file, and the blocks of it above the chunks."""

    root: CID
    blocks: dict[CID, bytes]


def encode_layout(layout: Layout) -> EncodedLayout:
    """The DAG of one NAR or file by itself, whatever image it is in, so that its root names just these bytes.

    One chunk is its own root. More have a layout block, also where they are so few that images inline them. Raises
    `ManifestError` for none.
    """
    if not layout.digests:
        raise ManifestError("no chunks, and so no DAG")
    if len(layout.digests) == 1:
        return EncodedLayout(CID(Codec.RAW, layout.digests[0]), {})
    blocks: dict[CID, bytes] = {}
    return EncodedLayout(_put_layout(layout, blocks), blocks)


def _put_layout(layout: Layout, blocks: dict[CID, bytes]) -> CID:
    count = len(layout.digests)
    leaves = [_chunks(layout, start, start + LEAF_CHUNKS) for start in range(0, count, LEAF_CHUNKS)]
    node = {"v": FORMAT_VERSION, "size": layout.size, "chunking": layout.chunking.to_value()}
    return _put(node | _tree("chunks", leaves, blocks), blocks)


def _chunks(layout: Layout, start: int, end: int) -> ChunkList:
    return ChunkList(layout.digests[start:end], layout.sizes[start:end])


def _put(value: Any, blocks: dict[CID, bytes]) -> CID:
    data = dagcbor.encode(value)
    if len(data) > MAX_BLOCK:
        raise ManifestError(f"a manifest block of {len(data)} bytes is over the limit of {MAX_BLOCK}")
    cid = CID.of(Codec.DAG_CBOR, data)
    blocks[cid] = data
    return cid


def _object_value(obj: ImageObject, blocks: dict[CID, bytes]) -> dict[str, Any]:
    value: dict[str, Any] = {"path": obj.path, "size": obj.size}
    if obj.nar_hash is not None:
        value["nar"] = obj.nar_hash
    else:
        value["blake3"] = obj.file_hash
    if obj.references:
        value["refs"] = list(obj.references)
    if obj.ca is not None:
        value["ca"] = obj.ca
    layout = obj.layout
    if len(layout.digests) <= INLINE_CHUNKS:
        value["layout"] = {"chunking": layout.chunking.to_value(), "chunks": _chunks(layout, 0, INLINE_CHUNKS)}
    else:
        value["layout"] = _put_layout(layout, blocks)
    return value


def _leaves_by_bytes(values: Sequence[Any]) -> Iterator[list[Any]]:
    leaf: list[Any] = []
    room = LEAF_BYTES
    for value in values:
        size = len(dagcbor.encode(value))
        if leaf and size > room:
            yield leaf
            leaf, room = [], LEAF_BYTES
        leaf.append(value)
        room -= size
    yield leaf


def _tree(name: str, leaves: Sequence[list[Any] | ChunkList], blocks: dict[CID, bytes]) -> dict[str, Any]:
    """`{name: items}` if one leaf holds them all, else `{"tree": [[link, items below], ...]}` over a balanced tree."""
    if len(leaves) <= 1:
        return {name: leaves[0] if leaves else []}
    level: list[tuple[CID, int]] = [(_put({name: leaf}, blocks), len(leaf)) for leaf in leaves]
    while len(level) > FANOUT:
        groups = [level[i : i + FANOUT] for i in range(0, len(level), FANOUT)]
        level = [(_put({"tree": group}, blocks), sum(count for _, count in group)) for group in groups]
    return {"tree": level}


def _check_path(path: Any) -> None:
    if not isinstance(path, str) or not 0 < len(path.encode(errors="replace")) <= MAX_PATH or "\0" in path:
        raise ManifestError("an object's path is empty, too long, or not text")
    if any("\ud800" <= char <= "\udfff" for char in path):
        raise ManifestError(f"object path {path!r} is not UTF-8 and cannot be named in an image")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ManifestError(f"object path {path!r} is absolute or has empty, '.' or '..' parts")


def _check_objects(objects: Sequence[ImageObject]) -> None:
    if not 0 < len(objects) <= MAX_OBJECTS:
        raise ManifestError(f"an image of {len(objects)} objects (1 to {MAX_OBJECTS} are allowed)")
    before = ""
    total = 0
    for obj in objects:
        _check_path(obj.path)
        if obj.path <= before:
            raise ManifestError("objects are not in order of their paths, or one path is there twice")
        before = obj.path
        if (obj.nar_hash is None) == (obj.file_hash is None):
            raise ManifestError(f"object {obj.path} needs either a NAR hash or a file hash")
        if len(obj.nar_hash or obj.file_hash or b"") != DIGEST_SIZE:
            raise ManifestError(f"the hash of {obj.path} is not {DIGEST_SIZE} bytes")
        if obj.ca is not None and len(obj.ca) > MAX_CA:
            raise ManifestError(f"the content address of {obj.path} is not a short text")
        if not 0 <= obj.size <= MAX_SIZE or obj.layout.size != obj.size:
            raise ManifestError(f"the chunks of {obj.path} do not add up to its size of {obj.size} bytes")
        obj.layout.check()
        refs = obj.references
        ascending = all(a < b for a, b in pairwise(refs))
        if not ascending or (refs and not 0 <= refs[0] <= refs[-1] < len(objects)):
            raise ManifestError(f"the references of {obj.path} are out of range or out of order")
        total += len(obj.layout.digests)
    if total > MAX_CHUNKS:
        raise ManifestError(f"an image of more than {MAX_CHUNKS} chunks")
    sizes: dict[bytes, int] = {}
    for obj in objects:
        for digest, size in zip(obj.layout.digests, obj.layout.sizes, strict=True):
            if sizes.setdefault(digest, size) != size:
                raise ManifestError(f"one chunk of {obj.path} is given two sizes")


def _check_attributes(attributes: Mapping[str, Any], objects: int) -> None:
    if len(attributes) > 64:
        raise ManifestError("more than 64 attributes")
    for name, value in attributes.items():
        if not isinstance(name, str) or len(name) > 256:
            raise ManifestError("an attribute whose name is not a short text")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ManifestError("an attribute that does not fit 64 bits")
        if not isinstance(value, str | int | bytes) or (isinstance(value, str | bytes) and len(value) > 4096):
            raise ManifestError("an attribute that is not a number, a text or bytes of up to 4096")
    root = attributes.get("root", 0)
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < objects:
        raise ManifestError("attribute 'root' is not the number of an object")


def _fields(value: Any, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError("a manifest block that is not a map")
    names = set(required)
    if not names <= value.keys() <= names | set(optional):
        raise ManifestError(f"a manifest map with fields {_short(sorted(value)[:16])} where {sorted(names)} belong")
    return value


def _short(value: Any) -> str:
    """What a stranger wrote, for a message: a block of 1 MiB does not belong in a log."""
    text = repr(value)
    return text if len(text) <= 128 else text[:125] + "..."


def _count(value: Any, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise ManifestError(f"a number in a manifest that is not within 0 to {limit}")
    return value


class ImageAssembler:
    """Puts an image together from blocks: feed what `missing` names until it is empty, then take `image()`.

    Blocks may come from anybody, in any order. `add` raises `ManifestError` for a block that hashes to its CID but
    breaks the format: then the image itself is bad, whoever sent it.
    """

    def __init__(self, root: CID) -> None:
        if root.codec is not Codec.DAG_CBOR:
            raise ManifestError("an image id names a dag-cbor block, and this one does not")
        self.root = root
        self._blocks: dict[CID, Any] = {}
        self._unfolded = 0
        self._received = 0
        self.missing: set[CID] = {root}

    def add(self, cid: CID, data: bytes) -> None:
        """Take one block. Blocks nobody asked for are ignored. Raises `ManifestError`."""
        if cid not in self.missing:
            return
        if len(data) > MAX_BLOCK or not cid.matches(data):
            raise ManifestError(f"block {cid} does not have the bytes its id promises")
        self._received += len(data)
        if self._received > MAX_MANIFEST:
            raise ManifestError(f"a manifest of more than {MAX_MANIFEST} bytes")
        try:
            value = dagcbor.decode(data)
        except DecodeError as exc:
            raise ManifestError(f"block {cid}: {exc}") from exc
        if cid == self.root:
            self._check_top(value)
        self.missing.discard(cid)
        self._blocks[cid] = value
        for link, limit in _links(value):
            if limit > MAX_CHUNKS or len(self._blocks) + len(self.missing) > MAX_OBJECTS:
                raise ManifestError("a manifest of more blocks than any image needs")
            if link not in self._blocks:
                self.missing.add(link)

    @staticmethod
    def _check_top(value: Any) -> None:
        if isinstance(value, dict) and value.get("v") != FORMAT_VERSION:
            raise ManifestError(f"image format version {_short(value.get('v'))} is not known here (this node knows 1)")
        top = _fields(value, {"v", "kind", "attrs"}, {"objects", "tree"})
        if not isinstance(top["kind"], str) or top["kind"] not in set(Kind):
            raise ManifestError(f"image kind {_short(top['kind'])} is not known here")
        if not isinstance(top["attrs"], dict):
            raise ManifestError("image attributes that are not a map")

    def image(self) -> Image:
        """The finished image. Raises `ManifestError` if it breaks a rule that needs the whole to be seen."""
        if self.missing:
            raise ManifestError(f"{len(self.missing)} blocks of the manifest are missing")
        top = self._blocks[self.root]
        self._unfolded = 0
        objects = tuple(self._objects(top))
        _check_objects(objects)
        _check_attributes(top["attrs"], len(objects))
        kind = Kind(top["kind"])
        # One content, one id: what decodes must be what we would have encoded.
        again = _encode(kind, top["attrs"], objects)
        if again.id != self.root:
            raise ManifestError("a manifest that is not in its canonical form")
        return Image(self.root, kind, top["attrs"], objects, tuple(again.blocks))

    def _objects(self, top: dict[str, Any]) -> Iterator[ImageObject]:
        before = ""
        for leaf in self._leaves(top, "objects", list, MAX_OBJECTS):
            for value in leaf:
                obj = self._object(value)
                # Checked here already: a tree may link one big leaf a thousand times, and would unfold it each time.
                if obj.path <= before:
                    raise ManifestError("objects are not in order of their paths, or one path is there twice")
                before = obj.path
                yield obj

    def _leaves(self, node: dict[str, Any], name: str, kind: type[Leaf], limit: int) -> Iterator[Leaf]:
        """The lists of items below `node`, in order, none of them empty.

        Iterative: the stack holds (block value, items it must have, depth)."""
        stack: list[tuple[Any, int | None, int]] = [(node, None, 0)]
        total = 0
        while stack:
            value, promised, depth = stack.pop()
            if depth:
                value = _fields(value, (), (name, "tree"))
            if (name in value) == ("tree" in value):
                raise ManifestError(f"a list node needs either {name!r} or 'tree'")
            if name in value:
                items = value[name]
                if promised is None and isinstance(items, list) and not items:
                    continue
                if not isinstance(items, kind):
                    raise ManifestError(f"a list of {name} that holds something else")
                if promised is not None and len(items) != promised:
                    raise ManifestError("a list leaf does not have as many items as its parent promised")
                total += len(items)
                if total > limit:
                    raise ManifestError(f"a list of more than {limit} items")
                yield items
                continue
            if depth >= MAX_TREE_DEPTH:
                raise ManifestError("a list tree that is too deep")
            children = [(link, _count(count, limit)) for link, count in _tree_entries(value["tree"])]
            below = sum(count for _, count in children)
            if below > limit or (promised is not None and below != promised):
                raise ManifestError("the counts of a list tree do not add up")
            if not all(count for _, count in children):  # else three levels unfold to 4096 ** 3 empty leaves
                raise ManifestError("a list tree with an empty branch")
            stack.extend((self._blocks[link], count, depth + 1) for link, count in reversed(children))

    def _object(self, value: Any) -> ImageObject:
        obj = _fields(value, {"path", "size", "layout"}, {"nar", "blake3", "refs", "ca"})
        _check_path(obj["path"])
        for name in ("nar", "blake3"):
            if name in obj and (not isinstance(obj[name], bytes) or len(obj[name]) != DIGEST_SIZE):
                raise ManifestError(f"the {name} hash of {obj['path']} is not {DIGEST_SIZE} bytes")
        refs = obj.get("refs", [])
        if not isinstance(refs, list) or ("refs" in obj and not refs):
            raise ManifestError(f"the references of {obj['path']} are not a list with entries")
        ca = obj.get("ca")
        if "ca" in obj and (not isinstance(ca, str) or len(ca) > MAX_CA):
            raise ManifestError(f"the content address of {obj['path']} is not a short text")
        return ImageObject(
            path=obj["path"],
            size=_count(obj["size"], MAX_SIZE),
            layout=self._layout(obj["layout"]),
            nar_hash=obj.get("nar"),
            file_hash=obj.get("blake3"),
            references=tuple(_count(ref, MAX_OBJECTS) for ref in refs),
            ca=ca,
        )

    def _layout(self, value: Any) -> Layout:
        if isinstance(value, CID):
            node = _fields(self._blocks[value], {"v", "size", "chunking"}, {"chunks", "tree"})
            if node["v"] != FORMAT_VERSION:
                raise ManifestError(f"layout format version {_short(node['v'])} is not known here")
        else:
            node = _fields(value, {"chunking", "chunks"})
        digests: list[bytes] = []
        sizes: list[int] = []
        for leaf in self._leaves(node, "chunks", ChunkList, MAX_CHUNKS):
            _count(max(leaf.sizes), MAX_CHUNK)
            digests += leaf.digests
            sizes += leaf.sizes
        # Many objects may link to one huge layout: count before the next one is unfolded.
        self._unfolded += len(digests)
        if self._unfolded > MAX_CHUNKS:
            raise ManifestError(f"an image of more than {MAX_CHUNKS} chunks")
        return Layout(Chunking.from_value(node["chunking"]), tuple(digests), tuple(sizes))


def _tree_entries(value: Any) -> list[tuple[CID, Any]]:
    if not isinstance(value, list) or not 0 < len(value) <= FANOUT:
        raise ManifestError(f"a tree node that does not have 1 to {FANOUT} children")
    entries = []
    for entry in value:
        match entry:
            case [CID(codec=Codec.DAG_CBOR) as link, int(count)]:
                entries.append((link, count))
            case _:
                raise ManifestError("a tree entry that is not a block link and a count")
    return entries


def _links(value: Any) -> Iterator[tuple[CID, int]]:
    """The manifest blocks that `value` links to (chunks are no manifest blocks), with the items promised below."""
    if not isinstance(value, dict):
        raise ManifestError("a manifest block that is not a map")
    if "tree" in value:
        yield from _tree_entries(value["tree"])
    objects = value.get("objects")
    if isinstance(objects, list):
        for obj in objects:
            layout = obj.get("layout") if isinstance(obj, dict) else None
            if isinstance(layout, CID):
                if layout.codec is not Codec.DAG_CBOR:
                    raise ManifestError("a layout link that is not a dag-cbor block")
                yield layout, 0

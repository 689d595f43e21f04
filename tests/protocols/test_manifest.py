from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor
from protocols import manifest as mf
from protocols.cid import CID, Codec
from protocols.errors import ManifestError

FIXED = mf.Chunking.fixed(4096)
HASH = bytes(32)


def layout(numbers: list[int], last: int = 4096) -> mf.Layout:
    digests = tuple(i.to_bytes(32, "big") for i in numbers)
    return mf.Layout(FIXED, digests, (4096,) * (len(numbers) - 1) + (last,) if numbers else ())


def obj(path: str = "a", numbers: list[int] | None = None, **more: Any) -> mf.ImageObject:
    content = layout(numbers if numbers is not None else [1])
    fields: dict[str, Any] = {"size": content.size, "layout": content, "nar_hash": HASH} | more
    return mf.ImageObject(path, **fields)


def assemble(root: CID, blocks: dict[CID, bytes], order: random.Random | None = None) -> mf.Image:
    assembler = mf.ImageAssembler(root)
    while assembler.missing:
        wanted = sorted(assembler.missing)
        if order is not None:
            order.shuffle(wanted)
        assembler.add(wanted[0], blocks[wanted[0]])
    return assembler.image()


@st.composite
def images(draw: st.DrawFn) -> tuple[mf.Kind, dict[str, Any], list[mf.ImageObject]]:
    paths = sorted(draw(st.sets(st.from_regex(r"[a-zé]{1,6}(/[a-z]{1,3})?", fullmatch=True), min_size=1, max_size=6)))
    objects = []
    for path in paths:
        numbers = draw(st.lists(st.integers(0, 50), max_size=40))
        hashes: dict[str, bytes] = {
            draw(st.sampled_from(["nar_hash", "file_hash"])): draw(st.binary(min_size=32, max_size=32))
        }
        content = layout(numbers)
        refs = tuple(sorted(draw(st.sets(st.integers(0, len(paths) - 1)))))
        ca = draw(st.none() | st.text(max_size=20))
        objects.append(mf.ImageObject(path, content.size, content, references=refs, ca=ca, **hashes))
    attributes = draw(
        st.dictionaries(st.text(max_size=9).filter("root".__ne__), st.text(max_size=9) | st.integers(-9, 9))
    )
    return draw(st.sampled_from(mf.Kind)), attributes, objects


@given(images(), st.randoms(use_true_random=False))
def test_images_round_trip_in_any_order_of_blocks(image: Any, rng: random.Random) -> None:
    kind, attributes, objects = image
    encoded = mf.encode_image(kind, attributes, objects)
    again = assemble(encoded.id, encoded.blocks, rng)
    assert (again.kind, again.attributes, list(again.objects)) == (kind, attributes, objects)
    assert again.blocks == tuple(encoded.blocks) and again.blocks[0] == encoded.id
    assert mf.encode_image(kind, dict(reversed(attributes.items())), objects).id == encoded.id


def test_long_chunk_and_object_lists_become_trees_of_small_blocks() -> None:
    objects = [obj(f"p{i:05}", [i]) for i in range(8000)] + [obj("q", list(range(10_000)))]
    encoded = mf.encode_image(mf.Kind.CLOSURE, {}, objects)
    assert len(encoded.blocks) > 6 and max(map(len, encoded.blocks.values())) <= mf.MAX_BLOCK
    assert assemble(encoded.id, encoded.blocks, random.Random(1)).objects == tuple(objects)


def test_trees_of_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mf, "LEAF_CHUNKS", 4)
    monkeypatch.setattr(mf, "FANOUT", 4)
    objects = [obj("q", list(range(60)))]
    encoded = mf.encode_image(mf.Kind.FILE, {}, objects)
    assert assemble(encoded.id, encoded.blocks, random.Random(1)).objects == tuple(objects)


def test_chunks_are_numbered_by_first_appearance() -> None:
    encoded = mf.encode_image(mf.Kind.CLOSURE, {}, [obj("a", [5, 3, 5]), obj("b", [3, 9])])
    image = assemble(encoded.id, encoded.blocks)
    assert [digest[-1] for digest in image.chunks] == [5, 3, 9] and image.chunk_bytes == 3 * 4096


@pytest.mark.parametrize(
    "objects",
    [
        [],
        [obj("")],
        [obj("/a")],
        [obj("a/../b")],
        [obj("a//b")],
        [obj(".")],
        [obj("a\0")],
        [obj("x" * 1025)],
        [obj("\udc80")],
        [obj("b"), obj("a")],
        [obj("a"), obj("a")],
        [obj(nar_hash=None)],
        [obj(file_hash=HASH)],
        [obj(nar_hash=b"short")],
        [obj(size=4095)],
        [obj(references=(1,))],
        [obj(references=(0, 0))],
        [obj(references=(-1,))],
        [obj(ca="x" * 257)],
        [obj(layout=layout([1], 5000), size=5000)],
        [obj(layout=mf.Layout(FIXED, (HASH, HASH), (4000, 4096)), size=8096)],
        [obj(layout=mf.Layout(FIXED, (HASH, HASH), (4096, 96)), size=4192)],
        [obj(layout=mf.Layout(FIXED, (HASH,), (0,)), size=0)],
    ],
)
def test_bad_objects_are_refused_when_encoding(objects: list[mf.ImageObject]) -> None:
    with pytest.raises(ManifestError):
        mf.encode_image(mf.Kind.FILE, {}, objects)


@pytest.mark.parametrize(
    "attributes",
    [{"root": 1}, {"root": -1}, {"root": "a"}, {"root": True}, {"x": []}, {"x": None}, {"x": 1.5}, {"x": 1 << 64},
     {"x": "y" * 4097}, {1: "x"}, {"n" * 257: 1}, {str(i): i for i in range(65)}],
)  # fmt: skip
def test_bad_attributes_are_refused(attributes: Any) -> None:
    with pytest.raises(ManifestError):
        mf.encode_image(mf.Kind.FILE, attributes, [obj()])


def put(value: Any, blocks: dict[CID, bytes]) -> CID:
    data = dagcbor.encode(value)
    cid = CID.of(Codec.DAG_CBOR, data)
    blocks[cid] = data
    return cid


CHUNK = [CID(Codec.RAW, HASH), 4096]


def plain(**changes: Any) -> dict[str, Any]:
    inline = {"chunking": ["fixed", 4096], "chunks": [CHUNK]}
    return {"path": "a", "size": 4096, "nar": HASH, "layout": inline} | changes


def top(**changes: Any) -> dict[str, Any]:
    value = {"v": 1, "kind": "file", "attrs": {}, "objects": [plain()]} | changes
    return {name: part for name, part in value.items() if part is not ...}


def with_layout(**changes: Any) -> dict[str, Any]:
    return top(objects=[plain(layout={"chunking": ["fixed", 4096], "chunks": [CHUNK]} | changes)])


def test_the_plain_value_is_good() -> None:
    blocks: dict[CID, bytes] = {}
    assert assemble(put(top(), blocks), blocks).size == 4096


@pytest.mark.parametrize(
    "value",
    [
        [], "x", {}, top(v=2), top(v=True), top(v="x" * 10_000), top(kind="tape"), top(kind=[]), top(kind={}),
        top(kind=...), top(attrs=[]), top(more=1), top(objects=...), top(objects={}), top(objects=[]), top(objects=[1]),
        top(tree=[]), top(objects=..., tree=[]), top(objects=..., tree=[[CID(Codec.RAW, HASH), 1]]),
        top(objects=..., tree=[[1, 1]]), top(objects=..., tree={}), top(objects=[plain(path=1)]),
        top(objects=[plain(path="../a")]), top(objects=[plain(size=-1)]), top(objects=[plain(size=True)]),
        top(objects=[plain(nar=b"")]), top(objects=[plain(blake3=HASH)]), top(objects=[plain(refs=[])]),
        top(objects=[plain(refs=0)]), top(objects=[plain(refs=["0"])]), top(objects=[plain(ca=None)]),
        top(objects=[plain(ca=1)]), top(objects=[plain(x=1)]), top(objects=[plain(layout=1)]),
        top(objects=[plain(layout=CID(Codec.RAW, HASH))]), top(objects=[plain(), plain()]), top(attrs={"x": [1]}),
        with_layout(chunks=[[CID(Codec.DAG_CBOR, HASH), 4096]]), with_layout(chunks=[[HASH, 4096]]),
        with_layout(chunks=[CHUNK[:1]]), with_layout(chunks=1), with_layout(v=1), with_layout(size=4096),
        with_layout(chunking=["fixed", 4095]), with_layout(chunking=["fixed", 4096, 0]), with_layout(chunking=[]),
        with_layout(chunking=["fastcdc", 64, 256, 4096, True, 0]),
        with_layout(chunking=["fastcdc", 64, 256, 4096, 0, -1]),
        with_layout(chunking=["fastcdc", 256, 64, 4096, 0, 0]), with_layout(chunking=["rabin", 1, 2, 3]),
        with_layout(chunks=[CHUNK] * 17),
    ],
)  # fmt: skip
def test_bad_blocks_are_refused(value: Any) -> None:
    blocks: dict[CID, bytes] = {}
    root = put(value, blocks)
    with pytest.raises(ManifestError) as caught:
        assemble(root, blocks)
    assert len(str(caught.value)) < 2000


def test_a_fastcdc_layout_with_true_for_one_is_another_spelling() -> None:
    blocks: dict[CID, bytes] = {}
    root = put(with_layout(chunking=["fastcdc", 64, 256, 4096, 1, 0]), blocks)
    assert assemble(root, blocks).objects[0].layout.chunking.normalisation == 1
    root = put(with_layout(chunking=["fastcdc", 64, 256, 4096, True, 0]), blocks)
    with pytest.raises(ManifestError):
        assemble(root, blocks)


def test_wrong_bytes_and_unasked_blocks() -> None:
    encoded = mf.encode_image(mf.Kind.FILE, {}, [obj()])
    assembler = mf.ImageAssembler(encoded.id)
    with pytest.raises(ManifestError):
        assembler.add(encoded.id, b"\xa0")
    assembler.add(CID.of(Codec.DAG_CBOR, b"other"), b"other")
    assert assembler.missing == {encoded.id}
    with pytest.raises(ManifestError):
        assembler.image()
    with pytest.raises(ManifestError):
        mf.ImageAssembler(CID.of(Codec.RAW, b"x"))


def test_a_tree_of_empty_leaves_does_not_unfold() -> None:
    blocks: dict[CID, bytes] = {}
    link = put({"objects": []}, blocks)
    for _ in range(2):
        link = put({"tree": [[link, 0]] * 4096}, blocks)
    with pytest.raises(ManifestError, match="empty branch"):
        assemble(put(top(objects=..., tree=[[link, 0]] * 4096), blocks), blocks)


def test_one_big_leaf_linked_often_does_not_unfold() -> None:
    blocks: dict[CID, bytes] = {}
    leaf = put({"objects": [plain(refs=[0] * 900_000)]}, blocks)
    tree = put({"tree": [[leaf, 1]] * 60}, blocks)
    with pytest.raises(ManifestError, match="order of their paths"):
        assemble(put(top(objects=..., tree=[[tree, 60]] * 4096), blocks), blocks)


@pytest.mark.slow
def test_many_objects_of_one_big_layout_stop_at_the_limit() -> None:
    blocks: dict[CID, bytes] = {}
    chunks = put({"chunks": [CHUNK] * 4096}, blocks)
    node = {"v": 1, "size": 256 << 24, "chunking": ["fixed", 4096], "tree": [[chunks, 4096]] * 256}
    link = put(node, blocks)
    objects = [plain(path=f"p{i:03}", size=256 << 24, layout=link) for i in range(100)]
    with pytest.raises(ManifestError, match="more than 4194304 chunks"):
        assemble(put(top(objects=objects), blocks), blocks)


def test_counts_that_do_not_add_up_and_trees_too_deep() -> None:
    blocks: dict[CID, bytes] = {}
    leaf = put({"objects": [plain()]}, blocks)
    for count in (2, 1 << 23, -1):
        with pytest.raises(ManifestError):
            assemble(put(top(objects=..., tree=[[leaf, count]]), blocks), blocks)
    for _ in range(4):
        leaf = put({"tree": [[leaf, 1]]}, blocks)
    with pytest.raises(ManifestError):
        assemble(put(top(objects=..., tree=[[leaf, 1]]), blocks), blocks)


def test_mutated_blocks_give_manifest_errors_only() -> None:
    rng = random.Random(5)
    encoded = mf.encode_image(mf.Kind.CLOSURE, {"root": 1}, [obj("a", [1, 2], ca="x"), obj("b", [3], references=(0,))])
    good = encoded.blocks[encoded.id]
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 2)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        root = CID.of(Codec.DAG_CBOR, data)
        try:
            assembler = mf.ImageAssembler(root)
            assembler.add(root, bytes(data))
            if not assembler.missing:
                image = assembler.image()
                assert mf.encode_image(image.kind, image.attributes, image.objects).id == root
        except ManifestError:
            pass


@pytest.mark.parametrize("count", [2, mf.INLINE_CHUNKS, mf.INLINE_CHUNKS + 1, mf.LEAF_CHUNKS, mf.LEAF_CHUNKS + 1])
def test_a_layout_by_itself_is_the_block_that_images_link_to(count: int) -> None:
    encoded = mf.encode_layout(layout(list(range(count)), last=1))
    assert encoded.root in encoded.blocks and all(cid.matches(data) for cid, data in encoded.blocks.items())
    image = mf.encode_image(
        mf.Kind.FILE,
        {},
        [obj(numbers=list(range(count)), layout=layout(list(range(count)), 1), size=4096 * (count - 1) + 1)],
    )
    linked = set(encoded.blocks) & set(image.blocks)
    assert linked == (set(encoded.blocks) if count > mf.INLINE_CHUNKS else set())


def test_one_chunk_is_its_own_dag_and_none_is_no_dag() -> None:
    encoded = mf.encode_layout(layout([7], last=5))
    assert encoded == mf.EncodedLayout(CID(Codec.RAW, (7).to_bytes(32, "big")), {})
    with pytest.raises(ManifestError):
        mf.encode_layout(layout([]))

from __future__ import annotations

import hashlib
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import NarError
from p2pnode.nix.nar_reader import NarHasher, NarReader
from tests.nix.trees import File, Link, Node, naive_nar, nasty_tree, trees, vector_bytes, vectors


class Recorder:
    """Keeps every event, and builds the tree that they tell of."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.root: Node | None = None
        self._open: list[dict] = []
        self._file = (b"", False, 0)
        self._data = b""

    def enter_directory(self, name):
        self.events.append(("enter", name))
        directory: dict = {}
        self._put(name, directory)
        self._open.append(directory)

    def leave_directory(self):
        self.events.append(("leave",))
        self._open.pop()

    def begin_file(self, name, executable, size):
        self._file = (name, executable, size)
        self._data = b""

    def file_contents(self, data):
        assert isinstance(data, memoryview) and len(data) > 0
        self._data += data

    def end_file(self):
        name, executable, size = self._file
        assert len(self._data) == size
        self.events.append(("file", name, executable, self._data))
        self._put(name, File(self._data, executable))

    def symlink(self, name, target):
        self.events.append(("symlink", name, target))
        self._put(name, Link(target))

    def _put(self, name, node):
        if self._open:
            self._open[-1][name] = node
        else:
            assert name == b"" and self.root is None
            self.root = node


def read(pieces) -> Recorder:
    recorder = Recorder()
    reader = NarReader(recorder)
    for piece in pieces:
        reader.feed(piece)
    reader.close()
    return recorder


@pytest.mark.parametrize("vector", vectors("accept"))
def test_accepted_vectors(vector):
    data = vector_bytes(vector)
    assert hashlib.sha256(data).hexdigest() == vector["sha256"]
    whole = read([data])
    assert naive_nar(whole.root) == data  # a NAR that is taken is the NAR of its tree
    assert read(data[i : i + 1] for i in range(len(data))).events == whole.events


@pytest.mark.parametrize("vector", vectors("reject"))
def test_rejected_vectors(vector):
    data = vector_bytes(vector)
    with pytest.raises(NarError):
        read([data])
    with pytest.raises(NarError):
        read(data[i : i + 1] for i in range(len(data)))


@settings(deadline=None)
@given(trees, st.data())
def test_any_split_gives_the_same_events(tree, data):
    nar = naive_nar(tree)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(nar)), max_size=12)))
    pieces = [nar[a:b] for a, b in zip([0, *cuts], [*cuts, len(nar)], strict=True)]
    split = read(pieces)
    assert split.events == read([nar]).events
    assert split.root == tree


@settings(deadline=None)
@given(trees, st.data())
def test_no_changed_byte_gives_the_same_tree(tree, data):
    nar = bytearray(naive_nar(tree))
    nar[data.draw(st.integers(0, len(nar) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = read([bytes(nar)]).root
    except NarError:
        return
    assert changed != tree
    assert naive_nar(changed) == nar


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_garbage_ends_in_an_error(data):
    with pytest.raises(NarError):
        read([data])
    with pytest.raises(NarError):
        read([naive_nar({})[:56], data])


def test_every_truncation_is_noticed():
    nar = naive_nar({b"a": File(b"0123456789", executable=True), b"b": Link(b"x"), b"c": {}})
    for length in range(len(nar)):
        with pytest.raises(NarError):
            read([nar[:length]])


def test_nothing_more_after_an_error():
    reader = NarReader(Recorder())
    with pytest.raises(NarError):
        reader.feed(b"x" * 100)
    with pytest.raises(NarError):
        reader.feed(naive_nar({}))
    with pytest.raises(NarError):
        reader.close()


def test_an_exception_of_the_visitor_ends_the_reading():
    class Full(Recorder):
        def symlink(self, name, target):
            raise OSError("full")

    reader = NarReader(Full())
    nar = naive_nar(Link(b"x"))
    with pytest.raises(OSError, match="full"):
        reader.feed(nar)
    with pytest.raises(NarError):
        reader.close()


def test_a_size_limit_is_kept_before_the_contents_come():
    nar = naive_nar(File(bytes(1000)))
    reader = NarReader(Recorder(), max_size=len(nar))
    reader.feed(nar)
    reader.close()
    with pytest.raises(NarError, match="1000 bytes"):
        NarReader(Recorder(), max_size=500).feed(nar[:104])
    with pytest.raises(NarError):
        NarReader(Recorder(), max_size=len(nar)).feed(nar + b"\0")


def test_contents_are_not_kept():
    class Counter(Recorder):
        total = 0

        def file_contents(self, data):
            self.total += len(data)

        def end_file(self):
            pass

    visitor = Counter()
    reader = NarReader(visitor)
    size = 64 << 20
    nar = naive_nar(File(b""))
    head, tail = nar[:88], nar[96:]
    block = bytes(1 << 20)
    tracemalloc.start()
    try:
        reader.feed(head + size.to_bytes(8, "little"))
        for _ in range(64):
            reader.feed(block)
        reader.feed(tail)
        reader.close()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert visitor.total == size


def test_any_bytes_like_input():
    nar = naive_nar(nasty_tree())
    assert read([bytearray(nar)]).events == read([memoryview(nar)]).events


@settings(deadline=None)
@given(st.lists(st.binary(max_size=100)))
def test_hasher(pieces):
    hasher = NarHasher()
    for piece in pieces:
        hasher.feed(memoryview(piece))
    assert hasher.size == sum(map(len, pieces))
    assert hasher.digest() == hashlib.sha256(b"".join(pieces)).digest()

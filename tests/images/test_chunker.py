import hashlib
import io
import random

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from pyfastcdc import FastCDC

from p2pnode.errors import Cancelled
from p2pnode.images.chunker import blake3_256, chunk_stream, sha256
from protocols.manifest import FASTCDC, Chunking

SMALL = Chunking("fastcdc", 64, 256, 1024, 2, 0)


def reference(data: bytes, chunking: Chunking) -> list[bytes]:
    if chunking.algorithm == "fixed":
        return [data[i : i + chunking.max_size] for i in range(0, len(data), chunking.max_size)]
    cutter = FastCDC(chunking.avg_size, min_size=chunking.min_size, max_size=chunking.max_size, normalized_chunking=2)
    return [bytes(chunk.data) for chunk in cutter.cut_buf(data)]


class Ragged:
    """A stream that gives as many bytes as it likes each time."""

    def __init__(self, data: bytes, seed: int) -> None:
        self._stream = io.BytesIO(data)
        self._random = random.Random(seed)

    def fill(self, view: memoryview) -> int:
        return self._stream.readinto(view[: self._random.randint(1, len(view))])


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 7_000),  # a window of one byte makes as many jobs
    window=st.integers(1, 5000),
    chunking=st.sampled_from([SMALL, Chunking.fixed(4096)]),
    repeat=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_same_chunks_however_buffered(seed: int, size: int, window: int, chunking: Chunking, repeat: int) -> None:
    data = random.Random(seed).randbytes(size) * repeat
    result = chunk_stream(Ragged(data, seed).fill, chunking, sha256(), window_size=window)
    expected = reference(data, chunking)
    assert list(result.layout.sizes) == [len(chunk) for chunk in expected]
    assert list(result.layout.digests) == [blake3(chunk).digest() for chunk in expected]
    assert result.digest == hashlib.sha256(data).digest()
    result.layout.check()


def test_default_parameters_over_several_windows() -> None:
    data = random.Random(1).randbytes(23_000_001)
    read: list[int] = []
    result = chunk_stream(io.BytesIO(data).readinto, FASTCDC, blake3_256(), advance=read.append)
    assert list(result.layout.digests) == [blake3(chunk).digest() for chunk in reference(data, FASTCDC)]
    assert result.digest == blake3(data).digest()
    assert sum(read) == len(data)


def test_cancelled_and_failing_streams_end() -> None:
    with pytest.raises(Cancelled):
        chunk_stream(io.BytesIO(bytes(100)).readinto, SMALL, sha256(), cancelled=lambda: True)

    def broken(view: memoryview) -> int:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        chunk_stream(broken, SMALL, sha256())

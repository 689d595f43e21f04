"""Fuzzer bytes as a sequence of decisions, the same in every Python and without the fuzzer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Reads decisions from bytes; at their end everything is zero and `left` is false."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pos = 0

    @property
    def left(self) -> bool:
        return self._pos < len(self._data)

    def integer(self, size: int) -> int:
        """An unsigned integer of `size` bytes."""
        return int.from_bytes(self.bytes(size).ljust(size, b"\0"), "big")

    def below(self, n: int) -> int:
        """An integer in [0, n), n at most 256."""
        return self.integer(1) % n

    def of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def bytes(self, n: int) -> bytes:
        """The next `n` bytes; fewer at the end."""
        piece = self._data[self._pos : self._pos + n]
        self._pos += n
        return piece

    def rest(self) -> bytes:
        return self.bytes(len(self._data))

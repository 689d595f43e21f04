"""Bytes of files through sockets, without a look at them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from p2pnode.errors import StoreError
from p2pnode.nix import file_range
from p2pnode.nix.file_range import FileRange, send_all

SIZE = 3 << 20


async def send(sock: socket.socket, parts: list[bytes | FileRange]) -> None:
    await trio.to_thread.run_sync(send_all, sock, parts, trio.from_thread.check_cancelled)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


@pytest.fixture
def contents(tmp_path: Path) -> bytes:
    data = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(data)
    return data


@pytest.fixture
def fd(tmp_path: Path, contents: bytes) -> Iterator[int]:
    number = os.open(tmp_path / "file", os.O_RDWR)
    yield number
    os.close(number)


def received(theirs: socket.socket, count: int) -> bytes:
    return theirs.recv(count, socket.MSG_WAITALL)


@pytest.mark.parametrize("sendfile", [True, False])
async def test_parts_arrive_in_order(
    pair: tuple[socket.socket, socket.socket],
    fd: int,
    contents: bytes,
    sendfile: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not sendfile:  # as a file system without it does

        def refused(*args: int) -> int:
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(file_range.os, "sendfile", refused)
    whole = FileRange(fd, 5, SIZE - 5)
    parts: list[bytes | FileRange] = [b"head", *whole.cut(1 << 20), b"tail"]
    assert [len(part) for part in parts[1:-1]] == [1 << 20, 1 << 20, (1 << 20) - 5]
    expected = b"head" + contents[5:] + b"tail"
    got = b""

    def receive() -> None:
        nonlocal got
        got = received(pair[1], len(expected))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, receive)
        await send(pair[0], parts)
    assert got == expected
    assert whole.read() == contents[5:]


async def test_a_file_that_became_shorter(pair: tuple[socket.socket, socket.socket], fd: int) -> None:
    piece = FileRange(fd, 0, SIZE)
    os.ftruncate(fd, 1000)
    with pytest.raises(StoreError, match="ends before"):
        await send(pair[0], [piece])
    with pytest.raises(StoreError, match="ends before"):
        piece.read()


async def test_it_can_be_cancelled_while_nobody_reads(pair: tuple[socket.socket, socket.socket], fd: int) -> None:
    with trio.move_on_after(0.2) as scope:
        await send(pair[0], [FileRange(fd, 0, SIZE)])
    assert scope.cancelled_caught


async def test_a_reader_that_went_away(pair: tuple[socket.socket, socket.socket], fd: int) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        await send(pair[0], [FileRange(fd, 0, SIZE)])

"""Client of the Nix daemon: asks and adds store paths as any unprivileged Nix does, over its worker protocol.

Source: libstore/worker-protocol.md, daemon.cc and remote-store.cc of Nix 2.8 and 2.36. Protocol versions 1.21 (Nix 2.3)
to 1.35 are spoken; a newer daemon comes down to ours. The daemon checks hash, signatures and references of every path
itself, and keeps all that was added or rooted over one connection from its garbage collector until that is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import trio

from p2pnode.errors import (
    DaemonError,
    DaemonUnavailable,
    DiskFull,
    NixMissing,
    NodeError,
    Untrusted,
    VerificationFailed,
)
from p2pnode.failures import most_telling, one_line
from p2pnode.nix import daemon_wire as wire
from p2pnode.nix.cli import PathInfo, find_nix_store
from p2pnode.nix.daemon_wire import Message, Op, WireReader
from p2pnode.nix.file_range import FileRange, send_all
from p2pnode.nix.nar_reader import Buffer
from p2pnode.nix.signatures import SignedInfo
from p2pnode.nix.storepath import StorePath

Piece = Buffer | FileRange

OpenNar = Callable[[PathInfo], AsyncGenerator[Buffer, None]]
"""Gives the NAR of a path, in pieces of any size, which are the caller's from then on; called when the path's turn has
come, closed when it is done with."""

OpenPieces = Callable[[PathInfo], AsyncGenerator[Piece, None]]
"""The same, where some of the pieces may still lie in files."""

DEFAULT_SOCKET = Path("/nix/var/nix/daemon-socket/socket")

OLDEST, NEWEST = 21, 35
"""Minor versions. 35 is Nix 2.15; from 38 on daemons want to exchange lists of features, and none is of use here."""

ANSWER_TIMEOUT = 300.0
"""Seconds for an answer, or for a frame to be taken. A garbage collection holds the store's lock for minutes."""

HELLO_TIMEOUT = 30.0

MAX_FRAME = 1 << 18
"""Bytes of a frame: the daemon allocates and clears what a frame announces, which should stay in its cache."""

SEND_BUFFER = 1 << 20
"""Bytes asked of the kernel for its side of the socket, which gives what it allows: fewer waits for one another."""

_PIECES_AHEAD = 2  # taken from the source while the daemon is busy with one: reading and writing overlap
_MIN_FRAME = 1 << 16  # smaller pieces of a NAR are joined: a NAR may come in thousands of pieces of 100 bytes
_MAX_FIELDS = 1024  # of an activity, or traces of an error
_MAX_PATHS = 1 << 16  # paths per question: the daemon answers when it has read all, and we read when all is sent

log = logging.getLogger(__name__)

_COLOUR = re.compile("\x1b\\[[0-9;]*m")


class DaemonConnection:
    """One connection, one request at a time. Made by `connect_socket` and `connect_process`.

    `version`: minor version of the protocol. `nix_version`: of the daemon, if it says so. `trusted`: whether it
    believes us without signatures; None if it does not say. Every method raises DaemonError with Nix's own sentence
    when the daemon refuses; after an error of the connection itself only closing it is left.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.version = 0
        self.nix_version: str | None = None
        self.trusted: bool | None = None
        self._stream = stream
        self._reader = WireReader(self._receive)
        self._lock = trio.Lock()
        self._broken = False

    async def _hello(self, newest: int) -> None:
        with _time_limit(HELLO_TIMEOUT):
            await self._write(wire.u64(wire.CLIENT_MAGIC))
            if await self._reader.u64() != wire.SERVER_MAGIC:
                raise DaemonError("what answers is not a Nix daemon")
            major, minor = divmod(await self._reader.u64(), 256)
            if major != wire.MAJOR or minor < OLDEST:
                raise DaemonError(f"the Nix daemon speaks protocol {major}.{minor}, too old or too new for us")
            self.version = min(minor, newest)
            # Then two fields that have lost their meaning: CPU affinity, and whether to reserve disk space.
            await self._write(wire.u64(wire.MAJOR * 256 + self.version) + wire.u64(0) + wire.u64(0))
            if self.version >= 33:
                self.nix_version = await self._reader.string(256)
            if self.version >= 35:
                self.trusted = {1: True, 2: False}.get(await self._reader.u64())
            error = await self._answer()
        if error is not None:
            raise error

    async def query_valid_paths(self, paths: Iterable[StorePath]) -> set[StorePath]:
        """Those of `paths` that are valid; nothing is substituted."""
        wanted = list(paths)
        valid: set[StorePath] = set()
        for start in range(0, len(wanted), _MAX_PATHS):
            batch = wanted[start : start + _MAX_PATHS]
            substitute = wire.u64(0) if self.version >= 27 else b""
            async with self._request(Op.QUERY_VALID_PATHS, wire.strings(map(str, batch)), substitute):
                valid |= set(map(StorePath.parse, await self._reader.strings(len(batch))))
        return valid

    async def query_path_info(self, path: StorePath) -> SignedInfo | None:
        """What is registered about a path; None if it is not valid."""
        async with self._request(Op.QUERY_PATH_INFO, wire.string(str(path))):
            if not await self._reader.u64():
                return None
            return await self._reader.path_info(path)

    async def add_temp_root(self, path: StorePath) -> None:
        """Keep `path`, valid or not yet, from the garbage collector until the connection is closed."""
        async with self._request(Op.ADD_TEMP_ROOT, wire.string(str(path))):
            await self._reader.u64()

    async def add_indirect_root(self, link: Path) -> None:
        """Make the symlink `link`, which must point to a store path, a root for as long as it exists."""
        async with self._request(Op.ADD_INDIRECT_ROOT, wire.string(os.fsencode(link))):
            await self._reader.u64()

    async def add_path(self, signed: SignedInfo, open_nar: OpenPieces, *, check_signatures: bool = True) -> None:
        """Make a path valid; what it refers to, itself apart, must be valid already.

        The NAR is streamed; nothing is held but a frame. A path that is valid already is read and ignored. Without
        `check_signatures` a daemon that trusts us does without them; others check all the same.

        Raises Untrusted, VerificationFailed (wrong hash or size), DiskFull, DaemonError, and whatever `open_nar`
        raises; after an error of `open_nar` the connection is broken.

        One path a request, though from 1.32 on one request could add many: Nix 2.8 does not read the NAR of a path
        that somebody else made valid meanwhile, and takes its bytes for the next path ("not an absolute path:
        'nix-archive-1'"). A round trip on a local socket is nothing beside the registration of a path.
        """
        flags = wire.u64(0) + wire.u64(not check_signatures)  # never repair a valid path
        request = wire.u64(Op.ADD_TO_STORE_NAR) + wire.path_info(signed) + flags
        await self._add(request, _checked_nar(signed.info, open_nar))

    async def _add(self, request: bytes, stream: AsyncGenerator[Piece, None]) -> None:
        async with self._exclusive():
            with _time_limit(ANSWER_TIMEOUT):
                await self._write(request)
            error = await (self._stream_framed(stream) if self.version >= 23 else self._stream_asked_for(stream))
        if error is not None:
            raise error

    @asynccontextmanager
    async def _request(self, op: Op, *arguments: bytes) -> AsyncIterator[None]:
        """Send a request; in the block read its result."""
        async with self._exclusive():
            with _time_limit(ANSWER_TIMEOUT):
                await self._write(wire.u64(op) + b"".join(arguments))
                error = await self._answer()
                if error is None:
                    yield
        if error is not None:
            raise error

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One request. Whatever leaves the block early leaves the connection in the middle of something."""
        async with self._lock:
            if self._broken:
                raise DaemonError("the connection to the Nix daemon is broken; open another")
            self._broken = True
            yield
            self._broken = False

    async def _write(self, data: Buffer) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise DaemonError("the Nix daemon closed the connection") from None

    async def _receive(self, count: int) -> bytes | bytearray:
        try:
            return await self._stream.receive_some(count)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def _stream_framed(self, source: AsyncGenerator[Piece, None]) -> NodeError | None:
        """Send a stream in frames while listening for the answer, which may be an error in the middle of it.

        Both at once: a daemon that writes a long log while nobody reads would stop reading our frames. A daemon that
        refuses takes in the rest before it can hear another request, so at an early error the frames are ended.
        """
        answer: NodeError | None = None
        producing = trio.CancelScope()
        give, take = trio.open_memory_channel[Piece](_PIECES_AHEAD)
        all_sent = trio.Event()

        async def produce() -> None:
            with producing:
                async with aclosing(_joined(source)) as pieces:
                    async for piece in pieces:
                        await give.send(piece)
            await give.send(b"")  # not in a finally: after an error of the source the end must not be sent

        async def send_frames() -> None:
            with contextlib.suppress(trio.BrokenResourceError):  # the daemon's answer will say why
                while piece := await take.receive():
                    with _time_limit(ANSWER_TIMEOUT):  # a frame that was begun must be sent whole
                        await self._send_piece(piece)
                with _time_limit(ANSWER_TIMEOUT):
                    await self._stream.send_all(wire.u64(0))
            all_sent.set()
            await trio.sleep(ANSWER_TIMEOUT)  # the source may take its time; a daemon that has everything may not
            raise DaemonError(f"the Nix daemon gave no answer within {ANSWER_TIMEOUT:g} s")

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(produce)
                nursery.start_soon(send_frames)
                answer = await self._answer()
                producing.cancel()
                await all_sent.wait()
                nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            error = most_telling(group)
            raise error from error.__cause__
        return answer

    async def _send_piece(self, piece: Piece) -> None:
        """Send a piece in frames. Raises trio.BrokenResourceError."""
        if not isinstance(piece, FileRange):
            for start in range(0, len(piece), MAX_FRAME):
                frame = memoryview(piece)[start : start + MAX_FRAME]
                await self._stream.send_all(wire.u64(len(frame)) + frame)
            return
        parts = [part for frame in piece.cut(MAX_FRAME) for part in (wire.u64(len(frame)), frame)]
        assert isinstance(self._stream, trio.SocketStream)
        # A descriptor of our own: a thread that outlives the connection must not meet another file under its number.
        with socket.socket(fileno=os.dup(self._stream.socket.fileno())) as plain:
            try:
                await trio.to_thread.run_sync(send_all, plain, parts, trio.from_thread.check_cancelled)
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def _stream_asked_for(self, source: AsyncGenerator[Piece, None]) -> NodeError | None:
        """Before 1.23 the daemon asks for every piece."""
        async with aclosing(_joined(source)) as pieces:
            rest: Buffer = b""

            async def give(count: int) -> None:
                nonlocal rest
                if not rest:
                    following = await anext(pieces, b"")
                    if isinstance(following, FileRange):
                        following = await trio.to_thread.run_sync(following.read)
                    rest = following
                piece, rest = rest[:count], rest[count:]
                with _time_limit(ANSWER_TIMEOUT):
                    await self._write(wire.string(bytes(piece)))

            return await self._answer(give)

    async def _answer(self, give: Callable[[int], Awaitable[None]] | None = None) -> NodeError | None:
        """Read messages up to the result: None if it follows, or the error that came in its place."""
        reader = self._reader
        while True:
            kind = await reader.u64()
            if kind == Message.LAST:
                return None
            if kind == Message.ERROR:
                return _named(await self._error_text())
            if kind == Message.NEXT:
                log.debug("the Nix daemon says: %s", one_line(await reader.string()))
            elif kind == Message.START_ACTIVITY:
                await reader.u64()  # id
                await reader.u64()  # level
                await reader.u64()  # type
                text = await reader.string()
                await self._skip_fields()
                await reader.u64()  # parent
                if text:
                    log.debug("the Nix daemon says: %s", one_line(text))
            elif kind == Message.STOP_ACTIVITY:
                await reader.u64()
            elif kind == Message.RESULT:
                await reader.u64()  # id
                await reader.u64()  # type
                await self._skip_fields()
            elif kind == Message.READ and give is not None:
                await give(await reader.number(2**63, "count of bytes"))
            else:
                raise DaemonError(f"the Nix daemon sent a message of unknown kind {kind:#x}")

    async def _error_text(self) -> str:
        reader = self._reader
        if self.version < 26:
            text = await reader.string()
            await reader.u64()  # exit status
            return text
        await reader.string()  # "Error"
        await reader.u64()  # level
        await reader.string()  # name
        text = await reader.string()
        await reader.u64()  # no position
        for _ in range(await reader.number(_MAX_FIELDS, "number of traces")):
            await reader.u64()
            await reader.string()
        return text

    async def _skip_fields(self) -> None:
        for _ in range(await self._reader.number(_MAX_FIELDS, "number of fields")):
            if await self._reader.u64():
                await self._reader.string()
            else:
                await self._reader.u64()


@asynccontextmanager
async def connect_socket(path: Path | None = None, *, newest: int = NEWEST) -> AsyncIterator[DaemonConnection]:
    """A connection to the daemon that listens on `path` (or NIX_DAEMON_SOCKET_PATH, or Nix's usual place).

    `newest`: minor version to speak at most. Raises DaemonUnavailable if nobody listens or we may not connect.
    """
    path = path or Path(os.environ.get("NIX_DAEMON_SOCKET_PATH") or DEFAULT_SOCKET)
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise DaemonUnavailable(f"no Nix daemon can be reached at {path}: {reason}") from None
    async with _connection(stream, newest) as connection:
        yield connection


@asynccontextmanager
async def connect_process(store_root: Path | None = None, *, newest: int = NEWEST) -> AsyncIterator[DaemonConnection]:
    """A connection to a daemon of our own, `nix-daemon --stdio`: for a store that we may write to ourselves.

    `store_root`: directory of a chroot store; None is the machine's own. Raises NixMissing, DaemonUnavailable.
    """
    command = [_find_nix_daemon(), "--stdio"]
    if store_root is not None:
        command += ["--store", str(store_root)]
    ours, theirs = socket.socketpair()  # a pipe holds 64 KiB, and every frame would take many turns
    with theirs:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        try:
            process = await trio.lowlevel.open_process(
                command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            await stream.aclose()
            raise DaemonUnavailable(f"{command[0]} could not be started: {error.strerror}") from error
    try:
        async with _connection(stream, newest) as connection:
            yield connection
    finally:
        with trio.CancelScope(shield=True):
            with trio.move_on_after(5):  # it ends when its standard input does
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()


@asynccontextmanager
async def _connection(stream: trio.abc.Stream, newest: int) -> AsyncIterator[DaemonConnection]:
    connection = DaemonConnection(stream)
    if isinstance(stream, trio.SocketStream):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        try:
            await connection._hello(newest)
        except DaemonError as error:
            raise DaemonUnavailable(f"the Nix daemon cannot be talked to: {error}") from error
        yield connection
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)


async def _checked_nar(info: PathInfo, open_nar: OpenPieces) -> AsyncGenerator[Piece, None]:
    """The NAR, which must have the size that it should: Nix ignores what comes after the end of a NAR."""
    left = info.nar_size
    async with aclosing(open_nar(info)) as pieces:
        async for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise VerificationFailed(f"the NAR of {info.path} is longer than {info.nar_size} bytes")
            yield piece
    if left:
        raise VerificationFailed(f"the NAR of {info.path} ends {left} bytes early")


async def _joined(source: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """The same bytes in pieces that are not small, but for the last one, and those before one in a file."""
    small: list[Buffer] = []
    size = 0
    async with aclosing(source) as pieces:
        async for piece in pieces:
            if isinstance(piece, FileRange):
                if size:
                    yield b"".join(small)
                    small.clear()
                    size = 0
                yield piece
                continue
            small.append(piece)
            size += len(piece)
            if size >= _MIN_FRAME:
                yield b"".join(small) if len(small) > 1 else piece
                small.clear()
                size = 0
    if size:
        yield b"".join(small)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise DaemonError(f"the Nix daemon gave no sign of life for {seconds:g} s; is its store locked?") from None


def _named(text: str) -> NodeError:
    """Nix's error as one of ours. Its sentences have been the same since Nix 2.0, but for the second of these."""
    sentence = one_line(" ".join(_COLOUR.sub("", text).split()).removeprefix("error: "))
    if "lacks a valid signature" in sentence or "lacks a signature by a trusted key" in sentence:
        return Untrusted(f"Nix refuses it: {sentence}")
    if "hash mismatch" in sentence or "size mismatch" in sentence:
        return VerificationFailed(f"Nix refuses it: {sentence}")
    if "No space left on device" in sentence or "Disk quota exceeded" in sentence:
        return DiskFull(f"the Nix store is full: {sentence}")
    return DaemonError(f"Nix says: {sentence}")


def _find_nix_daemon() -> str:
    found = shutil.which("nix-daemon")
    if found is None:
        beside = Path(find_nix_store()).with_name("nix-daemon")
        if not beside.exists():
            raise NixMissing("no nix-daemon command was found, and no daemon is running")
        found = str(beside)
    return found

"""/noise for py-libp2p: its handshake, our record layer.

The library encrypts one record per call, joins and copies every payload and makes two system calls per record. Here
many records are gathered into one `write`, up to 1 MiB is read at a time, and AEAD runs in OpenSSL straight from and
into reused buffers. It runs inline: at 2 GB/s a record takes 30 us, a hop to a worker thread more than that.

Wire format: https://github.com/libp2p/specs/tree/master/noise (2-byte big-endian length, Noise message).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from socket import SHUT_WR
from typing import Any

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import ConnectionClosedError, DecryptionFailedException, IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.base_session import BaseSession
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.transport import PROTOCOL_ID
from libp2p.security.noise.transport import Transport as LibraryNoise
from noise.exceptions import (
    NoiseHandshakeError,
    NoiseInvalidMessage,
    NoiseValueError,
)

from p2pnode import slabs

Buffer = bytes | bytearray | memoryview

TAG = 16
MAX_CIPHERTEXT = 65535
MAX_PLAINTEXT = MAX_CIPHERTEXT - TAG
READ_SIZE = 1 << 20
SCRATCH_SIZE = READ_SIZE + 2 + MAX_CIPHERTEXT  # one read behind the beginning of a record
MAX_EMPTY_RECORDS = 128  # in a row; nobody sends any, and each costs us an AEAD call
HANDSHAKE_TIMEOUT = 10.0  # s, from the first byte; four messages of which ours take no time
# Offsets in struct tcp_info, in bytes; times in microseconds. tcpi_min_rtt came with Linux 4.6.
TCP_INFO_RTT = 68
TCP_INFO_MIN_RTT = 148
TCP_INFO_SIZE = 152
# Unsent bytes the kernel holds for us: more would only be a queue that pings and control frames wait in.
NOT_SENT_LOW_WATER = 256 * 1024

# What a hostile or broken peer can make the library's handshake raise, beside HandshakeFailure.
_HANDSHAKE_ERRORS = (
    BaseLibp2pError,
    NoiseHandshakeError,
    NoiseInvalidMessage,
    NoiseValueError,
    InvalidTag,
    ValueError,
    TypeError,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)


class _Cipher:
    """One direction: ChaCha20-Poly1305 under an 8-byte little-endian counter (Noise spec, 12.3)."""

    __slots__ = ("aead", "decrypt_into", "encrypt_into", "n")

    def __init__(self, key: bytes, n: int) -> None:
        self.aead = ChaCha20Poly1305(key)
        self.encrypt_into = getattr(self.aead, "encrypt_into", None)  # cryptography >= 47
        self.decrypt_into = getattr(self.aead, "decrypt_into", None)
        self.n = n

    def _nonce(self) -> bytes:
        nonce = b"\0\0\0\0" + self.n.to_bytes(8, "little")
        self.n += 1
        return nonce

    def seal(self, plaintext: Buffer, out: memoryview) -> None:
        """Encrypt into `out`, which is TAG bytes longer."""
        if self.encrypt_into is not None:
            self.encrypt_into(self._nonce(), plaintext, None, out)
        else:
            out[:] = self.aead.encrypt(self._nonce(), plaintext, None)

    def open(self, record: memoryview, out: memoryview) -> None:
        """Decrypt into `out`, which is TAG bytes shorter."""
        try:
            if self.decrypt_into is not None:
                self.decrypt_into(self._nonce(), record, None, out)
            else:
                out[:] = self.aead.decrypt(self._nonce(), record, None)
        except InvalidTag as exc:
            raise DecryptionFailedException("a record is forged or damaged") from exc


class NoiseConnection(BaseSession):  # type: ignore[misc]
    """The encrypted connection, as the library's code uses it (`read`, `write`, `close`, ...), and in batches as our
    muxer does (`read_batch`, `write_parts`). One reader and one writer at a time.

    Any error on reading or a write that was cut short ends the connection: the cipher states cannot go on.
    """

    def __init__(self, session: Any, raw: Any) -> None:
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            # The library gives the Noise key here; the identity key is what callers ask for.
            remote_permanent_pubkey=session.remote_peer.extract_public_key() or session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
        )
        self.conn = raw
        protocol = session.conn.noise_state.noise_protocol
        out, into = protocol.cipher_state_encrypt, protocol.cipher_state_decrypt
        self._seal = _Cipher(bytes(out.k), out.n)
        self._open = _Cipher(bytes(into.k), into.n)
        self._socket = _trio_socket(raw)
        self._tail = b""  # the beginning of a record whose rest has not arrived
        self._left: list[memoryview] = []  # plaintext that `read` left over
        self._empty = 0
        self._broken: str | None = None
        self._write_lock = trio.Lock()
        if self._socket is not None and hasattr(trio.socket, "TCP_NOTSENT_LOWAT"):
            self._socket.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER)

    def round_trip_times(self) -> tuple[float, float] | None:
        """The kernel's smoothed and minimal round trip times in seconds (linux/tcp.h, tcp_info); None if unknown."""
        if self._socket is None or self._socket.fileno() < 0:
            return None
        info = self._socket.getsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_INFO, TCP_INFO_SIZE)
        if len(info) < TCP_INFO_SIZE:
            return None
        (smoothed,) = struct.unpack_from("=I", info, TCP_INFO_RTT)
        (minimal,) = struct.unpack_from("=I", info, TCP_INFO_MIN_RTT)
        return smoothed / 1e6, minimal / 1e6

    # -- reading

    async def read_batch(self) -> list[memoryview]:
        """The plaintext of all records that have arrived, in one piece or more; empty at the end of the connection.

        Nobody changes it any more. Its memory is kept by any slice of it.

        Raises `DecryptionFailedException` for a record that does not authenticate, `IncompleteReadError` when the
        connection ends within a record, `ConnectionClosedError` when it broke.
        """
        await trio.lowlevel.checkpoint()
        if self._left:
            records, self._left = self._left, []
            return records
        while True:
            if self._broken:
                raise ConnectionClosedError(self._broken, transport="noise")
            arrived = await (self._read_socket() if self._socket is not None else self._read_stream())
            if arrived is None:
                if self._tail:
                    raise IncompleteReadError("the connection ended within a record", received_bytes=len(self._tail))
                return []
            if arrived:
                return arrived

    async def _read_socket(self) -> list[memoryview] | None:
        assert self._socket is not None
        try:
            with slabs.take(SCRATCH_SIZE) as view:  # let go before we wait: an idle connection holds none
                tail = len(self._tail)
                view[:tail] = self._tail
                fd = self._socket.fileno()
                if fd < 0:
                    return None
                n = os.readv(fd, [view[tail : tail + READ_SIZE]])
                if not n:
                    return None
                return self._records(view[: tail + n])
        except BlockingIOError:
            pass
        except OSError as exc:
            raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except (trio.ClosedResourceError, ValueError):
            return None
        return []

    async def _read_stream(self) -> list[memoryview] | None:
        data = await self.conn.read(MAX_CIPHERTEXT)
        if not data:
            return None
        return self._records(memoryview(self._tail + data if self._tail else data))

    def _records(self, view: memoryview) -> list[memoryview]:
        """Decrypt the whole records in `view`, one behind the other into one buffer; the rest is kept.

        (What is longer than a record, as a chunk is, then mostly lies in one piece: a call less for each further one in
        every layer above.)
        """
        whole = []
        pos, end, room, short = 0, len(view), 0, False
        while end - pos >= 2:
            size = view[pos] << 8 | view[pos + 1]
            short = size < TAG
            if short or end - pos - 2 < size:
                break
            whole.append(view[pos + 2 : pos + 2 + size])
            pos += 2 + size
            room += size - TAG
        plaintext = slabs.take(room)
        filled = 0
        try:
            for record in whole:
                size = len(record) - TAG
                self._open.open(record, plaintext[filled : filled + size])
                filled += size
                self._empty = 0 if size else self._empty + 1
                if self._empty > MAX_EMPTY_RECORDS:
                    raise DecryptionFailedException("the peer floods us with empty records")
            if short:  # its length says so: the rest need not come
                raise DecryptionFailedException("a record is shorter than its tag")
        except DecryptionFailedException as exc:
            self._broken = str(exc)
            if not filled:
                raise
        else:
            self._tail = bytes(view[pos:])
        # What came before a bad record was genuine; the next read raises.
        return [plaintext[:filled].toreadonly()] if filled else []

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, as soon as something is there; raises `ConnectionClosedError` at the end."""
        if n == 0:
            return b""
        batch = await self.read_batch()
        if not batch:
            raise ConnectionClosedError("the connection was closed", transport="noise")
        data = batch.pop(0)
        if n is not None and 0 < n < len(data):
            batch.insert(0, data[n:])
            data = data[:n]
        self._left = batch + self._left
        return bytes(data)

    # -- writing

    async def write(self, data: bytes) -> None:
        await self.write_parts([(data,)])

    async def write_parts(self, frames: Iterable[Sequence[Buffer]]) -> None:
        """Write `frames`, each a sequence of buffers: whole frames share a record while they fit into one, and all
        records of about 1 MiB go to the socket at once. Cancelling it breaks the connection."""
        async with self._write_lock:
            if self._broken:
                raise ConnectionClosedError(self._broken, transport="noise")
            done = False
            try:
                frames = list(frames)
                total = sum(len(part) for frame in frames for part in frame)
                total += (2 + TAG) * (len(frames) + total // MAX_PLAINTEXT + 1)
                with slabs.take(min(total, SCRATCH_SIZE)) as out:
                    used = 0
                    for plaintext in _pack(frames):
                        size = len(plaintext) + TAG
                        if used + 2 + size > len(out):
                            await self._send(out[:used])
                            used = 0
                        out[used] = size >> 8
                        out[used + 1] = size & 0xFF
                        self._seal.seal(plaintext, out[used + 2 : used + 2 + size])
                        used += 2 + size
                    if used:
                        await self._send(out[:used])
                done = True
            finally:
                if not done and not self._broken:
                    self._broken = "a write was cut short"

    async def _send(self, data: memoryview) -> None:
        if self._socket is None:
            await self.conn.write(bytes(data))
            return
        try:
            pos = 0
            while pos < len(data):
                try:  # trio's send() costs as much again as the system call
                    pos += os.write(self._socket.fileno(), data[pos:])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
        except OSError as exc:
            raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
        except trio.ClosedResourceError as exc:
            raise ConnectionClosedError("the connection was closed", transport="tcp") from exc

    async def send_eof(self) -> None:
        """Tell the peer that nothing more follows, where the transport below can."""
        if self._socket is not None and self._socket.fileno() >= 0:
            try:
                self._socket.shutdown(SHUT_WR)
            except OSError:
                return  # the peer was faster

    async def close(self) -> None:
        self._broken = self._broken or "the connection was closed"
        await self.conn.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.conn.get_remote_address()  # type: ignore[no-any-return]

    def get_transport_addresses(self) -> list[Any]:
        return self.conn.get_transport_addresses()  # type: ignore[no-any-return]

    def get_connection_type(self) -> Any:
        return self.conn.get_connection_type()


def _pack(frames: Iterable[Sequence[Buffer]]) -> Iterator[Buffer]:
    """Plaintexts of at most MAX_PLAINTEXT bytes; a frame is divided only when it is longer than that. Only what is
    small is joined: of a long part, all but the first record is a slice."""
    parts: list[Buffer] = []
    used = 0
    for frame in frames:
        size = sum(map(len, frame))
        if used + size > MAX_PLAINTEXT and parts:
            yield b"".join(parts)
            parts, used = [], 0
        if size <= MAX_PLAINTEXT:
            parts.extend(frame)
            used += size
            continue
        for part in frame:
            view = memoryview(part)
            while len(view):
                piece = view[: MAX_PLAINTEXT - used]
                view = view[len(piece) :]
                parts.append(piece)
                used += len(piece)
                if used == MAX_PLAINTEXT or len(part) > MAX_PLAINTEXT:
                    yield parts[0] if len(parts) == 1 else b"".join(parts)
                    parts, used = [], 0
    if used:
        yield b"".join(parts)


def _trio_socket(raw: Any) -> trio.socket.SocketType | None:
    """The socket under `raw`, if a plain TCP socket is all that is there."""
    stream = raw.stream if type(raw) is RawConnection else raw
    if type(stream) is TrioTCPStream and isinstance(stream.stream, trio.SocketStream):
        return stream.stream.socket
    return None


class NoiseTransport(LibraryNoise):  # type: ignore[misc]
    """The library's Noise with a bounded handshake that fails only with `HandshakeFailure`, and our records."""

    async def secure_inbound(self, conn: Any) -> NoiseConnection:
        return await self._secure(conn, super().secure_inbound, conn)

    async def secure_outbound(self, conn: Any, peer_id: Any) -> NoiseConnection:
        return await self._secure(conn, super().secure_outbound, conn, peer_id)

    async def _secure(self, conn: Any, handshake: Any, *args: Any) -> NoiseConnection:
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                session = await handshake(*args)
        except HandshakeFailure:
            raise
        except trio.TooSlowError as exc:
            raise HandshakeFailure(f"no Noise handshake within {HANDSHAKE_TIMEOUT:.0f} s") from exc
        except _HANDSHAKE_ERRORS as exc:
            raise HandshakeFailure(f"the Noise handshake failed: {exc}") from exc
        return NoiseConnection(session, conn)


def security_options(key_pair: Any) -> Mapping[Any, Any]:
    """For `new_host(sec_opt=...)`: Noise alone, which removes plaintext, secio and TLS."""
    return {PROTOCOL_ID: NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)}

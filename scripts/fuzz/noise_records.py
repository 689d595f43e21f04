"""The Noise record layer and its handshake, fed by somebody who has the keys, or has not.

Asserted, against a decoder of twenty lines (`reference`): what was genuine comes out, whole and in order, and nothing
else; then the connection ends with the error for what was wrong, and stays ended, for writing too. What a connection
holds is bounded. What it writes decodes, with every frame that fits into a record inside of one. Bytes instead of a
handshake end in `HandshakeFailure`.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.exceptions import ConnectionClosedError, DecryptionFailedException, IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.exceptions import HandshakeFailure

from fuzz.choices import Choices
from p2pnode.net import noise

KEY_IN, KEY_OUT = bytes(range(32)), bytes(range(32, 64))
IDENTITY = create_new_key_pair(bytes(32))
SIZES = (0, 1, 2, 17, 255, 1000, 16_384, noise.MAX_PLAINTEXT - 1, noise.MAX_PLAINTEXT)
FRAMES = (0, 1, 12, 100, 5000, 65_519, 65_520, 130_000, 1 << 20)
CUTS = (1, 2, 3, 17, 1000, 65_537, 1 << 20)
MAX_WIRE = 200_000  # bytes: also what a pair of loopback sockets holds without a reader
CONTENT = bytes(range(256)) * 4097
HELD = noise.READ_SIZE + 2 * noise.MAX_CIPHERTEXT


def check(data: bytes) -> None:
    """Raises AssertionError when an invariant of the module's text is broken."""
    choices = Choices(data)
    mode = choices.below(16)
    if mode == 0:
        trio.run(handshake, choices)
    elif mode < 4:
        trio.run(writing, choices)
    else:
        trio.run(reading, choices, mode < 8)


class Wire:
    """A connection below the record layer that is not a socket."""

    def __init__(self, arriving: bytes, cut: int) -> None:
        self.arriving = arriving
        self.sent = bytearray()
        self._cut = cut

    async def read(self, n: int | None = None) -> bytes:
        size = min(self._cut, len(self.arriving) if n is None else n)
        piece, self.arriving = self.arriving[:size], self.arriving[size:]
        return piece

    async def write(self, data: bytes) -> None:
        self.sent += data

    async def close(self) -> None: ...

    def get_remote_address(self) -> None: ...


def connection(raw: Any) -> noise.NoiseConnection:
    """Our end, as it is after the handshake."""
    protocol = SimpleNamespace(
        cipher_state_encrypt=SimpleNamespace(k=KEY_OUT, n=0), cipher_state_decrypt=SimpleNamespace(k=KEY_IN, n=0)
    )
    peer = SimpleNamespace(extract_public_key=lambda: IDENTITY.public_key)
    session = SimpleNamespace(
        local_peer=peer,
        local_private_key=IDENTITY.private_key,
        remote_peer=peer,
        remote_permanent_pubkey=IDENTITY.public_key,
        is_initiator=False,
        conn=SimpleNamespace(noise_state=SimpleNamespace(noise_protocol=protocol)),
    )
    return noise.NoiseConnection(session, raw)


def nonce(n: int) -> bytes:
    return bytes(4) + n.to_bytes(8, "little")


def reference(wire: bytes, key: bytes) -> tuple[list[bytes], str]:
    """The plaintexts of the records before anything is wrong, and how it ends: "end", "inside" a record or "broken"."""
    cipher = ChaCha20Poly1305(key)
    records: list[bytes] = []
    pos = empty = 0
    for n in itertools.count():
        if len(wire) - pos < 2:
            break
        size = int.from_bytes(wire[pos : pos + 2], "big")
        if size < noise.TAG:
            return records, "broken"
        if len(wire) - pos - 2 < size:
            break
        try:
            records.append(cipher.decrypt(nonce(n), wire[pos + 2 : pos + 2 + size], None))
        except InvalidTag:
            return records, "broken"
        empty = 0 if records[-1] else empty + 1
        if empty > noise.MAX_EMPTY_RECORDS:
            return records, "broken"
        pos += 2 + size
    return records, "inside" if pos < len(wire) else "end"


def hostile_wire(choices: Choices) -> bytes:
    cipher = ChaCha20Poly1305(KEY_IN)
    wire = bytearray()
    n = 0

    def record(size: int) -> bytearray:
        nonlocal n
        sealed = cipher.encrypt(nonce(n), CONTENT[:size], None)
        n += 1
        return bytearray(len(sealed).to_bytes(2, "big") + sealed)

    while choices.left and len(wire) < MAX_WIRE:
        kind = choices.below(12)
        if kind < 7:
            wire += record(choices.of(SIZES))
        elif kind == 7:
            for _ in range(choices.of((1, 2, noise.MAX_EMPTY_RECORDS, noise.MAX_EMPTY_RECORDS + 1))):
                wire += record(0)
        elif kind == 8:
            forged = record(choices.of(SIZES))
            forged[choices.integer(2) % len(forged)] ^= 1 << choices.below(8)
            wire += forged
        elif kind == 9:
            wire += choices.bytes(choices.below(64))
        elif kind == 10:
            wire += choices.below(noise.TAG + 1).to_bytes(2, "big") + bytes(choices.below(32))
        else:
            cut = record(choices.of(SIZES))
            wire += cut[: choices.integer(2) % len(cut)]
            break
    return bytes(wire[:MAX_WIRE])


async def reading(choices: Choices, over_socket: bool) -> None:
    cut = choices.of(CUTS)
    amount = choices.of((None, 1, 100, 70_000))  # None: in batches
    wire = hostile_wire(choices)[: 2000 * min(cut, amount or cut)]
    records, ending = reference(wire, KEY_IN)
    if not over_socket:
        await check_reading(connection(Wire(wire, cut)), records, ending, amount)
        return
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as theirs:
        theirs.connect(listener.getsockname())
        ours = listener.accept()[0]
        ours.setblocking(False)
        theirs.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(send, trio.socket.from_stdlib_socket(theirs), wire, max(cut, len(wire) // 20))
            await check_reading(connection(RawConnection(TrioTCPStream(stream), False)), records, ending, amount)
            nursery.cancel_scope.cancel()


async def send(sock: Any, wire: bytes, cut: int) -> None:
    for pos in range(0, len(wire), cut):
        piece = wire[pos : pos + cut]
        while piece:
            piece = piece[await sock.send(piece) :]
    sock.shutdown(socket.SHUT_WR)


async def check_reading(conn: noise.NoiseConnection, records: list[bytes], ending: str, amount: int | None) -> None:
    async def read() -> bytes:
        if amount is not None:
            piece = await conn.read(amount)
            assert 0 < len(piece) <= amount
            return bytes(piece)
        return b"".join(map(bytes, await conn.read_batch()))

    got = []
    error: Exception | None = None
    try:
        while data := await read():
            got.append(data)
            assert held(conn) <= HELD
    except (DecryptionFailedException, IncompleteReadError, ConnectionClosedError) as exc:
        error = exc
    assert b"".join(got) == b"".join(records), "what comes out is not what was genuine"
    if ending == "end":
        assert error is None or (amount is not None and isinstance(error, ConnectionClosedError))
    elif ending == "inside":
        assert isinstance(error, IncompleteReadError)
    else:
        assert isinstance(error, DecryptionFailedException | ConnectionClosedError)
        for again in (read, lambda: conn.write(b"x")):
            await must_be_over(again)


async def must_be_over(call: Callable[[], Awaitable[Any]]) -> None:
    try:
        await call()
    except (DecryptionFailedException, ConnectionClosedError):
        return
    raise AssertionError("the connection goes on after a forgery")


def held(conn: noise.NoiseConnection) -> int:
    """Bytes that a connection keeps, wherever it keeps them."""
    total = 0
    for value in vars(conn).values():
        if isinstance(value, bytes | bytearray | memoryview):
            total += len(value)
        elif isinstance(value, list):
            total += sum(len(part) for part in value if isinstance(part, bytes | bytearray | memoryview))
    return total


async def writing(choices: Choices) -> None:
    wire = Wire(b"", 1)
    conn = connection(wire)
    frames: list[tuple[bytes, ...]] = []
    size = 0
    while choices.left and size < 1 << 20:
        batch = []
        for _ in range(choices.below(8)):
            length = choices.of(FRAMES)
            split = choices.of((0, 1, 12, length))
            frame = CONTENT[size % 256 : size % 256 + length]
            batch.append((frame[:split], frame[split:]))
            size += length
        frames += batch
        await conn.write_parts(batch)
    records, ending = reference(bytes(wire.sent), KEY_OUT)
    assert ending == "end"
    assert b"".join(records) == b"".join(part for frame in frames for part in frame)
    ends = set(itertools.accumulate(map(len, records)))
    pos = 0
    for frame in frames:
        length = sum(map(len, frame))
        if 0 < length <= noise.MAX_PLAINTEXT:
            assert not any(pos < end < pos + length for end in ends), "a frame that fits into one record is in two"
        pos += length


async def handshake(choices: Choices) -> None:
    cut = choices.of(CUTS)
    wire = bytearray()
    while choices.left:
        body = choices.bytes(choices.of((0, 1, 32, 48, 96, 200)))
        length = choices.of((len(body), len(body), len(body), 0xFFFF, 0))
        wire += length.to_bytes(2, "big") + body
    transport = noise.NoiseTransport(IDENTITY, noise_privkey=create_noise_key_pair().private_key)
    try:
        await transport.secure_inbound(RawConnection(Wire(bytes(wire), cut), False))
    except HandshakeFailure:
        return
    raise AssertionError("a handshake with somebody who has no key")

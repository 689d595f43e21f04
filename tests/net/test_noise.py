"""The Noise record layer over real sockets: against itself and against the library's own."""

from __future__ import annotations

import contextlib
import os

import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.exceptions import ConnectionClosedError, DecryptionFailedException, IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.io.utils import read_exactly
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.transport import Transport as LibraryNoise

from p2pnode.net import noise
from p2pnode.net.noise import MAX_PLAINTEXT, NoiseConnection, NoiseTransport, _Cipher, security_options


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return client, await listener.accept()


def transport(kind: type, key_pair: object) -> object:
    return kind(key_pair, noise_privkey=create_noise_key_pair().private_key)


async def secured(client_kind: type = NoiseTransport, server_kind: type = NoiseTransport):
    """Handshake over TCP; both secured connections and both sockets below."""
    a, b = await tcp_pair()
    keys = create_new_key_pair(), create_new_key_pair()
    out = {}

    async def inbound() -> None:
        out["server"] = await transport(server_kind, keys[1]).secure_inbound(RawConnection(TrioTCPStream(b), False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbound)
        remote = ID.from_pubkey(keys[1].public_key)
        out["client"] = await transport(client_kind, keys[0]).secure_outbound(
            RawConnection(TrioTCPStream(a), True), remote
        )
    return out["client"], out["server"], a, b


async def read_n(conn: NoiseConnection, n: int) -> bytes:
    got = b""
    while len(got) < n:
        batch = await conn.read_batch()
        assert batch
        got += b"".join(batch)
    return got


async def test_identities_and_metadata() -> None:
    client, server, a, _ = await secured()
    assert client.is_initiator and not server.is_initiator
    assert client.get_remote_peer() == server.get_local_peer()
    assert ID.from_pubkey(client.get_remote_public_key()) == client.get_remote_peer()
    assert client.get_remote_address() == a.socket.getpeername()
    assert client.get_transport_addresses() and client.get_connection_type()


async def test_only_noise_is_offered() -> None:
    assert [str(name) for name in security_options(create_new_key_pair())] == ["/noise"]


async def test_frames_share_records_and_long_ones_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server, _, _ = await secured()
    records: list[int] = []
    decrypt = server._open.open
    monkeypatch.setattr(_Cipher, "open", lambda self, record, out: records.append(len(out)) or decrypt(record, out))
    await client.write_parts([(b"a", b"b"), (b"c",), (bytes(12), bytes(65507)), (b"d",), (bytes(200_000),)])
    assert await read_n(server, 4 + 65519 + 200_000) == b"abc" + bytes(65519) + b"d" + bytes(200_000)
    assert records == [3, 65519, 1, *[MAX_PLAINTEXT] * 3, 200_000 - 3 * MAX_PLAINTEXT]


@pytest.mark.parametrize("in_place", [True, False])
async def test_bulk_both_ways_at_once(in_place: bool) -> None:
    client, server, _, _ = await secured()
    if not in_place:  # what cryptography 43 to 46 offer
        client._seal.encrypt_into = server._seal.encrypt_into = None
        client._open.decrypt_into = server._open.decrypt_into = None
    block = bytes(range(256)) * 8192  # 2 MiB: more than one batch

    async def send(conn: NoiseConnection) -> None:
        for _ in range(4):
            await conn.write_parts([(block[i : i + 65519],) for i in range(0, len(block), 65519)])

    async def receive(conn: NoiseConnection) -> None:
        assert await read_n(conn, 4 * len(block)) == block * 4

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for conn in (client, server):
                nursery.start_soon(send, conn)
                nursery.start_soon(receive, conn)


@pytest.mark.parametrize(
    ("client_kind", "server_kind"), [(NoiseTransport, LibraryNoise), (LibraryNoise, NoiseTransport)]
)
async def test_wire_compatible_with_the_library(client_kind: type, server_kind: type) -> None:
    client, server, _, _ = await secured(client_kind, server_kind)
    for source, target in ((client, server), (server, client)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.write, b"x" + bytes(150_000))
            assert await read_exactly(target, 1) == b"x"
            assert await read_exactly(target, 150_000) == bytes(150_000)


async def test_records_arriving_byte_by_byte() -> None:
    client, server, a, _ = await secured()
    relay_in, relay_out = await tcp_pair()
    client.conn.stream.stream = relay_in
    client._socket = relay_in.socket
    await client.write_parts([(b"first",), (bytes(65519),), (b"last",)])
    wire = b""
    while len(wire) < 2 + 5 + 16 + 65537 + 2 + 4 + 16:
        wire += await relay_out.receive_some()
    for piece in (wire[:1], wire[1:2], wire[2:10], wire[10:40000], wire[40000:-1], wire[-1:]):
        await a.send_all(piece)
        await trio.testing.wait_all_tasks_blocked()
    assert await read_n(server, 5 + 65519 + 4) == b"first" + bytes(65519) + b"last"


async def test_a_forged_record_ends_the_connection_after_what_was_genuine() -> None:
    client, server, a, _ = await secured()
    await client.write(b"genuine")
    await a.send_all(b"\0\x20" + bytes(32))
    assert await server.read_batch() == [b"genuine"]
    with pytest.raises((DecryptionFailedException, ConnectionClosedError), match="forged"):
        await server.read_batch()
    with pytest.raises(ConnectionClosedError):
        await server.write(b"answer")


@pytest.mark.parametrize("garbage", [b"\0\x0f" + bytes(15), b"\0\0", b"GET / HTTP/1.1\r\n" * 5000], ids=repr)
async def test_garbage_after_the_handshake(garbage: bytes) -> None:
    _, server, a, _ = await secured()
    await a.send_all(garbage)
    with pytest.raises(DecryptionFailedException):
        await server.read_batch()


async def test_a_flood_of_empty_records_ends_the_connection() -> None:
    client, server, a, _ = await secured()
    for _ in range(noise.MAX_EMPTY_RECORDS + 1):
        sealed = bytearray(16)
        client._seal.seal(b"", memoryview(sealed))
        await a.send_all(b"\0\x10" + sealed)
    with trio.fail_after(5), pytest.raises(DecryptionFailedException, match="empty"):
        await server.read_batch()


async def test_the_end_and_an_end_within_a_record() -> None:
    client, server, a, _ = await secured()
    await client.write(b"bye")
    await client.send_eof()
    assert await server.read_batch() == [b"bye"]
    assert await server.read_batch() == []
    client, server, a, _ = await secured()
    await a.send_all(b"\0\x20half")
    await a.send_eof()
    with pytest.raises(IncompleteReadError):
        await server.read_batch()


async def test_a_cancelled_write_breaks_the_connection_and_a_cancelled_read_loses_nothing() -> None:
    client, server, _, _ = await secured()
    with trio.move_on_after(0.01):
        await server.read_batch()
    await client.write(b"still there")
    assert await server.read_batch() == [b"still there"]
    with trio.move_on_after(0.2) as scope:
        while True:
            await client.write_parts([(bytes(65519),)] * 16)
    assert scope.cancelled_caught
    with pytest.raises(ConnectionClosedError, match="cut short"):
        await client.write(b"x")


@pytest.mark.parametrize(
    "first", [b"", b"\0\x05hello", b"\0\x20" + bytes(32) + b"\0\x60" + bytes(96), b"\xff" * 70_000]
)
async def test_broken_handshakes_are_refused(first: bytes) -> None:
    a, b = await tcp_pair()

    async def attack() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await a.send_all(first)
            await a.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attack)
        with trio.fail_after(5), pytest.raises(HandshakeFailure):
            await transport(NoiseTransport, create_new_key_pair()).secure_inbound(
                RawConnection(TrioTCPStream(b), False)
            )
        await b.aclose()


async def test_a_silent_handshake_times_out(autojump_clock: trio.testing.MockClock) -> None:
    class Silent:
        is_initiator = True

        async def read(self, n: int | None = None) -> bytes:
            await trio.sleep_forever()
            return b""

        async def write(self, data: bytes) -> None: ...

    with pytest.raises(HandshakeFailure, match="10 s"):
        await transport(NoiseTransport, create_new_key_pair()).secure_inbound(Silent())
    assert trio.current_time() == pytest.approx(noise.HANDSHAKE_TIMEOUT, abs=0.1)


async def test_the_wrong_peer_is_refused() -> None:
    a, b = await tcp_pair()

    async def inbound() -> None:
        with contextlib.suppress(HandshakeFailure):
            await transport(NoiseTransport, create_new_key_pair()).secure_inbound(
                RawConnection(TrioTCPStream(b), False)
            )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbound)
        with pytest.raises(HandshakeFailure):
            await transport(NoiseTransport, create_new_key_pair()).secure_outbound(
                RawConnection(TrioTCPStream(a), True), ID.from_pubkey(create_new_key_pair().public_key)
            )
        await a.aclose()


@pytest.mark.parametrize(
    "sizes", [(12, 300_000), (12, 60, 65_507), (12, 65_519, 65_520), (70_000, 5, 200_000, 1), (1,) * 100]
)
def test_long_frames_are_sliced_and_only_small_parts_joined(sizes: tuple[int, ...]) -> None:
    frame = [os.urandom(size) for size in sizes]
    records = list(noise._pack([frame, [b"next"]]))
    assert b"".join(records) == b"".join(frame) + b"next"
    assert all(0 < len(record) <= MAX_PLAINTEXT for record in records)
    sliced = sum(len(record) for record in records if isinstance(record, memoryview))
    assert sliced >= sum(size - MAX_PLAINTEXT for size in sizes if size > MAX_PLAINTEXT)

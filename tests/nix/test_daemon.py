"""The daemon client against a real nix-daemon, with every version of the protocol that it can be brought to speak."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pnode.errors import DaemonError, DaemonUnavailable, Untrusted, VerificationFailed
from p2pnode.nix import daemon_wire as wire
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.daemon import DaemonConnection, OpenNar, connect_process, connect_socket
from p2pnode.nix.daemon_wire import Message
from p2pnode.nix.signatures import SignedInfo
from p2pnode.nix.storepath import CAMethod, ContentAddress, StorePath, make_ca_path
from tests.nix.caches import OTHER_SECRET, TRUSTED, closure
from tests.nix.stores import ChrootStore, NixDaemon

CLOSURE = closure()
NARS = {signed.info.path: data for signed, data in CLOSURE}
SIGNED = [signed for signed, _ in CLOSURE]
ABSENT = StorePath("0" * 32, "absent")
VERSIONS = [21, 22, 23, 25, 26, 27, 29, 31, 32, 33, 35]


def find(name: str) -> SignedInfo:
    return next(signed for signed in SIGNED if signed.info.path.name == name)


async def open_nar(info: PathInfo) -> AsyncGenerator[bytes, None]:
    data = NARS[info.path]
    for at in range(0, len(data), 100):
        yield data[at : at + 100]


async def add(connection: DaemonConnection, paths: list[SignedInfo], source: OpenNar, check: bool = True) -> None:
    for signed in paths:
        await connection.add_path(signed, source, check_signatures=check)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[NixDaemon]:
    with NixDaemon(ChrootStore(tmp_path / "n", f"trusted-public-keys = {TRUSTED}")) as running:
        yield running


@pytest.fixture
def suspicious(tmp_path: Path) -> Iterator[NixDaemon]:
    """One that trusts no user, so that `dontCheckSigs` is ignored."""
    settings = (f"trusted-public-keys = {TRUSTED}", "trusted-users = nobody")
    with NixDaemon(ChrootStore(tmp_path / "n", *settings)) as running:
        yield running


@pytest.mark.nix
class TestRealDaemon:
    @pytest.mark.parametrize("version", VERSIONS)
    async def test_a_closure(self, daemon, version):
        async with connect_socket(daemon.socket, newest=version) as connection:
            assert connection.version == min(version, connection.version) and connection.version >= 21
            paths = [signed.info.path for signed in SIGNED]
            assert await connection.query_valid_paths(paths) == set()
            assert not await connection.query_valid_paths([paths[0]])
            assert await connection.query_path_info(paths[0]) is None
            await connection.add_temp_root(paths[-1])
            await add(connection, SIGNED, open_nar)
            assert await connection.query_valid_paths([*paths, ABSENT]) == set(paths)
            for signed in SIGNED:
                assert await connection.query_valid_paths([signed.info.path])
                assert await connection.query_path_info(signed.info.path) == signed
        daemon.store.nix("store", "verify", "--all", "--sigs-needed", "1")
        assert daemon.store.info(*paths) == SIGNED

    async def test_over_standard_input_and_output(self, tmp_path, monkeypatch):
        store = ChrootStore(tmp_path / "n", f"trusted-public-keys = {TRUSTED}")
        monkeypatch.setenv("NIX_CONF_DIR", str(store.base))
        async with connect_process(store.root) as connection:
            await add(connection, SIGNED, open_nar)
        assert store.valid() == set(NARS)

    @pytest.mark.parametrize("version", [21, 23, 35])
    async def test_a_path_that_is_valid_already_changes_nothing(self, daemon, version):
        one = find("liba")
        async with connect_socket(daemon.socket, newest=version) as connection:
            await add(connection, [one], open_nar)
            before = daemon.store.real(one.info.path).stat().st_ino
            await add(connection, [one, one], open_nar)
            assert daemon.store.real(one.info.path).stat().st_ino == before
            assert await connection.query_path_info(one.info.path) == one

    @pytest.mark.parametrize("version", [21, 22, 25, 26, 31, 35])
    async def test_unsigned_and_wrongly_signed_paths_are_refused_in_words(self, suspicious, version):
        one = find("liba")
        unsigned = dataclasses.replace(one, signatures=())
        forged = dataclasses.replace(OTHER_SECRET.sign(one.info), key_name=TRUSTED.name)
        wrong = dataclasses.replace(one, signatures=(forged,))
        unknown = dataclasses.replace(one, signatures=(OTHER_SECRET.sign(one.info),))
        async with connect_socket(suspicious.socket, newest=version) as connection:
            for refused in (unsigned, wrong, unknown):
                with pytest.raises(Untrusted, match=rf"{one.info.path}.*signature"):
                    await add(connection, [refused], open_nar)
                with pytest.raises(Untrusted):
                    await add(connection, [refused], open_nar, check=False)
            assert not await connection.query_valid_paths([one.info.path])  # the connection is good after a refusal
            await add(connection, [one], open_nar)
            assert await connection.query_valid_paths([one.info.path])

    async def test_a_daemon_that_trusts_us_can_be_asked_not_to_check(self, daemon):
        unsigned = dataclasses.replace(find("liba"), signatures=())
        async with connect_socket(daemon.socket) as connection:
            await add(connection, [unsigned], open_nar, check=False)
            assert await connection.query_valid_paths([unsigned.info.path])

    async def test_content_addressed_paths_need_no_signature(self, suspicious):
        unsigned = [dataclasses.replace(find(name), signatures=()) for name in ("caout", "cadep", "fod")]
        async with connect_socket(suspicious.socket) as connection:
            await add(connection, unsigned, open_nar)
            assert len(await connection.query_valid_paths(each.info.path for each in unsigned)) == 3

    @pytest.mark.parametrize("version", [21, 23, 35])
    async def test_a_refusal_leaves_the_paths_before_it(self, suspicious, version):
        liba, appb, dep = find("liba"), dataclasses.replace(find("appb"), signatures=()), find("dep")
        async with connect_socket(suspicious.socket, newest=version) as connection:
            with pytest.raises(Untrusted):
                await add(connection, [liba, appb, dep], open_nar)
            assert await connection.query_valid_paths([s.info.path for s in SIGNED]) == {liba.info.path}

    @pytest.mark.parametrize("version", [21, 23, 35])
    async def test_pieces_of_all_sizes(self, daemon, version):
        """Smaller and larger than a frame, empty ones between."""
        chance = random.Random(version)
        contents = chance.randbytes(5 << 20)
        data = b"".join(map(wire.string, [b"nix-archive-1", b"(", b"type", b"regular", b"contents", contents, b")"]))
        digest = hashlib.sha256(data).digest()
        address = ContentAddress(CAMethod.RECURSIVE, "sha256", digest)
        info = PathInfo(make_ca_path(address, "large"), digest, len(data), (), None, str(address))

        async def uneven(info: PathInfo) -> AsyncGenerator[bytes | bytearray, None]:
            at = 0
            while at < len(data):
                size = chance.choice([0, 1, 100, 5000, (1 << 16) - 1, 1 << 16, 300_000, (2 << 20) + 1])
                yield data[at : at + size] if size % 2 else bytearray(data[at : at + size])
                at += size

        async with connect_socket(daemon.socket, newest=version) as connection:
            await connection.add_path(SignedInfo(info), uneven)
        assert daemon.store.real(info.path).read_bytes() == contents

    async def test_a_missing_reference(self, daemon):
        async with connect_socket(daemon.socket) as connection:
            with pytest.raises(DaemonError, match=f"{find('liba').info.path}.* is not valid"):
                await add(connection, [find("appb")], open_nar)

    @pytest.mark.parametrize("version", [21, 23, 35])
    async def test_contents_that_are_not_those_of_the_hash(self, daemon, version):
        one = find("dep")

        async def altered(info: PathInfo) -> AsyncGenerator[bytes, None]:
            data = bytearray(NARS[info.path])
            data[96] ^= 1  # within the contents of the file
            yield bytes(data)

        async with connect_socket(daemon.socket, newest=version) as connection:
            with pytest.raises(VerificationFailed, match="hash mismatch"):
                await add(connection, [one], altered)
            assert not await connection.query_valid_paths([one.info.path])
            await add(connection, [one], open_nar)

    @pytest.mark.parametrize("version", [21, 23, 35])
    @pytest.mark.parametrize("change", [-8, 8])
    async def test_a_nar_of_another_size_never_reaches_its_end(self, daemon, version, change):
        one = find("dep")

        async def altered(info: PathInfo) -> AsyncGenerator[bytes, None]:
            yield NARS[info.path][:change] if change < 0 else NARS[info.path] + bytes(change)

        async with connect_socket(daemon.socket, newest=version) as connection:
            with pytest.raises(VerificationFailed, match=r"ends 8 bytes early|longer than"):
                await add(connection, [one], altered)
            with pytest.raises(DaemonError, match="broken"):
                await connection.query_valid_paths([one.info.path])
        async with connect_socket(daemon.socket) as connection:
            assert not await connection.query_valid_paths([one.info.path])

    async def test_an_error_of_the_source_is_the_callers(self, daemon):
        async def failing(info: PathInfo) -> AsyncGenerator[bytes, None]:
            yield NARS[info.path][:50]
            raise KeyError("the swarm has gone")

        async with connect_socket(daemon.socket) as connection:
            with pytest.raises(KeyError):
                await add(connection, SIGNED, failing)
        assert daemon.store.valid() == set()

    async def test_cancelled_while_the_source_waits(self, daemon):
        async def endless(info: PathInfo) -> AsyncGenerator[bytes, None]:
            yield NARS[info.path][:50]
            scope.cancel()
            await trio.sleep_forever()

        async with connect_socket(daemon.socket) as connection:
            with trio.CancelScope() as scope:
                await add(connection, SIGNED, endless)
            assert scope.cancelled_caught
        assert daemon.store.valid() == set()

    async def test_a_killed_daemon_is_an_error_and_no_hang(self, daemon):
        size = 64 << 20
        big = PathInfo(ABSENT, bytes(32), size, (), None, None)

        async def slow(info: PathInfo) -> AsyncGenerator[bytes, None]:
            yield NARS[find("dep").info.path][:96]
            daemon.__exit__()
            for _ in range(size >> 20):
                yield bytes(1 << 20)

        with trio.fail_after(20):
            async with connect_socket(daemon.socket) as connection:
                with pytest.raises(DaemonError, match="closed the connection"):
                    await add(connection, [SignedInfo(big)], slow)

    async def test_roots(self, daemon, tmp_path):
        """Temporary ones last as long as the connection, indirect ones as long as the link."""
        liba, dep, fod = find("liba"), find("dep"), find("fod")
        link = tmp_path / "result"
        async with connect_socket(daemon.socket) as connection:
            await add(connection, [liba, dep, fod], open_nar)
            link.symlink_to(str(dep.info.path))
            await connection.add_indirect_root(link)
            daemon.store.nix_store("--gc")
            assert daemon.store.valid() == {liba.info.path, dep.info.path, fod.info.path}
        await wait_until_nobody_is_connected(daemon)
        daemon.store.nix_store("--gc")
        assert daemon.store.valid() == {dep.info.path}
        link.unlink()
        daemon.store.nix_store("--gc")
        assert daemon.store.valid() == set()

    async def test_a_refusal_of_a_large_nar_does_not_deadlock(self, suspicious):
        data_size = 32 << 20
        head = b"".join(map(wire.string, [b"nix-archive-1", b"(", b"type", b"regular", b"contents"]))
        head += wire.u64(data_size)
        tail = wire.string(b")")
        info = PathInfo(ABSENT, hashlib.sha256(b"").digest(), len(head) + data_size + len(tail), (), None, None)

        async def large(info: PathInfo) -> AsyncGenerator[bytes, None]:
            yield head
            for _ in range(data_size >> 20):
                yield bytes(1 << 20)
            yield tail

        with trio.fail_after(30):
            async with connect_socket(suspicious.socket) as connection:
                with pytest.raises(Untrusted):
                    await add(connection, [SignedInfo(info)], large)
                assert not await connection.query_valid_paths([ABSENT])


async def wait_until_nobody_is_connected(daemon: NixDaemon) -> None:
    """A connection's process frees its temporary roots when it ends, a moment after the socket is closed."""
    roots = daemon.store.root / "nix/var/nix/temproots"
    with trio.fail_after(10):
        while any(roots.iterdir()):
            daemon.store.nix_store("--gc", "--print-roots")  # takes away the files of processes that have ended
            await trio.sleep(0.02)


async def test_nobody_listens(tmp_path):
    with pytest.raises(DaemonUnavailable, match=r"socket.*No such file"):
        async with connect_socket(tmp_path / "socket"):
            pass


# A daemon that does not behave


@asynccontextmanager
async def talking(*said: bytes) -> AsyncGenerator[DaemonConnection, None]:
    """A connection to something that says this and closes."""
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(b"".join(said))
    await theirs.send_eof()
    yield DaemonConnection(ours)


GREETING = wire.u64(wire.SERVER_MAGIC) + wire.u64(0x122) + wire.string("2.8.0")
LAST = wire.u64(Message.LAST)


async def ask(*said: bytes) -> object:
    async with talking(GREETING, LAST, *said) as connection:
        await connection._hello(35)
        return await connection.query_path_info(ABSENT)


@pytest.mark.parametrize(
    "greeting, complaint",
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a Nix daemon"),
        (wire.u64(wire.SERVER_MAGIC) + wire.u64(0x114), "protocol 1.20"),
        (wire.u64(wire.SERVER_MAGIC) + wire.u64(0x223), "protocol 2.35"),
        (wire.u64(wire.SERVER_MAGIC) + wire.u64(0x122) + wire.u64(1 << 60), "length of a string"),
    ],
)
async def test_strange_greetings(greeting, complaint):
    async with talking(greeting) as connection:
        with pytest.raises(DaemonError, match=complaint):
            await connection._hello(35)


@pytest.mark.parametrize("said, trusted", [(0, None), (1, True), (2, False), (3, None)])
async def test_a_daemon_newer_than_we_are_comes_down_to_our_version(said, trusted):
    ours, theirs = trio.testing.memory_stream_pair()
    answer = [wire.u64(wire.SERVER_MAGIC), wire.u64(0x126), wire.string("2.36.0"), wire.u64(said), LAST]
    await theirs.send_all(b"".join(answer))
    connection = DaemonConnection(ours)
    await connection._hello(35)
    assert (connection.version, connection.nix_version, connection.trusted) == (35, "2.36.0", trusted)
    await ours.send_eof()
    heard = b"".join([part async for part in theirs])
    assert heard == wire.u64(wire.CLIENT_MAGIC) + wire.u64(0x123) + wire.u64(0) + wire.u64(0)


async def test_a_daemon_that_does_not_want_us():
    refusal = wire.u64(Message.ERROR) + wire.string("Error") + wire.u64(0) + wire.string("Error")
    refusal += wire.string("\x1b[31;1merror:\x1b[0m user 'nobody' is not allowed") + wire.u64(0) + wire.u64(0)
    async with talking(GREETING, refusal) as connection:
        with pytest.raises(DaemonError, match=r"^Nix says: user 'nobody' is not allowed$"):
            await connection._hello(35)


async def test_messages_before_an_answer_are_read():
    fields = wire.u64(2) + wire.u64(0) + wire.u64(7) + wire.u64(1) + wire.string("text")
    said = [
        wire.u64(Message.NEXT) + wire.string("a line\n"),
        wire.u64(Message.START_ACTIVITY) + wire.u64(5) * 3 + wire.string("doing") + fields + wire.u64(0),
        wire.u64(Message.RESULT) + wire.u64(5) * 2 + fields,
        wire.u64(Message.STOP_ACTIVITY) + wire.u64(5),
        LAST,
        wire.u64(0),
    ]
    assert await ask(*said) is None


@pytest.mark.parametrize(
    "said, complaint",
    [
        ([], "closed the connection"),
        ([wire.u64(0x1234)], "unknown kind 0x1234"),
        ([wire.u64(Message.READ), wire.u64(10)], "unknown kind"),
        ([wire.u64(Message.NEXT), wire.u64(1 << 62)], "length of a string"),
        ([wire.u64(Message.NEXT), wire.u64(3), b"abc\x01\0\0\0\0"], "padding"),
        ([wire.u64(Message.RESULT), wire.u64(1), wire.u64(1), wire.u64(1 << 40)], "number of fields"),
        ([LAST, wire.u64(1), wire.string(""), wire.string("00" * 32), wire.u64(1 << 61)], "length of a list"),
    ],
)
async def test_answers_beyond_all_bounds(said, complaint):
    with pytest.raises(DaemonError, match=complaint):
        await ask(*said)


async def test_an_error_is_one_sentence():
    traces = wire.u64(1) + wire.u64(0) + wire.string("while doing")
    said = wire.u64(Message.ERROR) + wire.string("Error") + wire.u64(0) + wire.string("Error")
    with pytest.raises(DaemonError, match=r"^Nix says: two lines$"):
        await ask(said, wire.string("two\n  lines"), wire.u64(0), traces)


async def test_a_silent_daemon(autojump_clock):
    ours, _theirs = trio.testing.memory_stream_pair()
    with pytest.raises(DaemonError, match="no sign of life"):
        await DaemonConnection(ours)._hello(35)

"""A whole node, in a process of its own, attacked over TCP while an honest peer fetches from it.

Each attack is repeated until the honest fetch is done. Asserted: how long a cheat stays connected, how much the node
grows, and that the fetch completes in time; its rate beside the rate without an attack is printed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import zstandard

from p2pnode.link import parse as parse_link
from p2pnode.net.hardening import MAX_INBOUND_PER_ADDRESS
from protocols.cid import CID, Codec
from protocols.exchange import PROTOCOL_ID
from protocols.exchange import messages as m
from protocols.manifest import ImageAssembler
from protocols.yamux.frames import (
    ACK,
    INITIAL_WINDOW,
    SYN,
    TYPE_DATA,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
    GoAwayCode,
)
from tests.net.peers.hostile import GONE, Hostile, frame, hostile, tcp, text

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from swarmlib.process import NODE, Command, Daemon, Home

MIB = 1 << 20
IMAGE = 96 * MIB
GROWTH = 64 * MIB  # of the node's resident memory, under any attack
SOON = 5.0  # s for a violation to end its connection on a machine that is busy
SILENCE = 25.0  # s for a peer that says nothing: 10 s to the ping, 10 s for the answer, and a busy machine
STALLING = 55.0  # s for a peer that only keeps itself alive
HANDSHAKE = 9.0  # s for one that does not authenticate: 5 s, and a busy machine
SHARE = 0.3  # of the rate without an attack; half of the cores may belong to the attacker
LONGEST_FETCH = 40.0  # s, whatever the machine does
ATTACKER = "127.0.0.66"  # honest peers come from another address


class Victim:
    """A providing node and what an honest fetch of its image takes."""

    def __init__(self, daemon: Daemon, link: str, directory: Path) -> None:
        self.daemon = daemon
        self.link = link
        self.addr = daemon.addrs[0]
        self.image = parse_link(link).image
        self._directory = directory
        self._fetches = itertools.count()
        self.usual = self.fetch()

    def fetch(self) -> float:
        """Fetch the image with a new node; bytes per second of the fetch proper."""
        place = self._directory / f"honest-{next(self._fetches)}"
        command = Command([*NODE, "--home", str(place), "--json", "fetch", self.link, "-o", str(place / "out")], place)
        try:
            result = command.wait(LONGEST_FETCH + 20).check().json
        finally:
            command.kill()
        assert (place / "out").stat().st_size == IMAGE == result["bytes"]
        (place / "out").unlink()
        return IMAGE / float(result["seconds"])

    @property
    def resident(self) -> int:
        return int(Path(f"/proc/{self.daemon.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd"))


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    directory = tmp_path_factory.mktemp("cheating")
    original = directory / "image"
    original.write_bytes(os.urandom(IMAGE))
    with Daemon(Home(directory / "victim")) as daemon:
        yield Victim(daemon, daemon.run("provide", str(original)).check().json["link"], directory)


class Siege:
    """Attacks in progress: how long each was tolerated, and the most memory the node had meanwhile."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self.tolerated: list[float] = []
        self.rate = 0.0
        self.growth = 0
        self._before = victim.resident

    async def of(self, attack: Callable[[str], Awaitable[None]], *, times: int = 1, again: bool = True) -> None:
        """Run `times` attacks side by side, each again and again, while an honest peer fetches; then let them end."""
        over = trio.Event()

        async def keep_attacking() -> None:
            while True:
                began = trio.current_time()
                with contextlib.suppress(*GONE):
                    await attack(self.victim.addr)
                self.tolerated.append(trio.current_time() - began)
                if over.is_set() or not again:
                    return

        async def observe() -> None:
            while True:
                self.growth = max(self.growth, self.victim.resident - self._before)
                await trio.sleep(0.05)

        async with trio.open_nursery() as watching:
            watching.start_soon(observe)
            async with trio.open_nursery() as attacks:
                for _ in range(times):
                    attacks.start_soon(keep_attacking)
                with trio.fail_after(LONGEST_FETCH + 20):
                    self.rate = await trio.to_thread.run_sync(self.victim.fetch)
                over.set()
            watching.cancel_scope.cancel()

    def check(self, longest: float) -> None:
        share = self.rate / self.victim.usual
        print(
            f"\n{len(self.tolerated)} attacks, the longest {max(self.tolerated):.1f} s; the node grew by "
            f"{self.growth / MIB:.0f} MiB; an honest fetch had {self.rate / 1e6:.0f} MB/s, {share:.0%} of the usual"
        )
        assert max(self.tolerated) <= longest
        assert self.growth <= GROWTH
        assert IMAGE / self.rate <= max(IMAGE / self.victim.usual / SHARE, 10.0)
        assert self.victim.daemon.running


def violating(codes: list[int | None], *frames: bytes) -> Callable[[str], Awaitable[None]]:
    """Send `frames`, wait for the end, and note the code of the GO_AWAY that came with it."""

    async def attack(addr: str) -> None:
        async with hostile(addr, ATTACKER) as peer, trio.open_nursery() as nursery:
            nursery.start_soon(sending, peer, frames)
            await peer.closed()
            nursery.cancel_scope.cancel()
            codes.append(peer.code)

    return attack


async def sending(peer: Hostile, frames: tuple[bytes, ...]) -> None:
    with contextlib.suppress(*GONE):
        await peer.send(*frames)


OPEN = frame(TYPE_WINDOW_UPDATE, SYN, 1, 0)
VIOLATIONS = {
    "window-overrun": [OPEN, frame(TYPE_DATA, 0, 1, INITIAL_WINDOW + 1, bytes(1000))],
    "10000-syns": [frame(TYPE_WINDOW_UPDATE, SYN, 2 * i + 1, 0) for i in range(10_000)],
    "zero-length-data": [OPEN, *[frame(TYPE_DATA, 0, 1, 0)] * 50_000],
    "empty-window-updates": [OPEN, *[frame(TYPE_WINDOW_UPDATE, 0, 1, 0)] * 50_000],
    "tiny-window-updates": [OPEN, *[frame(TYPE_WINDOW_UPDATE, 0, 1, 1)] * 50_000],
    "pings": [frame(TYPE_PING, SYN, 0, i) for i in range(50_000)],
    "unasked-pongs": [frame(TYPE_PING, ACK, 0, 1 << 31)] * 50_000,
}


@pytest.mark.parametrize(
    "name",
    [name if name == "10000-syns" else pytest.param(name, marks=pytest.mark.slow) for name in VIOLATIONS],
)
async def test_a_violation_ends_the_connection(victim: Victim, name: str) -> None:
    siege = Siege(victim)
    codes: list[int | None] = []
    await siege.of(violating(codes, *VIOLATIONS[name]))
    siege.check(SOON)
    assert set(codes) == {GoAwayCode.PROTOCOL_ERROR}


async def chunks_of(peer: Hostile, image: CID) -> tuple[bytes, ...]:
    """Open an exchange session and fetch the manifest, as an honest peer would. Returns the ids of the first chunks."""
    await peer.open(1, PROTOCOL_ID)
    await tell(peer, m.Hello(agent="hostile"), m.Interest(image), m.Want((image.to_bytes(),)))
    reader, assembler = m.FrameReader(), ImageAssembler(image)
    skip = len(text("/multistream/1.0.0", PROTOCOL_ID))
    async for kind, _, stream_id, _, body in peer.frames():
        if kind != TYPE_DATA or stream_id != 1:
            continue
        skip, body = max(0, skip - len(body)), body[skip:]
        for message in reader.feed(body):
            if not isinstance(message, m.Block):
                continue
            data = b"".join(message.payload)
            if message.encoding is m.Encoding.ZSTD:
                data = zstandard.ZstdDecompressor().decompress(data, max_output_size=message.size)
            assembler.add(CID.from_bytes(message.id), data)
            if not assembler.missing:
                return tuple(CID(Codec.RAW, digest).to_bytes() for digest in assembler.image().chunks)[: m.MAX_IDS]
            await tell(peer, m.Want(tuple(cid.to_bytes() for cid in assembler.missing)))
    raise AssertionError(f"no manifest came: {peer.ended}")


async def tell(peer: Hostile, *messages: m.Message) -> None:
    said = b"".join(bytes(part) for message in messages for part in m.encode(message))
    await peer.send(frame(TYPE_DATA, 0, 1, len(said), said))


@pytest.mark.slow
async def test_asking_for_everything_and_never_reading(victim: Victim) -> None:
    stopped_reading: list[float] = []

    async def attack(addr: str) -> None:
        async with hostile(addr, ATTACKER) as peer:
            chunks = await chunks_of(peer, victim.image)
            await peer.send(frame(TYPE_WINDOW_UPDATE, 0, 1, 1 << 30))
            began = trio.current_time()
            try:
                while True:  # it is never silent: only that it does not read can end it
                    await tell(peer, m.Want(chunks))
                    await trio.sleep(1)
            finally:
                stopped_reading.append(trio.current_time() - began)

    siege = Siege(victim)
    await siege.of(attack, times=4)
    siege.check(STALLING)
    assert min(stopped_reading) > 1


@pytest.mark.slow
async def test_half_a_frame_and_silence(victim: Victim) -> None:
    async def attack(addr: str) -> None:
        async with hostile(addr, ATTACKER) as peer:
            await peer.send(OPEN, frame(TYPE_DATA, 0, 1, 65_536, bytes(100)))
            await peer.closed()

    siege = Siege(victim)
    await siege.of(attack, times=20)
    siege.check(SILENCE)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["tcp", "yamux"])
async def test_one_byte_a_second(victim: Victim, layer: str) -> None:
    """Of a record, or of the body of a frame in a record of its own, which proves that somebody is there."""

    async def attack(addr: str) -> None:
        async with hostile(addr, ATTACKER) as peer, trio.open_nursery() as nursery:
            await peer.send(OPEN, frame(TYPE_DATA, 0, 1, 65_536))
            nursery.start_soon(drip, peer)
            await peer.closed()
            nursery.cancel_scope.cancel()

    async def drip(peer: Hostile) -> None:
        with contextlib.suppress(*GONE):
            if layer == "tcp":
                await peer._secured.conn.write(b"\xff\xff")
            while True:
                await (peer._secured.conn.write(b"x") if layer == "tcp" else peer.send(b"x"))
                await trio.sleep(1)

    siege = Siege(victim)
    await siege.of(attack, times=20)
    siege.check(SILENCE if layer == "tcp" else STALLING)


async def hung_up(stream: trio.SocketStream) -> None:
    with contextlib.suppress(*GONE):
        while await stream.receive_some(4096):
            pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "times"),
    [
        (b"", 500),
        (b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(16), 200),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 50),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(505), 50),
    ],
    ids=["500-silent", "200-half-handshakes", "http", "tls"],
)
async def test_connections_that_never_authenticate(victim: Victim, said: bytes, times: int) -> None:
    async def attack(addr: str) -> None:
        async with tcp(addr, ATTACKER) as stream:
            await stream.send_all(said)
            await hung_up(stream)
        await trio.sleep(0.2)

    files = victim.files
    siege = Siege(victim)
    await siege.of(attack, times=times)
    siege.check(HANDSHAKE)
    with trio.fail_after(HANDSHAKE):
        while victim.files > files + 4:
            await trio.sleep(0.1)


@pytest.mark.slow
async def test_more_authenticated_connections_than_one_address_may_have(victim: Victim) -> None:
    """Idle connections are no cheat, but one address cannot take the places of all others."""
    opening = trio.CapacityLimiter(8)
    before = victim.resident
    up = refused = 0

    async def idle() -> None:
        nonlocal up, refused
        try:
            async with AsyncExitStack() as stack:
                async with opening:
                    peer = await stack.enter_async_context(hostile(victim.addr, ATTACKER))
                up += 1
                async for kind, flags, _, value, _ in peer.frames():
                    if kind == TYPE_PING and flags & SYN:
                        await peer.send(frame(TYPE_PING, ACK, 0, value))
        except GONE:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(MAX_INBOUND_PER_ADDRESS + 40):
            nursery.start_soon(idle)
        with trio.fail_after(90):
            while up + refused < MAX_INBOUND_PER_ADDRESS + 40:
                await trio.sleep(0.1)
            rate = await trio.to_thread.run_sync(victim.fetch)
        growth = victim.resident - before
        print(f"\n{up} held, {refused} refused, {growth / MIB:.0f} MiB more; an honest fetch had {rate / 1e6:.0f} MB/s")
        nursery.cancel_scope.cancel()
    assert MAX_INBOUND_PER_ADDRESS // 2 < up <= MAX_INBOUND_PER_ADDRESS
    assert refused >= 40
    assert growth <= 2 * GROWTH  # each of them has its tasks and a session
    assert IMAGE / rate <= LONGEST_FETCH

#!/usr/bin/env python3
"""Two processes, many connections, streams opened, echoed, half-closed, cancelled and reset at random, for a long time.

    scripts/soak.py [--minutes 10] [--connections 50] [--seed N]

Each connection is a node of its own in the client process; all of them talk to one node in the server process. Every
byte that comes back is checked. No stream may stand still for 20 s: then both processes print their trio task trees.
At the end, with all connections closed, both must be back where they were after the warm-up: tasks, file descriptors,
receive budget, live streams and connections, and memory (resident, within 24 MiB and 10 %). Prints what it finds on
stderr and one JSON object on stdout; exit code 1 on a leak, a dead lock or a wrong byte.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import trio  # noqa: E402

from p2pnode.errors import PeerUnreachable, RemoteError, StreamClosed  # noqa: E402
from p2pnode.net import yamux as adapter  # noqa: E402
from p2pnode.net.addressbook import AddressBook  # noqa: E402
from p2pnode.net.identity import Identity  # noqa: E402
from p2pnode.net.network import Network  # noqa: E402
from p2pnode.net.transport import Stream  # noqa: E402
from protocols import yamux  # noqa: E402

ECHO, AFTER_END, ABORT, SLOW = (f"/soak/{name}/1" for name in ("echo", "after-end", "abort", "slow"))
ABORT_AFTER = 100_000
MAX_SIZE = 1 << 20
STREAMS = 3  # at a time, of each connection
STUCK = 20.0  # s without progress of a stream
QUIET = 30.0  # s that everything may take to end when nobody wants anything any more
GROWTH, GROWTH_SHARE = 24 << 20, 0.10  # of resident memory; the allocator keeps what a burst once needed
BLOCK = random.Random(7).randbytes(262_139)  # a prime: never in step with frames, records or windows
COUNTED = (yamux.Stream, yamux.Session, adapter.YamuxStream, adapter.Yamux)


class Failed(Exception):
    """The soak found something; one sentence."""


@asynccontextmanager
async def node(listen: list[str]) -> AsyncIterator[Network]:
    async with Network.open(
        identity=Identity.generate(), listen=listen, address_book=AddressBook(), agent="soak/1"
    ) as network:
        yield network


def pattern(at: int, size: int) -> bytes:
    at %= len(BLOCK)
    piece = BLOCK[at : at + size]
    while len(piece) < size:
        piece += BLOCK[: size - len(piece)]
    return piece


# The server


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 16):
        await stream.send_all(data)


async def after_end(stream: Stream) -> None:
    kept = []
    while data := await stream.receive_some(1 << 16):
        kept.append(data)
    await stream.send_parts(kept)


async def abort(stream: Stream) -> None:
    got = 0
    while got < ABORT_AFTER and (data := await stream.receive_some(1 << 14)):
        got += len(data)
        await stream.send_all(data)
    await stream.reset()


async def slow(stream: Stream) -> None:
    while data := await stream.receive_some(20_000):
        await trio.sleep(0.01)
        await stream.send_all(data)


async def serve() -> None:
    async with node(["/ip4/127.0.0.1/tcp/0"]) as network, trio.open_nursery() as nursery:
        for protocol, handler in ((ECHO, echo), (AFTER_END, after_end), (ABORT, abort), (SLOW, slow)):
            network.handle(protocol, handler)
        nursery.start_soon(dump_on_signal)
        print(json.dumps({"peer": network.peer_id, "addrs": network.addrs()}), flush=True)
        stdin = trio.lowlevel.FdStream(os.dup(0))
        while await stdin.receive_some(100):
            await quiet(network)
            print(json.dumps(measure()), flush=True)
        nursery.cancel_scope.cancel()


async def dump_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            print(task_tree(), file=sys.stderr, flush=True)


# What both sides measure


async def quiet(*networks: Network) -> None:
    """Wait until no connection and no stream is left, or QUIET s."""
    with trio.move_on_after(QUIET):
        while any(network.connections() for network in networks) or alive()["Yamux"]:
            await trio.sleep(0.2)


def alive() -> Counter[str]:
    gc.collect()
    kinds = {
        kind.__name__ if kind.__module__.startswith("p2pnode") else f"protocol {kind.__name__}": kind
        for kind in COUNTED
    }
    counts: Counter[str] = Counter(dict.fromkeys(kinds, 0))
    exact = {kind: name for name, kind in kinds.items()}
    for thing in gc.get_objects():
        if (name := exact.get(type(thing))) is not None:
            counts[name] += 1
    return counts


def measure() -> dict[str, Any]:
    counts = alive()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "files": len(os.listdir("/proc/self/fd")),
        "budget": adapter._node_budget.used,
        "objects": len(gc.get_objects()),
        "alive": counts,
    }


def task_tree() -> str:
    lines: list[str] = []

    def show(task: trio.lowlevel.Task, depth: int) -> None:
        frames = [f"{f.f_code.co_name}:{line}" for f, line in task.iter_await_frames()][:12]
        lines.append("  " * depth + f"{task.name.rsplit('.', 1)[-1]}: " + " > ".join(frames))
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                show(child, depth + 1)

    root = trio.lowlevel.current_root_task()
    if root is not None:
        show(root, 0)
    return f"task tree of process {os.getpid()}:\n" + "\n".join(lines)


# The client


class Progress:
    """When each running stream last got further."""

    def __init__(self) -> None:
        self.last: dict[object, tuple[float, str]] = {}
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def at(self, key: object, what: str) -> None:
        self.last[key] = (trio.current_time(), what)

    def done(self, key: object) -> None:
        self.last.pop(key, None)

    async def watch(self) -> None:
        while True:
            await trio.sleep(1)
            now = trio.current_time()
            for when, what in self.last.values():
                if now - when > STUCK:
                    raise Failed(f"no progress for {now - when:.0f} s: {what}")


class Client:
    """One connection to the server: what runs on it, and its end and beginning again."""

    def __init__(self, network: Network, server: str, addrs: list[str], rng: random.Random, progress: Progress) -> None:
        self.network, self.server, self.addrs, self.rng, self.progress = network, server, addrs, rng, progress
        self.over = False  # no new streams on this connection

    async def run(self, until: trio.Event) -> None:
        """Connections one after the other. Each ends by a goodbye or a torn socket, with streams running on it."""
        while not until.is_set():
            self.progress.at(self, "dialling")
            try:
                await self.network.connect(self.server, self.addrs)
            except PeerUnreachable:
                self.progress.counts["refused dials"] += 1
                continue
            finally:
                self.progress.done(self)
            self.progress.counts["connections"] += 1
            self.over = False
            torn = self.rng.random() < 0.3
            async with trio.open_nursery() as nursery:
                for _ in range(STREAMS):
                    nursery.start_soon(self._streams)
                with trio.move_on_after(self.rng.expovariate(1 / 8)):
                    await until.wait()
                self.over = True  # `open_stream` would dial
                await (self._tear() if torn else self.network.disconnect(self.server))
                # Everything that runs on the dead connection must notice, without being cancelled.
        await self.network.disconnect(self.server)

    async def _tear(self) -> None:
        for conn in self.network.host.get_network().get_connections():
            sock = conn.muxed_conn.secured_conn.conn.stream.stream.socket
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)
        self.progress.counts["torn connections"] += 1

    async def _streams(self) -> None:
        """One stream after the other until the connection's end."""
        jobs: tuple[tuple[int, Callable[[Job], Awaitable[None]]], ...] = (
            (6, Job.echo),
            (2, Job.half_close),
            (2, Job.reset_in_the_middle),
            (2, Job.reset_by_the_peer),
            (2, Job.cancelled_reads),
            (2, Job.cancelled_write),
            (1, Job.cancelled_open),
            (2, Job.abandoned),
            (1, Job.slow),
        )
        while not self.over:
            (kind,) = self.rng.choices([job for _, job in jobs], [weight for weight, _ in jobs])
            job = Job(self)
            try:
                await kind(job)
                self.progress.counts[kind.__name__] += 1
            except RemoteError:
                self.progress.counts["streams lost with their connection"] += 1
            finally:
                self.progress.done(job)


class Job:
    """What is done with one stream."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._rng = client.rng
        self._progress = client.progress
        self._stream: Any = None
        self._what = ""

    async def _open(self, protocol: str) -> Any:
        self._what = f"opening {protocol}"
        self._progress.at(self, self._what)
        self._stream = await self._client.network.open_stream(self._client.server, protocol)
        self._what = protocol
        self._progress.at(self, self._what)
        return self._stream

    def _size(self) -> int:
        return int(2 ** self._rng.uniform(0, 20))

    async def _send(self, size: int, *, half_close: bool) -> None:
        sent = 0
        while sent < size:
            piece = pattern(sent, min(size - sent, self._rng.randrange(1, 200_000)))
            await self._stream.send_all(piece)
            sent += len(piece)
            self._progress.at(self, f"{self._what}: sent {sent} of {size}")
        if half_close:
            await self._stream._muxed.close_write()  # `Stream` has no half-close that goes on reading

    async def _receive(self, size: int, *, cancel: bool = False, end: bool) -> None:
        got = 0
        while got < size:
            data = b""
            with trio.move_on_after(0.0005) if cancel and self._rng.random() < 0.5 else contextlib.nullcontext():
                data = await self._stream.receive_some(self._rng.randrange(1, 100_000))
                if not data:
                    raise Failed(f"{self._what} ended after {got} of {size} bytes")
            if data != pattern(got, len(data)):
                raise Failed(f"{self._what}: wrong bytes within {len(data)} from {got}")
            got += len(data)
            self._progress.bytes += len(data)
            self._progress.at(self, f"{self._what}: received {got} of {size}")
        if end and (extra := await self._stream.receive_some(1)):
            raise Failed(f"{self._what}: {extra!r} instead of the end")

    async def _exchange(self, protocol: str, size: int, *, cancel: bool = False) -> None:
        await self._open(protocol)
        lost: StreamClosed | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_to_the_end, size)
            try:
                await self._receive(size, cancel=cancel, end=True)
            except StreamClosed as exc:
                lost = exc
        if lost is not None:
            raise lost
        await self._stream.aclose()

    async def _send_to_the_end(self, size: int) -> None:
        # A stream that is lost is the receiver's to report: one error, not a group of two.
        with contextlib.suppress(StreamClosed):
            await self._send(size, half_close=True)

    async def echo(self) -> None:
        await self._exchange(ECHO, self._size())

    async def half_close(self) -> None:
        await self._exchange(AFTER_END, self._size() // 4 + 1)

    async def slow(self) -> None:
        await self._exchange(SLOW, self._size() // 4 + 1)

    async def cancelled_reads(self) -> None:
        await self._exchange(ECHO, self._size(), cancel=True)

    async def reset_in_the_middle(self) -> None:
        await self._open(ECHO)
        await self._send(min(self._size(), 200_000), half_close=False)
        if self._rng.random() < 0.5:
            await self._receive(1, end=False)
        await self._stream.reset()
        try:
            await self._stream.receive_some(1)
        except StreamClosed:
            return
        raise Failed("a stream can be read after its reset")

    async def reset_by_the_peer(self) -> None:
        await self._open(ABORT)
        try:
            while True:
                await self._stream.send_all(BLOCK[:30_000])
                self._progress.at(self, self._what)
                await self._stream.receive_some(30_000)
        except StreamClosed:
            await self._stream.aclose()

    async def cancelled_write(self) -> None:
        await self._open(SLOW)
        with trio.move_on_after(self._rng.uniform(0, 0.05)):
            while True:
                await self._stream.send_all(BLOCK)
        await (self._stream.reset() if self._rng.random() < 0.5 else self._stream.aclose())

    async def cancelled_open(self) -> None:
        with trio.move_on_after(self._rng.uniform(0, 0.01)):
            stream = await self._open(ECHO)
            await stream.aclose()

    async def abandoned(self) -> None:
        """Closed without reading what comes back: it ends when the peer ends it, or is reset a minute later."""
        await self._open(ECHO)
        await self._send(min(self._size(), 200_000), half_close=False)
        await self._stream.aclose()


class Server:
    """The other process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    async def line(self) -> Any:
        assert self._process.stdout is not None
        line = await trio.to_thread.run_sync(self._process.stdout.readline, abandon_on_cancel=True)
        if not line:
            raise Failed("the server process ended")
        return json.loads(line)

    async def measure(self) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(b"measure\n")
        self._process.stdin.flush()
        with trio.fail_after(2 * QUIET):
            return await self.line()

    async def dump(self) -> None:
        self._process.send_signal(signal.SIGUSR1)
        await trio.sleep(1)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


async def soak(seconds: float, connections: int, seed: int) -> dict[str, Any]:
    server = Server()
    try:
        where = await server.line()
        async with contextlib.AsyncExitStack() as stack:
            networks = [await stack.enter_async_context(node([])) for _ in range(connections)]
            progress = Progress()
            clients = [
                Client(network, where["peer"], where["addrs"], random.Random(f"{seed}/{i}"), progress)
                for i, network in enumerate(networks)
            ]
            warm_up = min(60.0, seconds / 4)
            report: dict[str, Any] = {"seconds": seconds, "nodes": connections, "seed": seed}
            try:
                await phase(clients, progress, warm_up)
                await quiet(*networks)
                before = {"client": measure(), "server": await server.measure()}
                print(f"after {warm_up:.0f} s: {json.dumps(before)}", file=sys.stderr)
                await phase(clients, progress, seconds - warm_up)
                await quiet(*networks)
                after = {"client": measure(), "server": await server.measure()}
                print(f"at the end: {json.dumps(after)}", file=sys.stderr)
                report["leaks"] = [leak for side in after for leak in leaks(side, before[side], after[side])]
                report |= {"before": before, "after": after}
            except Failed as exc:
                report["leaks"] = [str(exc)]
                print(task_tree(), file=sys.stderr)
                await server.dump()
            report |= {"counts": dict(progress.counts), "bytes": progress.bytes}
            return report
    finally:
        server.stop()


async def phase(clients: list[Client], progress: Progress, seconds: float) -> None:
    until = trio.Event()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(progress.watch)
            async with trio.open_nursery() as running:
                for client in clients:
                    running.start_soon(client.run, until)
                await trio.sleep(seconds)
                until.set()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failures = group.subgroup(Failed)
        while isinstance(failures, BaseExceptionGroup):
            failures = failures.exceptions[0]
        if failures is None:
            raise
        raise failures from group


def leaks(side: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not back where it was, one sentence each."""
    found = [
        f"{side}: {after[name] - before[name]} more {name} than after the warm-up"
        for name in ("tasks", "files")
        if after[name] > before[name]
    ]
    if after["budget"]:
        found.append(f"{side}: {after['budget']} bytes of the receive budget were never given back")
    found += [f"{side}: {count} {name} objects are alive" for name, count in after["alive"].items() if count]
    growth = after["resident"] - before["resident"]
    if growth > max(GROWTH, GROWTH_SHARE * before["resident"]):
        found.append(f"{side}: {growth >> 20} MiB more memory than after the warm-up")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    if options.serve:
        with contextlib.suppress(KeyboardInterrupt):
            trio.run(serve)
        return 0
    report = trio.run(soak, options.minutes * 60, options.connections, options.seed)
    for leak in report["leaks"]:
        print(leak, file=sys.stderr)
    print(json.dumps(report))
    return 1 if report["leaks"] else 0


if __name__ == "__main__":
    sys.exit(main())

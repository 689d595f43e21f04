"""Network namespaces of this process: made, entered, measured and removed whatever happens. Needs root and iproute2.

A name carries the pid of its maker, so no two runs meet, and what a run that was killed with -9 left behind is
recognised and removed by the next one.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from swarmlib.process import SwarmError

_DIRECTORY = Path("/run/netns")
_OURS = re.compile(r"p2p(\d+)-")
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()

# One GSO segment is up to 64 KiB and must fit into the bucket, or tbf never sends it; the queue holds 100 ms.
_BURST = "128kb"
_LATENCY = "100ms"


@dataclass(frozen=True, slots=True)
class Counters:
    """What passed an interface since it was made, as its namespace sees it: bytes with all headers, and packets."""

    received: int
    sent: int
    packets_received: int
    packets_sent: int

    @property
    def total(self) -> int:
        return self.received + self.sent

    def __sub__(self, before: Counters) -> Counters:
        return Counters(
            self.received - before.received,
            self.sent - before.sent,
            self.packets_received - before.packets_received,
            self.packets_sent - before.packets_sent,
        )


class Netns:
    """One namespace. `close` removes it with everything in it, processes included."""

    def __init__(self, label: str) -> None:
        """Raises SwarmError."""
        self.name = f"p2p{os.getpid()}-{next(_numbers)}-{label}"
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    @property
    def prefix(self) -> tuple[str, ...]:
        """What stands before a command that shall run here."""
        return ("ip", "netns", "exec", self.name)

    def ip(self, *args: str) -> str:
        return run("ip", "-n", self.name, *args)

    def run(self, *command: str, timeout: float = 30.0) -> str:
        """Run a command here to its end; its output. Raises SwarmError."""
        return run(*self.prefix, *command, timeout=timeout)

    def nft(self, rules: str) -> None:
        """Load a set of nftables rules, all or none."""
        run(*self.prefix, "nft", "-f", "-", stdin=rules)

    def shape(self, device: str, rate: str) -> None:
        """Limit what `device` sends, to a rate as tc spells it ("100mbit")."""
        limits = ["rate", rate, "burst", _BURST, "latency", _LATENCY]
        run("tc", "-n", self.name, "qdisc", "replace", "dev", device, "root", "tbf", *limits)

    def sysctl(self, key: str, value: int) -> None:
        with self.entered():
            Path("/proc/sys", key).write_text(str(value))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in the namespace inside, so a socket made there belongs to it for ever.

        Nothing inside may wait for another task of an event loop: that task would find itself here.
        """
        thread = threading.get_ident()
        with open("/proc/thread-self/ns/net") as home, (_DIRECTORY / self.name).open() as here:
            _setns(here.fileno())
            try:
                yield
            finally:
                assert threading.get_ident() == thread
                _setns(home.fileno())

    def counters(self, device: str) -> Counters:
        with self.entered():
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        for line in lines:
            name, colon, numbers = line.partition(":")
            if colon and name.strip() == device:
                fields = [int(number) for number in numbers.split()]
                return Counters(fields[0], fields[8], fields[1], fields[9])
        raise SwarmError(f"{self.name} has no interface {device}")

    def pids(self) -> list[int]:
        """The processes that live here."""
        return _pids(self.name)

    def close(self) -> None:
        _remove(self.name)


def connect(a: Netns, a_device: str, b: Netns, b_device: str) -> None:
    """Join two namespaces by a virtual cable; both ends are still down."""
    a.ip("link", "add", a_device, "type", "veth", "peer", "name", b_device, "netns", b.name)


def missing_tools(*tools: str) -> str | None:
    """Why namespaces cannot be had with these tools, or None."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        return f"needs {' and '.join(absent)} (Debian packages iproute2 and nftables)"
    return None


def refusal(probe: Callable[[], object]) -> str | None:
    """What `probe`, which tries to make namespaces, was refused with; None if it went well."""
    try:
        probe()
    except SwarmError as error:
        return str(error)
    return None


def sweep() -> None:
    """Remove the namespaces of runs that were killed before they could."""
    for path in _DIRECTORY.glob("p2p*-*"):
        found = _OURS.match(path.name)
        if found is not None and not Path(f"/proc/{found[1]}").exists():
            _remove(path.name)


def run(*command: str, stdin: str = "", timeout: float = 30.0) -> str:
    """Run a command to its end; its output. Raises SwarmError with what it said."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, input=stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise SwarmError(f"{' '.join(command)}: did not end within {timeout:.0f} s") from None
    if done.returncode:
        raise SwarmError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _remove(name: str) -> None:
    # A process would keep the namespace, and its cables, alive after its name is gone.
    for pid in _pids(name):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _pids(name: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split() if int(pid) != os.getpid()]


def _setns(descriptor: int) -> None:
    # os.setns is new in Python 3.12.
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise SwarmError(f"entering a network namespace: {os.strerror(error)}")

"""One network namespace per node on a bridge, each with a line of limited rate. Needs root and iproute2.

The bridge is in a namespace of its own, so nothing of the machine's own network is touched, and two swarms do not
meet. Unix sockets do not care: a command outside reaches the daemon inside through its control socket.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from swarmlib.process import SwarmError

MAX_NODES = 200
# One GSO segment is up to 64 KiB and must fit into the bucket, or tbf never sends it; the queue holds 100 ms.
_BURST = "128kb"
_LATENCY = "100ms"


class Namespaces:
    """A context manager: `add()` makes a host, leaving it takes everything down again."""

    def __init__(self, rate: str | None = None) -> None:
        """`rate` as tc spells it ("100mbit"), for each host's uplink and downlink."""
        self._rate = rate
        self._base = f"p2p{os.getpid()}"
        self._made: list[str] = []

    def __enter__(self) -> Namespaces:
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise SwarmError(f"--netns needs {' and '.join(missing)}; install iproute2")
        if os.geteuid() != 0:
            raise SwarmError("--netns needs root")
        self._hub = self._namespace("hub")
        try:
            self._ip(self._hub, "link", "add", "br0", "type", "bridge")
            self._ip(self._hub, "link", "set", "br0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        self._made.clear()

    def add(self, number: int) -> tuple[str, tuple[str, ...]]:
        """A new host: its address, and what stands before a command that shall run there."""
        if not 0 <= number < MAX_NODES:
            raise SwarmError(f"--netns takes at most {MAX_NODES} nodes")
        name = self._namespace(str(number))
        address, port = f"10.77.0.{number + 1}", f"n{number}"
        self._ip(name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._hub)
        self._ip(name, "address", "add", f"{address}/24", "dev", "eth0")
        self._ip(name, "link", "set", "lo", "up")
        self._ip(name, "link", "set", "eth0", "up")
        self._ip(self._hub, "link", "set", port, "master", "br0", "up")
        if self._rate is not None:
            self._shape(name, "eth0", self._rate)
            self._shape(self._hub, port, self._rate)
        return address, ("ip", "netns", "exec", name)

    def sent(self, number: int) -> int:
        """Bytes that left a host since it was made, headers and acknowledgements included."""
        device = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_run(["ip", "netns", "exec", f"{self._base}-{number}", "cat", device]))

    def _namespace(self, suffix: str) -> str:
        name = f"{self._base}-{suffix}"
        _run(["ip", "netns", "add", name])
        self._made.append(name)
        return name

    def _ip(self, namespace: str, *args: str) -> None:
        _run(["ip", "-n", namespace, *args])

    def _shape(self, namespace: str, device: str, rate: str) -> None:
        limits = ["rate", rate, "burst", _BURST, "latency", _LATENCY]
        _run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limits])


def available() -> str | None:
    """Why namespaces cannot be had here, or None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs iproute2 (ip and tc)"
    try:
        with Namespaces("100mbit") as hosts:
            hosts.add(0)
    except SwarmError as error:
        return str(error)
    return None


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SwarmError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout

"""One network namespace per node on a bridge, each with a line of limited rate. Needs root and iproute2.

The bridge is in a namespace of its own, so nothing of the machine's own network is touched, and two swarms do not
meet. Unix sockets do not care: a command outside reaches the daemon inside through its control socket.
For networks with NATs in them see `lab`.
"""

from __future__ import annotations

from swarmlib.netns import Netns, connect, missing_tools, refusal, sweep
from swarmlib.process import SwarmError

MAX_NODES = 200


class Namespaces:
    """A context manager: `add()` makes a host, leaving it takes everything down again."""

    def __init__(self, rate: str | None = None) -> None:
        """`rate` as tc spells it ("100mbit"), for each host's uplink and downlink."""
        self._rate = rate
        self._made: list[Netns] = []
        self._hosts: dict[int, Netns] = {}

    def __enter__(self) -> Namespaces:
        reason = missing_tools("ip", "tc")
        if reason is not None:
            raise SwarmError(f"--netns {reason}")
        sweep()
        try:
            self._hub = self._namespace("hub")
            self._hub.ip("link", "add", "br0", "type", "bridge")
            self._hub.ip("link", "set", "br0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in reversed(self._made):
            namespace.close()
        self._made.clear()

    def add(self, number: int) -> tuple[str, tuple[str, ...]]:
        """A new host: its address, and what stands before a command that shall run there."""
        if not 0 <= number < MAX_NODES:
            raise SwarmError(f"--netns takes at most {MAX_NODES} nodes")
        host = self._hosts[number] = self._namespace(str(number))
        address, port = f"10.77.0.{number + 1}", f"n{number}"
        connect(host, "eth0", self._hub, port)
        host.ip("address", "add", f"{address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        self._hub.ip("link", "set", port, "master", "br0", "up")
        if self._rate is not None:
            host.shape("eth0", self._rate)
            self._hub.shape(port, self._rate)
        return address, host.prefix

    def sent(self, number: int) -> int:
        """Bytes that left a host since it was made, headers and acknowledgements included."""
        return self._hosts[number].counters("eth0").sent

    def _namespace(self, label: str) -> Netns:
        namespace = Netns(label)
        self._made.append(namespace)
        return namespace


def available() -> str | None:
    """Why namespaces cannot be had here, or None if they can."""

    def probe() -> None:
        with Namespaces("100mbit") as hosts:
            hosts.add(0)

    return missing_tools("ip", "tc") or refusal(probe)

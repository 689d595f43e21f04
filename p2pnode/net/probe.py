"""One address tried by itself: does anything answer there, how fast, and is it who it should be?

For those who want to know why (`doctor`). Nothing comes of a probe: the connection is closed once the other side has
proved who it is, and the address book does not hear of it.
"""

from __future__ import annotations

import enum
import socket
from dataclasses import dataclass

import trio

from p2pnode.net import sockets
from p2pnode.net.addresses import Address
from p2pnode.net.connector import Upgrader, attempt, raw_tcp
from p2pnode.net.dialler import ATTEMPT_TIMEOUT, AttemptFailed

CLOSE_TIMEOUT = 1.0


class Outcome(enum.Enum):
    """What came of it; the values are part of doctor's JSON."""

    ANSWERED = "answered"  # by whom it should be
    REFUSED = "refused"  # the machine, or what stands before it, says that nothing listens there
    SILENT = "silent"  # nothing came back: off, or what was sent is dropped on the way
    UNREACHABLE = "unreachable"  # the network knows no way there
    NO_SUCH_NAME = "no-such-name"
    FOREIGN = "foreign"  # something listens, but no node of this kind
    ANOTHER_PEER = "another-peer"


@dataclass(frozen=True, slots=True)
class Probe:
    """Times in seconds; `connected` of the TCP connection, `authenticated` of the handshake after it."""

    address: Address
    outcome: Outcome
    reason: str
    connected: float | None = None
    authenticated: float | None = None
    peer: str | None = None  # who answers there

    @property
    def seconds(self) -> float | None:
        times = [each for each in (self.connected, self.authenticated) if each is not None]
        return sum(times) if times else None


async def probe(upgrader: Upgrader, address: Address, expected: str | None) -> Probe:
    """Dial an address that is no circuit. `expected`: the peer that should answer, None for anybody."""
    began = trio.current_time()
    try:
        with trio.fail_after(ATTEMPT_TIMEOUT):
            stream = await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError:
        return Probe(address, Outcome.SILENT, f"no answer within {ATTEMPT_TIMEOUT:.0f} s", trio.current_time() - began)
    except socket.gaierror as exc:
        return Probe(address, Outcome.NO_SUCH_NAME, str(exc.strerror or exc).lower(), trio.current_time() - began)
    except OSError as exc:
        return Probe(address, _OUTCOMES[sockets.failure(exc)], sockets.reason(exc), trio.current_time() - began)
    connected = trio.current_time() - began
    raw = raw_tcp(stream, True)
    try:
        with trio.fail_after(ATTEMPT_TIMEOUT):
            peer = await attempt(raw, lambda: upgrader.authenticate(raw))
    except trio.TooSlowError:
        reason = f"it accepts connections, but said nothing within {ATTEMPT_TIMEOUT:.0f} s"
        return Probe(address, Outcome.FOREIGN, reason, connected)
    except AttemptFailed as exc:
        return Probe(address, Outcome.FOREIGN, f"it accepts connections, but {exc}", connected)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
            await raw.close()
    authenticated = trio.current_time() - began - connected
    if expected is not None and peer != expected:
        return Probe(address, Outcome.ANOTHER_PEER, f"peer {peer} answers there", connected, authenticated, peer)
    return Probe(address, Outcome.ANSWERED, "answered", connected, authenticated, peer)


_OUTCOMES = {
    sockets.Failure.REFUSED: Outcome.REFUSED,
    sockets.Failure.SILENT: Outcome.SILENT,
    sockets.Failure.UNREACHABLE: Outcome.UNREACHABLE,
}

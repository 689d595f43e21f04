"""A port mapping on the home gateway, by UPnP IGD (https://openconnectivity.org, WANIPConnection:1).

Best effort: most networks have no gateway that answers. What a gateway says is not believed: whether the mapping leads
here is found out like everything else, by peers that dial it (reachability.py).
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from typing import Any

import trio

from p2pnode.net.addresses import Address

log = logging.getLogger(__name__)

DISCOVER_MS = 2000  # how long gateways have to answer
LEASE = 3600  # s; a crashed node leaves its mapping behind for so long
RENEW = LEASE / 3
RETRY = 600.0  # s until the next look for a gateway
CLOSE_TIMEOUT = 1.0  # s for taking the mapping back


async def keep_mapping(port: int, mapped: Callable[[Address | None], None], moved: Callable[[], trio.Event]) -> None:
    """Keep TCP `port` mapped until cancelled; `mapped` hears of the outside address, or of its loss.

    `moved()` gives an event that is set when the network has changed, so that another gateway may be there.
    """
    gateway: _Gateway | None = None
    known: Address | None = None
    try:
        while True:
            wait = moved()
            found = await _in_thread(_map, port)
            gateway, address = found if found is not None else (None, None)
            if address != known:
                known = address
                mapped(address)
            with trio.move_on_after(RENEW if gateway is not None else RETRY):
                await wait.wait()
    finally:
        if gateway is not None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
                await _in_thread(gateway.remove)


class _Gateway:
    def __init__(self, igd: Any, port: int) -> None:
        self._igd = igd
        self._port = port

    def remove(self) -> None:
        try:
            self._igd.deleteportmapping(self._port, "TCP")
        except Exception as exc:  # noqa: BLE001 (miniupnpc raises bare Exception for whatever a gateway answers)
            log.info("the gateway did not take back the mapping of port %d: %s", self._port, exc)


def _map(port: int) -> tuple[_Gateway, Address] | None:
    """Map `port`, blocking. None when there is no gateway, or none that would."""
    import miniupnpc  # type: ignore[import-not-found,unused-ignore]  # here: only this thread needs it

    igd = miniupnpc.UPnP()
    igd.discoverdelay = DISCOVER_MS
    try:
        if not igd.discover():
            return None
        igd.selectigd()
        outside = ipaddress.ip_address(igd.externalipaddress())
        igd.addportmapping(port, "TCP", igd.lanaddr, port, "p2pnode", "", str(LEASE))
    except Exception as exc:  # noqa: BLE001 (see above; it raises Exception("No UPnP device discovered"))
        log.debug("no port mapping by UPnP: %s", exc)
        return None
    log.info("the gateway at %s maps port %d", outside, port)
    return _Gateway(igd, port), Address(f"ip{outside.version}", str(outside), port)


async def _in_thread(call: Callable[..., Any], *args: Any) -> Any:
    """miniupnpc blocks for seconds; when cancelled, its thread is left to end by itself."""
    return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True)  # type: ignore[call-arg,unused-ignore]

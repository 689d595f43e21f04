"""Finding peers on the local network by multicast DNS service discovery (RFC 6762, RFC 6763).

A service of our own, `_p2pnode._tcp.local.`, whose TXT record holds the peer id, the cluster's name and the addresses:

    <peer id>._p2pnode._tcp.local.   id=<peer id>  cluster=<name>  a0=/ip4/192.0.2.7/tcp/4001  a1=...

The library's own mDNS announces 0.0.0.0, blocks the event loop for a second and changes the peer store from a foreign
thread (libp2p 0.8.1, discovery/mdns), so `zeroconf` is used directly: it works in threads of its own, and everything it
finds enters trio through a bounded channel. Anybody on the network can say anything here; what is found is only a hint
where to dial, and dialling authenticates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio

from p2pnode.errors import UsageError
from p2pnode.net.addresses import check_peer_id, parse, valid

log = logging.getLogger(__name__)

SERVICE = "_p2pnode._tcp.local."
MAX_TXT_STRING = 255  # bytes of one key=value (RFC 6763 section 6.1)
MAX_ADDRS = 8  # keeps the record within one packet of 1,500 bytes
MAX_PENDING = 256  # names waiting to be looked at; a flood beyond that is dropped
LOOKUP_TIMEOUT_MS = 3000
LOOKUPS = 8  # at the same time, so that names which never answer cannot hold up the others for long
REFRESH = 15.0  # s between looks at our own addresses: a laptop that changes networks is found again
STOP_TIMEOUT = 1.0  # s for the goodbye packets

Found = Callable[[str, list[str]], None]


def record(peer_id: str, cluster: str, addrs: Sequence[str]) -> dict[str, str]:
    """The TXT record of a node. Pure."""
    fields = {"id": peer_id, "cluster": cluster}
    for index, addr in enumerate(valid(addrs, peer_id, MAX_ADDRS)):
        if len(f"a{index}={addr}") <= MAX_TXT_STRING:
            fields[f"a{index}"] = addr
    return fields


def read_record(fields: dict[bytes, bytes | None], own_peer_id: str, cluster: str) -> tuple[str, list[str]] | None:
    """Peer id and addresses in a TXT record; None if it is ours, of another cluster, or malformed. Pure."""

    def text(key: str) -> str:
        return (fields.get(key.encode()) or b"").decode("ascii", errors="replace")

    try:
        peer = check_peer_id(text("id"))
    except UsageError:
        return None
    if peer == own_peer_id or text("cluster") != cluster:
        return None
    addrs = valid((text(f"a{index}") for index in range(MAX_ADDRS)), peer, MAX_ADDRS)
    return (peer, addrs) if addrs else None


async def run_mdns(
    peer_id: str,
    addrs: Callable[[], Sequence[str]],
    found: Found,
    *,
    cluster: str = "",
    interfaces: Sequence[str] | None = None,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Announce `addrs()` and call `found(peer, addrs)` for every node of the same cluster seen, until cancelled.

    `found` is called in the trio thread, again whenever a peer's record changes, and must not block. `interfaces` are
    the IPs to speak on, all by default. `task_status.started()` comes once we are announced; without multicast there is
    a warning and the function returns, for a node works without it.
    """
    # Imported here: half of the commands never get this far.
    import zeroconf

    try:
        zc = await trio.to_thread.run_sync(_start, interfaces)  # quick; abandoned, it would leave its sockets
    except OSError as exc:
        log.warning("peers on the local network cannot be discovered: %s", exc)
        task_status.started()
        return
    browser: Any = None
    try:
        send, receive = trio.open_memory_channel[str](MAX_PENDING)
        token = trio.lowlevel.current_trio_token()
        service = _Service(zc, peer_id, cluster)
        # Quick, and not to be abandoned: its thread must be ended below.
        browser = await trio.to_thread.run_sync(zeroconf.ServiceBrowser, zc, SERVICE, [_listener(send, token)])
        async with trio.open_nursery() as nursery:
            for _ in range(LOOKUPS):
                nursery.start_soon(_look_up, zc, receive.clone(), peer_id, cluster, found)
            await service.announce(addrs())
            task_status.started()
            while True:
                await trio.sleep(REFRESH)
                await service.announce(addrs())
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_TIMEOUT):
            await _in_thread(_stop, zc, browser)


async def _in_thread(call: Callable[..., Any], *args: Any) -> Any:
    """Run a blocking call of zeroconf; when cancelled, its thread is left to end by itself, within seconds."""
    return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True)  # type: ignore[call-arg,unused-ignore]


def _start(interfaces: Sequence[str] | None) -> Any:
    import zeroconf

    return zeroconf.Zeroconf(
        interfaces=list(interfaces) if interfaces is not None else zeroconf.InterfaceChoice.All,
        ip_version=zeroconf.IPVersion.V4Only,
    )


def _stop(zc: Any, browser: Any) -> None:
    if browser is not None:
        browser.cancel()
    zc.close()  # says goodbye


class _Service:
    """Our own entry, registered anew when the addresses change."""

    def __init__(self, zc: Any, peer_id: str, cluster: str) -> None:
        self._zc = zc
        self._peer_id = peer_id
        self._cluster = cluster
        self._announced: dict[str, str] | None = None

    async def announce(self, addrs: Sequence[str]) -> None:
        fields = record(self._peer_id, self._cluster, addrs)
        if fields == self._announced or "a0" not in fields:
            return
        if await _in_thread(self._publish, fields):
            self._announced = fields

    def _publish(self, fields: dict[str, str]) -> bool:
        import zeroconf

        known = [parse(addr) for key, addr in fields.items() if key not in ("id", "cluster")]
        info = zeroconf.ServiceInfo(
            SERVICE,
            f"{self._peer_id}.{SERVICE}",
            port=known[0].port,
            properties=fields,
            # Resolvers wait for an A or AAAA record; what we read is the TXT record, which knows ports and names too.
            parsed_addresses=[address.host for address in known if address.ip is not None] or ["127.0.0.1"],
            server=f"{self._peer_id}.local.",
        )
        try:
            if self._announced is None:
                # Not probed for uniqueness: a peer id is unique, and a probe takes three quarters of a second.
                self._zc.register_service(info, cooperating_responders=True)
            else:
                self._zc.update_service(info)
        except (zeroconf.Error, OSError) as exc:
            log.info("this node cannot be announced on the local network: %r", exc)
            return False
        return True


def _listener(send: trio.MemorySendChannel[str], token: trio.lowlevel.TrioToken) -> Callable[..., None]:
    """What zeroconf calls in its own thread."""
    import zeroconf

    def offer(name: str) -> None:
        try:
            send.send_nowait(name)
        except (trio.WouldBlock, trio.BrokenResourceError):
            log.debug("too many services on the local network, dropped %r", name[:80])

    def on_change(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        if state_change is not removed:
            try:
                token.run_sync_soon(offer, name)
            except trio.RunFinishedError:
                log.debug("a service was found after the end")

    removed = zeroconf.ServiceStateChange.Removed
    return on_change


async def _look_up(
    zc: Any, names: trio.MemoryReceiveChannel[str], own_peer_id: str, cluster: str, found: Found
) -> None:
    """Resolve names one after the other."""
    import zeroconf

    async for name in names:
        if name == f"{own_peer_id}.{SERVICE}":
            continue
        try:
            info = await _in_thread(zc.get_service_info, SERVICE, name, LOOKUP_TIMEOUT_MS)
        except (zeroconf.Error, OSError, ValueError) as exc:
            log.debug("service %r cannot be resolved: %r", name[:80], exc)
            continue
        seen = read_record(info.properties, own_peer_id, cluster) if info is not None else None
        if seen is not None:
            found(*seen)

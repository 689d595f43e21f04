"""Each step of finding a peer and connecting to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import trio

from p2pnode.diagnosis import lookup
from p2pnode.diagnosis.itself import CLOCK_TOLERANCE
from p2pnode.diagnosis.model import Kind, Mark
from p2pnode.diagnosis.scene import Journal, Scene, Stopwatch, count, milliseconds, together
from p2pnode.errors import NodeError, RelayRefused, RemoteError
from p2pnode.net.addresses import Address, Scope
from p2pnode.net.probe import Outcome, probe
from p2pnode.net.relay.client import dial
from protocols import clock
from protocols.exchange import PROTOCOL_ID
from protocols.relay import Status

MAX_DIALLED = 12
MAX_RELAYS = 4
RELAY_TIMEOUT = 12.0  # s for reaching a relay and asking it for a circuit
IDENTIFY_WAIT = 4.0  # s
PUNCH_WAIT = 8.0  # s for a first round of hole punching
EXCHANGE = PROTOCOL_ID.rpartition("/")[0] + "/"
_BY_RELAY: dict[int, str] = {
    Status.RESOURCE_LIMIT_EXCEEDED: "full",
    Status.RESERVATION_REFUSED: "full",
    Status.NO_RESERVATION: "absent",
}


async def examine_peer(scene: Scene, journal: Journal, peer: str, addrs: Sequence[str]) -> None:
    """All steps about `peer`, of whom the user gave `addrs`."""
    note_ban(scene, journal, peer)
    known = list(dict.fromkeys([*addrs, *scene.network.address_book.addrs(peer)]))
    text = f"{count(len(known), 'address')} known, {len(addrs)} of them given here"
    journal.note(Kind.ADDRESSES, Mark.OK if known else Mark.WARN, text, peer=peer, known=len(known))
    journal.doing("looking the peer up in the DHT")
    trace = await lookup.find_peer(scene.router, scene.network.peer_id, peer)
    named = trace.named.get(peer)
    found: tuple[str, ...] = () if named is None else named.addrs
    if named is not None:
        text = f"{count(len(found), 'address')}, named by {count(named.by, 'other peer')}"
    else:
        text = "nobody knows it" if trace.asked else "there is nobody to ask"
    text += f" (asked {trace.asked}, {len(trace.answered)} answered)"
    mark = Mark.OK if named is not None else Mark.WARN
    journal.note(
        Kind.PEER_LOOKUP,
        mark,
        text,
        seconds=trace.seconds,
        peer=peer,
        found=len(found),
        named_by=0 if named is None else named.by,
        asked=trace.asked,
        answered=len(trace.answered),
        alive=peer in trace.answered,
    )
    scene.network.address_book.heard(peer, found)
    await dial_all(scene, journal, peer, [*addrs, *found])
    if await connect(scene, journal, peer, [*addrs, *found]):
        await _connected(scene, journal, peer)


def note_ban(scene: Scene, journal: Journal, peer: str) -> bool:
    seconds = scene.exchange.bans.get(peer)
    if seconds is not None:
        text = f"banned for {seconds:.0f} s more, because of what it sent"
        journal.note(Kind.PEER_BAN, Mark.WARN, text, peer=peer, seconds_left=round(seconds))
    return seconds is not None


async def dial_all(scene: Scene, journal: Journal, peer: str, addrs: Sequence[str]) -> None:
    """Each address by itself, all at the same time."""
    wanted = scene.network.connector.candidates(peer, addrs)
    direct = [address for address in wanted if address.relay is None][:MAX_DIALLED]
    circuits = [address for address in wanted if address.relay is not None][:MAX_RELAYS]
    journal.doing(f"dialling {count(len(direct), 'address')} and {count(len(circuits), 'relay')}")

    async def one(address: Address) -> Journal:
        part = journal.part()
        if address.relay is None:
            await _dial(scene, part, peer, address)
        else:
            await _dial_relay(scene, part, peer, address)
        return part

    for part in await together([partial(one, address) for address in (*direct, *circuits)]):
        journal.take(part)


async def _dial(scene: Scene, journal: Journal, peer: str, address: Address) -> None:
    result = await probe(scene.network.connector.upgrader, address, peer)
    near = any(address.ip in interface.network for interface in scene.network.interfaces() if address.ip is not None)
    elsewhere = address.scope is Scope.LAN and not near  # a private address of somebody else's network
    text = f"{address}: {result.reason}" + (" (a private address of another network)" if elsewhere else "")
    if result.outcome is Outcome.ANSWERED:
        text += f" (TCP {milliseconds(result.connected)}, handshake {milliseconds(result.authenticated)})"
    journal.note(
        Kind.PEER_DIAL,
        Mark.OK if result.outcome is Outcome.ANSWERED else Mark.WARN if elsewhere else Mark.FAIL,
        text,
        seconds=result.seconds,
        peer=peer,
        addr=str(address),
        elsewhere=elsewhere,
        outcome=result.outcome.value,
        answered=result.peer,
    )


async def _dial_relay(scene: Scene, journal: Journal, peer: str, address: Address) -> None:
    network, relay, watch = scene.network, address.relay, Stopwatch()
    assert relay is not None
    status: int | None = None
    reached = False
    try:
        with trio.fail_after(RELAY_TIMEOUT):
            await network.connect(relay, [str(replace(address, relay=None, peer=None))])
            reached = True
            circuit = await dial(network, relay, peer)
            await circuit.abort()
        outcome, text = "answered", f"relay {relay} connects to the peer"
    except RelayRefused as exc:
        status = exc.status
        outcome, text = _BY_RELAY.get(status, "refused"), str(exc)
    except NodeError as exc:
        outcome, text = "failed" if reached else "unreachable", str(exc)
    except trio.TooSlowError:
        outcome, text = "failed" if reached else "unreachable", f"relay {relay} did not answer in {RELAY_TIMEOUT:.0f} s"
    mark = Mark.OK if outcome == "answered" else Mark.FAIL
    journal.note(
        Kind.PEER_RELAY, mark, text, seconds=watch.seconds, peer=peer, relay=relay, outcome=outcome, status=status
    )


async def connect(scene: Scene, journal: Journal, peer: str, addrs: Sequence[str]) -> bool:
    """As a fetch would do it. Whether there is a connection."""
    network, watch = scene.network, Stopwatch()
    before = network.connections_book.live(peer)
    try:
        await network.connect(peer, addrs)
    except NodeError as exc:
        journal.note(Kind.PEER_CONNECT, Mark.FAIL, str(exc), seconds=watch.seconds, peer=peer, path=None)
        return False
    path = "direct" if network.connections_book.direct(peer) else "relayed"
    text = f"connected{' already' if before else ''}, {'directly' if path == 'direct' else 'through a relay'}"
    mark = Mark.OK if path == "direct" else Mark.WARN
    journal.note(Kind.PEER_CONNECT, mark, text, seconds=watch.seconds, peer=peer, path=path)
    return True


async def note_protocols(scene: Scene, journal: Journal, peer: str) -> bool:
    """Wait for identify; whether the peer speaks our exchange."""
    network, watch = scene.network, Stopwatch()
    with trio.move_on_after(IDENTIFY_WAIT):
        while not network.protocols(peer) and network.connections_book.live(peer):
            await trio.sleep(0.02)
    spoken = network.protocols(peer)
    exchange = sorted(each for each in spoken if each.startswith(EXCHANGE))
    if PROTOCOL_ID in exchange:
        mark, text = Mark.OK, f"speaks {PROTOCOL_ID}"
    elif not spoken:
        mark, text = Mark.WARN, f"did not say what it speaks within {IDENTIFY_WAIT:.0f} s"
    else:
        theirs = f"{', '.join(exchange)} only" if exchange else "no exchange protocol at all"
        mark, text = Mark.FAIL, f"speaks {theirs}, and this node {PROTOCOL_ID}"
    journal.note(
        Kind.PEER_PROTOCOLS,
        mark,
        text,
        seconds=watch.seconds,
        peer=peer,
        exchange=exchange,
        ours=PROTOCOL_ID,
        identified=bool(spoken),
    )
    return PROTOCOL_ID in exchange


async def _connected(scene: Scene, journal: Journal, peer: str) -> None:
    network = scene.network
    await note_protocols(scene, journal, peer)
    puncher = network.traversal.puncher
    if not network.connections_book.direct(peer) or (puncher is not None and peer in puncher.results):
        await _punch(scene, journal, peer)
    if network.speaks(peer, clock.PROTOCOL):
        try:
            sample = await network.clock.ask(peer)
        except RemoteError as exc:
            journal.note(Kind.PEER_RTT, Mark.WARN, str(exc), peer=peer)
            return
        journal.note(Kind.PEER_RTT, Mark.OK, f"round trip {milliseconds(sample.rtt)}", seconds=sample.rtt, peer=peer)
        fine = abs(sample.offset) <= CLOCK_TOLERANCE
        offset = (
            "the same time as here"
            if abs(sample.offset) < 1
            else (
                f"its clock is {abs(sample.offset):.1f} s {'ahead of' if sample.offset > 0 else 'behind'} this node's"
            )
        )
        mark = Mark.OK if fine else Mark.WARN
        journal.note(Kind.PEER_CLOCK, mark, offset, peer=peer, offset=round(sample.offset, 3))


async def _punch(scene: Scene, journal: Journal, peer: str) -> None:
    network, watch = scene.network, Stopwatch()
    puncher = network.traversal.puncher
    if puncher is None:
        journal.note(Kind.PEER_PUNCH, Mark.WARN, "hole punching is switched off", peer=peer)
        return
    journal.doing("waiting for a hole punch")
    with trio.move_on_after(PUNCH_WAIT):
        while not network.connections_book.direct(peer) and peer not in puncher.results:
            await trio.sleep(0.05)
    result = puncher.results.get(peer, "the peer has not begun one")
    direct = network.connections_book.direct(peer)
    text = f"hole punch: {'direct now' if direct and peer not in puncher.results else result}"
    journal.note(
        Kind.PEER_PUNCH, Mark.OK if direct else Mark.WARN, text, seconds=watch.seconds, peer=peer, direct=direct
    )

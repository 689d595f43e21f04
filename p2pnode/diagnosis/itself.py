"""What this node thinks of its own reachability, whom it is connected to, and what is in the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from p2pnode.diagnosis import lookup
from p2pnode.diagnosis.model import Kind, Mark
from p2pnode.diagnosis.scene import Journal, Scene, Stopwatch, count, milliseconds, together
from p2pnode.errors import RemoteError
from p2pnode.net.addresses import IP, parse
from p2pnode.net.connections import is_relayed
from p2pnode.net.probe import Outcome as Dialled
from p2pnode.net.probe import probe
from p2pnode.net.reachability import State, Vote, judge
from p2pnode.store.space import readable_size
from protocols import clock
from protocols.clock import Sample
from protocols.reach import Outcome

RELAY_WAIT = 3.0  # s for the first reservation, or the first failure, of a node that has just started
DIAL_BACK_WAIT = 15.0  # s; a peer asked may ask two others in turn
CLOCK_PEERS = 5
CLOCK_TOLERANCE = 5.0  # s; NTP keeps clocks within a fraction of one
MAX_BOOTSTRAP = 16
LITTLE_SPACE = 1 << 30
NO_SPACE = 64 << 20
_DIAL_BACK = {
    Outcome.REACHED: (Mark.OK, "could connect"),
    Outcome.SILENT: (Mark.FAIL, "got no answer: what it sent was dropped"),
    Outcome.CLOSED: (Mark.FAIL, "was refused: nothing listens where that port leads"),
    Outcome.STRANGER: (Mark.FAIL, "found somebody else there: that port leads to another program"),
    Outcome.UNREACHABLE: (Mark.WARN, "knows no way there"),
}


async def examine_itself(scene: Scene, journal: Journal) -> None:
    """All steps about this node."""
    network = scene.network
    own = {interface.ip for interface in network.interfaces()}
    addrs = network.addrs()
    heading = f"{count(len(addrs), 'address')} for others to dial: " + ", ".join(_without_peer(addr) for addr in addrs)
    journal.note(Kind.LISTEN, Mark.OK if addrs else Mark.WARN, heading if addrs else "no addresses", addrs=addrs)
    _observed(scene, journal, own)
    await _dial_backs(scene, journal, own)
    await _relays(scene, journal)
    connections = network.connections()
    peers = {each.peer for each in connections}
    direct = {each.peer for each in connections if not each.relayed}
    text = f"{count(len(peers), 'peer')}, {len(peers - direct)} of them through relays only"
    journal.note(Kind.CONNECTIONS, Mark.OK if peers else Mark.WARN, text, peers=len(peers))
    await _bootstrap(scene, journal)
    await _dht(scene, journal)
    await _clock(scene, journal)
    await _disk(scene, journal)


def _observed(scene: Scene, journal: Journal, own: set[IP]) -> None:
    observed = scene.network.traversal.observed
    seen = observed.ips()
    nat = bool(seen) and not own.intersection(seen)
    if not seen:
        journal.note(Kind.OBSERVED, Mark.WARN, "no peer has said yet from where it sees this node", nat=None, ips=[])
        return
    where = ", ".join(map(str, seen[:4]))
    mapping = observed.mapping().value
    text = f"peers see this node at {where}, which is " + (
        f"a NAT's address (ports given out: {mapping})" if nat else "this machine's own"
    )
    journal.note(Kind.OBSERVED, Mark.OK, text, nat=nat, ips=[str(ip) for ip in seen], mapping=mapping)


async def _dial_backs(scene: Scene, journal: Journal, own: set[IP]) -> None:
    traversal = scene.network.traversal
    journal.doing("asking peers to connect to this node")
    watch = Stopwatch()
    votes: Sequence[Vote] = ()
    with trio.move_on_after(DIAL_BACK_WAIT):
        votes = await traversal.reachability.probe()
    seconds = watch.seconds
    status = traversal.status()
    asked = bool(votes) and scene.config.reachability == "auto"  # else it is what the user says
    verdict = judge(votes, list(own)) if asked else traversal.verdict
    mapped = None if status["upnp"] is None else parse(status["upnp"])
    named = {address.port for address in scene.network.announced} | ({mapped.port} if mapped is not None else set())
    for vote in votes:
        mark, words = _DIAL_BACK.get(vote.outcome, (Mark.WARN, "did not try"))
        text = f"peer {vote.voter} dialled {vote.ip} port {vote.port} and {words}"
        journal.note(
            Kind.DIAL_BACK,
            mark,
            text,
            seconds=seconds,
            outcome=vote.outcome.value,
            voter=vote.voter,
            ip=str(vote.ip),
            port=vote.port,
            named=vote.port in named,
            nat=vote.ip not in own,
        )
    if mapped is not None:
        journal.note(Kind.UPNP, Mark.OK, f"a gateway maps {mapped} to this node (UPnP)", mapped=str(mapped))
    elif verdict.state is State.PRIVATE:
        words = "no gateway answers to UPnP" if scene.config.upnp else "UPnP is switched off"
        journal.note(Kind.UPNP, Mark.WARN, words, mapped=None)
    text = f"{verdict.state.value}: {verdict.reason}"
    if not votes and scene.config.reachability == "auto":
        text += "; nobody tried it now (peers at other addresses are needed, and they do so only now and then)"
    mark = Mark.OK if verdict.state is State.PUBLIC else Mark.WARN
    journal.note(Kind.REACHABILITY, mark, text, state=verdict.state.value, voters=list(verdict.voters))


async def _relays(scene: Scene, journal: Journal) -> None:
    traversal = scene.network.traversal
    needed = traversal.verdict.state is not State.PUBLIC
    if needed:
        await _until(lambda: bool(traversal.keeper.statistics().held or traversal.keeper.statistics().failures))
    kept = traversal.keeper.statistics()
    for held in kept.held:
        left = max(0, round(held.expires - trio.current_time()))
        text = f"a place at relay {held.relay}, for {left} s more"
        journal.note(Kind.RELAY, Mark.OK, text, held=True, relay=held.relay, status=None)
    for relay, why in kept.failures.items():
        mark = Mark.WARN if kept.held else Mark.FAIL
        journal.note(Kind.RELAY, mark, why, held=False, relay=relay, status=kept.refusals.get(relay))
    if needed and not kept.held and not kept.failures:
        journal.note(Kind.RELAYS, Mark.WARN, "no relay is known", held=0, needed=needed)
    else:
        text = count(len(kept.held), "reservation") if needed else "no relay is needed"
        journal.note(
            Kind.RELAYS, Mark.OK if kept.held or not needed else Mark.FAIL, text, held=len(kept.held), needed=needed
        )
    if traversal.server is not None:
        serving = traversal.server.statistics()
        text = f"this node is a relay for {serving.reservations} nodes and {serving.circuits} connections"
        journal.note(Kind.RELAYS, Mark.OK, text, held=len(kept.held), needed=needed, serving=serving.reservations)


async def _bootstrap(scene: Scene, journal: Journal) -> None:
    network = scene.network
    addresses = [parse(text) for text in scene.config.bootstrap[:MAX_BOOTSTRAP]]
    addresses = [address for address in addresses if address.relay is None]
    journal.doing("dialling the bootstrap peers")
    results = await together([partial(probe, network.connector.upgrader, a, a.peer) for a in addresses])
    connected = set(network.connections_book.peers())
    for result in results:
        fine = result.outcome is Dialled.ANSWERED
        there = result.address.peer in connected
        mark = Mark.OK if fine else Mark.WARN if there else Mark.FAIL
        text = f"{result.address}: {result.reason}" + (", though connected" if there and not fine else "")
        journal.note(
            Kind.BOOTSTRAP,
            mark,
            text,
            seconds=result.seconds,
            addr=str(result.address),
            outcome=result.outcome.value,
            connected=there,
        )


async def _dht(scene: Scene, journal: Journal) -> None:
    stats = scene.router.stats()
    text = (
        f"{count(stats.peers, 'peer')} in the routing table, {stats.announced} keys announced, {stats.pending} pending"
    )
    mark = Mark.OK if stats.peers else Mark.WARN
    journal.note(Kind.DHT, mark, text, peers=stats.peers, announced=stats.announced, pending=stats.pending)
    if not stats.peers:
        return
    journal.doing("looking something up in the DHT")
    trace = await lookup.find_peer(scene.router, scene.network.peer_id, scene.network.peer_id)
    text = f"a look-up asked {count(trace.asked, 'peer')}, of whom {len(trace.answered)} answered"
    mark = Mark.OK if trace.answered and not trace.failures else Mark.WARN if trace.answered else Mark.FAIL
    journal.note(
        Kind.DHT_LOOKUP,
        mark,
        text,
        seconds=trace.seconds,
        asked=trace.asked,
        answered=len(trace.answered),
        failures=dict(trace.failures),
    )


async def _clock(scene: Scene, journal: Journal) -> None:
    network = scene.network
    peers = [peer for peer in network.connections_book.peers() if network.speaks(peer, clock.PROTOCOL)]
    direct = [peer for peer in peers if not all(map(is_relayed, network.connections_book.of(peer)))]
    chosen = [*direct, *(peer for peer in peers if peer not in direct)][:CLOCK_PEERS]

    async def ask(peer: str) -> Sample | None:
        try:
            return await network.clock.ask(peer)
        except RemoteError:
            return None

    found = await together([partial(ask, peer) for peer in chosen])
    samples = [each for each in found if each is not None]
    offset = clock.median(samples)
    if offset is None:
        journal.note(Kind.CLOCK, Mark.WARN, "no peer said what time it is", offset=None, peers=0)
        return
    fine = abs(offset) <= CLOCK_TOLERANCE
    text = f"{describe_offset(offset)} by the median of {count(len(samples), 'peer')}"
    rtt = max(each.rtt for each in samples)
    journal.note(
        Kind.CLOCK, Mark.OK if fine else Mark.FAIL, text, seconds=rtt, offset=round(offset, 3), peers=len(samples)
    )


def describe_offset(offset: float, whose: str = "this clock") -> str:
    """`offset` is what would have to be added to this node's clock."""
    if abs(offset) < 1:
        return f"{whose} is right to {milliseconds(abs(offset))}"
    return f"{whose} is {abs(offset):.1f} s {'behind' if offset > 0 else 'ahead'}"


async def _disk(scene: Scene, journal: Journal) -> None:
    stats = await trio.to_thread.run_sync(scene.store.stats)
    free = stats.free_bytes
    text = f"{readable_size(free)} free, {readable_size(stats.owned_bytes)} used by the store"
    if stats.problems:
        text += f", {stats.problems} damaged sources (see `p2pnode status`)"
    mark = Mark.FAIL if free < NO_SPACE else Mark.WARN if free < LITTLE_SPACE or stats.problems else Mark.OK
    journal.note(Kind.DISK, mark, text, free=free, owned=stats.owned_bytes, problems=stats.problems)


async def _until(condition: Callable[[], bool], seconds: float = RELAY_WAIT) -> None:
    with trio.move_on_after(seconds):
        while not condition():
            await trio.sleep(0.05)


def _without_peer(addr: str) -> str:
    return str(parse(addr).with_peer(None))

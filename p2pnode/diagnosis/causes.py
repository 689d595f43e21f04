"""From steps to the likely causes, the likeliest first. Pure: nothing here looks at the world.

What a dial tells: a refusal comes from a machine that is there, so a port is wrong or a program not running; silence
comes from a machine that is off or from a firewall that drops, and which of the two only others can tell, who hear from
the peer or do not; who answers with another key is another node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from p2pnode.diagnosis.model import Cause, Code, Kind, Mark, Step
from p2pnode.errors import EXIT_NOT_FOUND, EXIT_STORE, EXIT_TRUST

FULL = (200, 201)  # protocols.relay.Status: RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED
_NEVER_THERE = ("unreachable", "no-such-name")


def causes(steps: Sequence[Step]) -> list[Cause]:
    """Problems before what only explains; each group in the order in which it should be mended."""
    found = [*_of_this_node(steps)]
    peers = dict.fromkeys(step.peer for step in steps if step.peer is not None)
    image = bool(_of(steps, Kind.PROVIDERS))
    served = _served(steps)
    for peer in peers:
        about = [step for step in steps if step.peer == peer]
        mine = list(_of_peer(peer, about))
        if image:
            mine = list(_of_provider(peer, about, mine, served))
        found += mine
    if image:
        found += _of_image(steps, any(cause.problem for cause in found), served)
    found = list(dict.fromkeys(found))
    return sorted(found, key=lambda cause: not cause.problem)


def _of(steps: Iterable[Step], *kinds: Kind) -> list[Step]:
    return [step for step in steps if step.kind in kinds]


# This node


def _of_this_node(steps: Sequence[Step]) -> Iterator[Cause]:
    yield from _joining(steps)
    yield from _clock(steps)
    yield from _reachability(steps)
    yield from _relays(steps)
    for step in _of(steps, Kind.DISK):
        if step.mark is Mark.FAIL:
            advice = "Make space, or move the home; `p2pnode rm` removes images."
            yield Cause(Code.DISK_FULL, f"The disk is full: {step.text}.", advice, exit_code=EXIT_STORE)


def _joining(steps: Sequence[Step]) -> Iterator[Cause]:
    dials = _of(steps, Kind.BOOTSTRAP)
    connections = _of(steps, Kind.CONNECTIONS)
    alone = bool(connections) and not connections[0].facts["peers"]
    failed = [step for step in dials if step.facts["outcome"] != "answered" and not step.facts["connected"]]
    if failed:
        all_failed = len(failed) == len(dials)
        which = (
            "None of the bootstrap peers can" if all_failed else f"{len(failed)} of {len(dials)} bootstrap peers cannot"
        )
        why = "; ".join(step.text for step in failed[:4])
        yield Cause(
            Code.BOOTSTRAP_UNREACHABLE,
            f"{which} be reached, through which this node joins the DHT ({why}).",
            _BOOTSTRAP_ADVICE,
            problem=all_failed,
        )
    elif alone and not dials:
        yield Cause(
            Code.NO_PEERS,
            "This node is connected to nobody and has no bootstrap peer to begin with.",
            "Name one with --bootstrap or `bootstrap` in config.toml, or start another node on this network.",
        )


_BOOTSTRAP_ADVICE = (
    "Check that the addresses are current (`p2pnode status` on those machines prints them), that the nodes run, and "
    "that this machine is online; others can be named with `bootstrap` in config.toml."
)


def _clock(steps: Sequence[Step]) -> Iterator[Cause]:
    advice = "Switch on time synchronisation (NTP: `timedatectl set-ntp true`); records and reservations expire by it."
    for step in _of(steps, Kind.CLOCK):
        if step.mark is Mark.FAIL:
            sure = step.facts["peers"] > 1
            whose = (
                "This machine's clock is wrong" if sure else "This machine's clock, or that of its only peer, is wrong"
            )
            yield Cause(Code.CLOCK_SKEW, f"{whose}: {step.text}.", advice)
    for step in _of(steps, Kind.PEER_CLOCK):
        if step.mark is not Mark.OK:
            whose = "The clocks of this machine and the peer's disagree"
            advice = (
                "Run `p2pnode doctor` here: if other peers disagree with this clock, too, it is this one. " + advice
            )
            yield Cause(Code.CLOCK_SKEW, f"{whose}: {step.text}.", advice, peer=step.peer)


def _reachability(steps: Sequence[Step]) -> Iterator[Cause]:
    """One port for each kind of failure: several voters say the same thing of it."""
    dials = _of(steps, Kind.DIAL_BACK)
    reached = any(step.facts["outcome"] == "reached" for step in dials)
    seen: set[tuple[str, int]] = set()
    helped = any(step.facts["held"] for step in _of(steps, Kind.RELAYS))
    for step in dials:
        outcome, port = step.facts["outcome"], step.facts["port"]
        if (outcome, port) not in seen:
            seen.add((outcome, port))
            yield from _dial_back(step, reached, helped)


_FORWARD = "In the router, forward TCP port {port} to this machine and the port this node listens on."


def _dial_back(step: Step, reached: bool, helped: bool) -> Iterator[Cause]:
    outcome, ip, port = step.facts["outcome"], step.facts["ip"], step.facts["port"]
    where = f"port {port} of {ip}"
    nat, named = step.facts["nat"], step.facts["named"]
    if outcome == "stranger":
        yield Cause(
            Code.WRONG_PORT_FORWARDED,
            f"Something answers at {where}, but not this node: the forwarding leads to another machine or program.",
            _FORWARD.format(port=port),
            problem=not reached,
        )
    elif outcome == "closed" and nat:
        doubt = "" if named else ", or the router itself refuses what it has no forwarding for"
        yield Cause(
            Code.WRONG_PORT_FORWARDED,
            f"Connections to {where} are refused: the port is forwarded to a wrong port or machine, where nothing "
            f"listens{doubt}.",
            _FORWARD.format(port=port),
            problem=not reached,
        )
    elif outcome == "closed":
        yield Cause(
            Code.FIREWALL_REFUSING,
            f"Connections to {where} are refused though this node listens there: a firewall rejects them.",
            f"Let TCP port {port} in, in this machine's firewall and in the provider's.",
            problem=not reached,
        )
    elif outcome == "silent" and (named or not nat):
        how = ", which is said to be forwarded here," if named else ""
        # A forwarding to a machine that is not there is as silent as a firewall.
        doubt = "; or the forwarding leads to a machine that is off" if named and nat else ""
        yield Cause(
            Code.FIREWALL_DROPPING,
            f"What is sent to {where}{how} is dropped without an answer: by a firewall on the way or on this "
            f"machine{doubt}.",
            f"Let TCP port {port} in, in this machine's firewall and in the router's or provider's.",
            problem=not reached,
        )
    elif outcome == "silent":
        yield Cause(
            Code.BEHIND_NAT,
            f"This node is behind a NAT that lets nobody in at {where}.",
            f"Nothing need be done where relays and hole punching work; forwarding TCP port {port} to this machine "
            "makes it faster for others.",
            problem=not (reached or helped),
        )


def _relays(steps: Sequence[Step]) -> Iterator[Cause]:
    if not any(step.facts["needed"] for step in _of(steps, Kind.RELAYS)):
        return
    helped = any(step.facts["held"] for step in _of(steps, Kind.RELAYS))
    state = next((step.facts["state"] for step in _of(steps, Kind.REACHABILITY)), "unknown")
    needed = state == "private" and not helped
    refused = [step for step in _of(steps, Kind.RELAY) if not step.facts["held"]]
    for step in refused:
        if step.facts["status"] in FULL:
            yield Cause(
                Code.RELAY_FULL,
                f"Relay {step.facts['relay']} is full: it takes no more reservations ({step.text}).",
                "Name another relay with `relays` in config.toml, or raise relay_reservations on that one.",
                problem=not helped,
            )
        else:
            yield Cause(
                Code.RELAY_UNREACHABLE,
                f"Relay {step.facts['relay']} cannot be used: {step.text}.",
                "Check that it runs, or name another relay with `relays` in config.toml.",
                problem=needed,
            )
    if needed and not refused:
        yield Cause(
            Code.NO_RELAY,
            "Nobody outside can connect to this node, and it knows no relay.",
            "Name one with `relays` in config.toml, or run a public node with --relay.",
        )


# A peer


def _of_peer(peer: str, steps: Sequence[Step]) -> Iterator[Cause]:
    for step in _of(steps, Kind.PEER_BAN):
        advice = "It ends by itself, or with a restart of this node; see the log for what the peer did."
        text = f"This node refuses to deal with peer {peer}: {step.text}."
        yield Cause(Code.PEER_BANNED, text, advice, exit_code=EXIT_TRUST, peer=peer)
    connects = _of(steps, Kind.PEER_CONNECT)
    connected = any(step.facts["path"] for step in connects)
    for step in _of(steps, Kind.PEER_PROTOCOLS):
        if step.mark is Mark.FAIL:
            yield Cause(
                Code.PROTOCOL_MISMATCH,
                f"The versions do not match: peer {peer} {step.text}.",
                "Run the same version of p2pnode on both sides; update the older one.",
                peer=peer,
            )
    if connected:
        yield from _of_circuits(peer, steps, connected)
        yield from _of_connected(peer, steps)
    elif connects:
        found = [*_of_circuits(peer, steps, connected), *_of_unreachable(peer, steps)]
        yield from found or [_unexplained(peer, connects[0])]


def _unexplained(peer: str, connect: Step) -> Cause:
    advice = "Try again: addresses may just be changing. The log of both nodes (--log-level info) says more."
    return Cause(Code.PEER_UNREACHABLE, f"Peer {peer} cannot be reached: {connect.text}.", advice, peer=peer)


def _of_circuits(peer: str, steps: Sequence[Step], connected: bool) -> Iterator[Cause]:
    for step in _of(steps, Kind.PEER_RELAY):
        relay = step.facts["relay"]
        if step.facts["outcome"] == "full":
            yield Cause(
                Code.RELAY_FULL,
                f"Relay {relay}, through which peer {peer} is reachable, is full: {step.text}.",
                "Try again later; raise relay_circuits or relay_circuits_per_peer on that relay, or have the peer use "
                "another one.",
                problem=not connected,
                peer=peer,
            )
        elif step.facts["outcome"] == "unreachable":
            yield Cause(
                Code.RELAY_UNREACHABLE,
                f"Relay {relay}, through which peer {peer} is said to be reachable, cannot be reached: {step.text}.",
                "The peer looks for another relay by itself; ask again in a minute.",
                problem=not connected,
                peer=peer,
            )


def _of_connected(peer: str, steps: Sequence[Step]) -> Iterator[Cause]:
    punched = any(step.facts.get("direct") for step in _of(steps, Kind.PEER_PUNCH))
    if any(step.facts["path"] == "relayed" for step in _of(steps, Kind.PEER_CONNECT)) and not punched:
        tried = "; ".join(step.text for step in _of(steps, Kind.PEER_PUNCH))
        yield Cause(
            Code.RELAYED_ONLY,
            f"Peer {peer} is reached through a relay only, which may be slow" + (f" ({tried})." if tried else "."),
            "Forwarding the port of one of the two nodes makes the connection direct.",
            problem=False,
            peer=peer,
        )
    for step in _dials(steps, "another-peer"):
        yield _another(peer, step, problem=False)


def _of_unreachable(peer: str, steps: Sequence[Step]) -> Iterator[Cause]:
    # Private addresses of other networks prove nothing, unless there is nothing else.
    dials = [step for step in _of(steps, Kind.PEER_DIAL) if not step.facts["elsewhere"]] or _of(steps, Kind.PEER_DIAL)
    relays = _of(steps, Kind.PEER_RELAY)
    lookups = _of(steps, Kind.PEER_LOOKUP)
    named = any(step.facts["named_by"] for step in lookups)
    if not dials and not relays:
        nobody = not any(step.facts["asked"] for step in lookups)
        where = "here, and there is nobody to ask" if nobody else "neither here nor in the DHT"
        yield Cause(
            Code.PEER_UNKNOWN,
            f"No address of peer {peer} is known {where}.",
            "Check the id; ask its owner for an address (`p2pnode status` prints them) and give it with /p2p/<id>.",
            exit_code=EXIT_NOT_FOUND,
            peer=peer,
        )
        return
    others = _dials(dials, "another-peer")
    for step in others:
        yield _another(peer, step, problem=True)
    foreign = _dials(dials, "foreign")
    for step in foreign:
        yield Cause(
            Code.WRONG_PORT_FORWARDED,
            f"At {step.facts['addr']} something answers that is no p2pnode: the port is forwarded to a wrong program "
            "or machine, or was given to another program.",
            "Have the peer's owner check the forwarding in its router; the peer's own `p2pnode doctor` shows it.",
            peer=peer,
        )
    silent = _dials(dials, "silent")
    if silent and (named or relays):
        yield Cause(
            Code.FIREWALL_DROPPING,
            f"Peer {peer} is known to others, but what this node sends to {_addrs(silent)} is dropped without an "
            "answer: a firewall on its side or on this one, or a NAT without a forwarded port.",
            "Let its port in, in the peer's firewall; check that this machine may connect to that port at all.",
            peer=peer,
        )
    gone = [step for step in dials if step.facts["outcome"] in ("refused", "silent", *_NEVER_THERE)]
    absent = [step for step in relays if step.facts["outcome"] == "absent"]
    full = any(step.facts["outcome"] == "full" for step in relays)
    if (gone or absent) and not others and not foreign and not full:
        refused = _dials(dials, "refused")
        why = []
        if refused:
            why.append(f"the machine at {_addrs(refused)} is up, but nothing listens there")
        if rest := [step for step in gone if step not in refused]:
            why.append(f"nothing answers at {_addrs(rest)}")
        if absent:
            why.append("it has left its relay")
        yield Cause(
            Code.PEER_GONE,
            f"Peer {peer} is gone: {', and '.join(why)}.",
            "Start it, or ask its owner; where it has moved, a new link or address is needed.",
            peer=peer,
        )


def _another(peer: str, step: Step, problem: bool) -> Cause:
    return Cause(
        Code.WRONG_PEER,
        f"At {step.facts['addr']} another node answers ({step.facts['answered']}) than peer {peer}: it was set up "
        "anew, or the address or forwarded port belongs to another machine now.",
        "Ask its owner for the present id and address.",
        problem=problem,
        peer=peer,
    )


def _dials(steps: Sequence[Step], outcome: str) -> list[Step]:
    return [step for step in _of(steps, Kind.PEER_DIAL) if step.facts["outcome"] == outcome]


def _addrs(steps: Sequence[Step]) -> str:
    return ", ".join(str(step.facts["addr"]) for step in steps[:4])


# An image


def _served(steps: Sequence[Step]) -> bool:
    """Whether all of the image is here or can be had."""
    if any(step.facts["complete"] for step in _of(steps, Kind.IMAGE_HERE)):
        return True
    return any(step.mark is Mark.OK for step in _of(steps, Kind.COVERAGE))


def _of_provider(peer: str, steps: Sequence[Step], found: Sequence[Cause], served: bool) -> Iterator[Cause]:
    """What is wrong with one provider is a problem only while the image cannot be had from others."""
    recorded = any(step.facts["recorded"] for step in _of(steps, Kind.PROVIDER))
    unreachable = any(step.facts["path"] is None for step in _of(steps, Kind.PEER_CONNECT))
    empty = any(step.facts["known"] is False for step in _of(steps, Kind.AVAILABILITY))
    advice = "Records expire within 30 minutes; another provider is needed, or this one must come back."
    if recorded and empty:
        text = f"The record that peer {peer} has the image is stale: it has nothing of it any more."
        yield Cause(Code.STALE_RECORD, text, advice, not served, EXIT_NOT_FOUND, peer)
    elif recorded and unreachable and any(cause.code in (Code.PEER_GONE, Code.WRONG_PEER) for cause in found):
        text = f"The record that peer {peer} has the image is stale: that peer cannot be reached any more."
        yield Cause(Code.STALE_RECORD, text, advice, not served, EXIT_NOT_FOUND, peer)
    for cause in found:
        yield Cause(cause.code, cause.text, cause.advice, cause.problem and not served, cause.exit_code, cause.peer)


def _of_image(steps: Sequence[Step], explained: bool, served: bool) -> Iterator[Cause]:
    providers = _of(steps, Kind.PROVIDERS)
    have = [step for step in _of(steps, Kind.AVAILABILITY) if step.facts["known"]]
    if served:
        return
    if not any(step.facts["found"] or step.facts["link"] for step in providers) and not have:
        nobody = not any(step.facts["asked"] for step in providers)
        if nobody:
            advice = (
                "This node knows nobody it could ask: run `p2pnode doctor` to see why, or use a link that names peers."
            )
        else:
            advice = "Check the id; provide the image again on a node that has it, or use a link that names that node."
        text = "Nobody is known to have the image" + (", and there is nobody to ask." if nobody else ".")
        yield Cause(Code.NO_PROVIDERS, text, advice, exit_code=EXIT_NOT_FOUND)
    elif not have and not explained:
        text = "None of the image's providers said what it has, though they can be reached."
        yield Cause(Code.PROVIDERS_SILENT, text, "They may be busy, or closing: try again in a minute.")
    for step in _of(steps, Kind.COVERAGE):
        if step.mark is Mark.FAIL:
            yield Cause(
                Code.INCOMPLETE,
                f"The peers that can be reached do not have the whole image: {step.text}.",
                "A fetch gets what there is and goes on when another provider comes; start one that has all of it.",
                exit_code=EXIT_NOT_FOUND,
            )

"""Who has an image, whether they can be reached, and how much of it each of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import trio

from p2pnode.diagnosis import lookup
from p2pnode.diagnosis.lookup import Named
from p2pnode.diagnosis.model import Kind, Mark
from p2pnode.diagnosis.peer import connect, dial_all, note_ban, note_protocols
from p2pnode.diagnosis.scene import Journal, Scene, Stopwatch, count, together
from p2pnode.errors import RemoteError
from p2pnode.net.addresses import parse
from p2pnode.swarm.inquiry import holdings
from protocols.announce.messages import MAX_TTL
from protocols.cid import CID
from protocols.exchange import PROTOCOL_ID
from protocols.exchange.messages import Availability

MAX_PROVIDERS = 16  # that are asked
ANSWER_TIMEOUT = 10.0  # s for what a peer has

_Bits = int  # of an AVAILABILITY, as one number


async def examine_image(scene: Scene, journal: Journal, root: CID, linked: Sequence[str]) -> None:
    """All steps about image `root`; `linked` are the addresses in the link, each with /p2p/<id>."""
    await _here(scene, journal, root)
    journal.doing("looking the image up in the DHT")
    trace = await lookup.find_providers(scene.router, scene.network.peer_id, root.to_bytes())
    addrs: dict[str, list[str]] = {}
    for text in linked:
        if (peer := parse(text).peer) is not None and peer != scene.network.peer_id:
            addrs.setdefault(peer, []).append(text)
    in_link = len(addrs)
    for peer, named in trace.named.items():
        addrs.setdefault(peer, []).extend(named.addrs)
        scene.network.address_book.heard(peer, named.addrs)
    asked = f"asked {trace.asked}, {len(trace.answered)} answered" if trace.asked else "nobody to ask"
    text = f"{count(len(trace.named), 'provider')} recorded in the DHT ({asked}), {in_link} in the link"
    mark = Mark.OK if addrs else Mark.FAIL
    journal.note(
        Kind.PROVIDERS,
        mark,
        text,
        seconds=trace.seconds,
        found=len(trace.named),
        link=in_link,
        asked=trace.asked,
        answered=len(trace.answered),
    )
    silent = [
        peer
        for peer in scene.network.connections_book.peers()
        if peer not in addrs and scene.network.speaks(peer, PROTOCOL_ID)
    ]

    async def one(peer: str, quiet: bool) -> tuple[Journal, Availability | None]:
        part = journal.part()
        if not quiet:
            _note_provider(part, peer, trace.named, in_link=peer in linked_peers)
        return part, await _provider(scene, part, peer, addrs.get(peer, ()), root, quiet)

    linked_peers = {parse(text).peer for text in linked}
    journal.doing("asking the providers")
    jobs = [(peer, False) for peer in list(addrs)[:MAX_PROVIDERS]] + [(peer, True) for peer in silent[:MAX_PROVIDERS]]
    answers = []
    for part, answer in await together([partial(one, *job) for job in jobs]):
        journal.take(part)
        if answer is not None:
            answers.append(answer)
    _coverage(journal, answers)


async def _here(scene: Scene, journal: Journal, root: CID) -> None:
    records = await trio.to_thread.run_sync(scene.store.find, str(root))
    record = next((each for each in records if each.id == root), None)
    if record is None:
        journal.note(Kind.IMAGE_HERE, Mark.OK, "nothing of it is on this node", complete=False, held=0)
        return
    state = "complete" if record.complete else "incomplete"
    text = f"{state} on this node: {record.held_chunks} of {record.chunks} chunks"
    journal.note(Kind.IMAGE_HERE, Mark.OK, text, complete=record.complete, held=record.held_chunks)


def _note_provider(journal: Journal, peer: str, recorded: Mapping[str, Named], in_link: bool) -> None:
    named = recorded.get(peer)
    words = ["in the link"] if in_link else []
    if named is not None:
        age = (
            f"{named.age:.0f} s old" if named.age is not None else f"at most {MAX_TTL // 60} min old, when they expire"
        )
        words.append(f"recorded by {'this node' if not named.by else count(named.by, 'other peer')} ({age})")
    journal.note(
        Kind.PROVIDER,
        Mark.OK,
        f"{peer}: {', '.join(words)}",
        peer=peer,
        recorded=named is not None,
        link=in_link,
        named_by=0 if named is None else named.by,
        age=None if named is None or named.age is None else round(named.age),
    )


async def _provider(
    scene: Scene, journal: Journal, peer: str, addrs: Sequence[str], root: CID, quiet: bool
) -> Availability | None:
    """Connect to one provider and ask it. `quiet`: it is only a peer that may have something; say so if it has."""
    if note_ban(scene, journal, peer):
        return None
    asked = journal.part() if quiet else journal
    if not quiet:
        if not await connect(scene, journal, peer, addrs):
            await dial_all(scene, journal, peer, addrs)
            return None
        if not await note_protocols(scene, journal, peer):
            return None
    watch = Stopwatch()
    answer: Availability | None = None
    why = f"did not say what it has within {ANSWER_TIMEOUT:.0f} s"
    with trio.move_on_after(ANSWER_TIMEOUT):
        try:
            answer = await holdings(scene.exchange, peer, root)
        except RemoteError as exc:
            why = str(exc)
    if answer is None:
        asked.note(Kind.AVAILABILITY, Mark.FAIL, why, seconds=watch.seconds, peer=peer, known=None, held=0, chunks=0)
        return None
    known = answer.count > 0 or answer.bits is not None
    held = _held(answer).bit_count() if known else 0
    text = f"has {held} of {answer.count} chunks" if known else "has nothing of it, not even the manifest"
    if quiet and known:
        journal.note(Kind.PROVIDER, Mark.OK, f"{peer}: connected", peer=peer, recorded=False, link=False, named_by=0)
    journal_or_none = journal if known or not quiet else asked
    journal_or_none.note(
        Kind.AVAILABILITY,
        Mark.OK if known and held == answer.count else Mark.WARN,
        text,
        seconds=watch.seconds,
        peer=peer,
        known=known,
        held=held,
        chunks=answer.count,
    )
    return answer if known else None


def _held(answer: Availability) -> _Bits:
    """The bit field as one number, whose lowest bits are padding."""
    return (
        int.from_bytes(answer.bits, "big")
        if answer.bits is not None
        else ((1 << answer.count) - 1) << (-answer.count % 8)
    )


def _coverage(journal: Journal, answers: Sequence[Availability]) -> None:
    """What all that answered have together."""
    if not answers:
        return
    chunks = max(answer.count for answer in answers)
    together_held = 0
    for answer in answers:
        if answer.count == chunks:  # who says another number has, or claims, another image
            together_held |= _held(answer)
    reachable = together_held.bit_count()
    complete = sum(_held(answer).bit_count() == chunks for answer in answers)
    text = f"{reachable} of {chunks} chunks can be had from {count(len(answers), 'peer')}, {complete} with all"
    journal.note(Kind.COVERAGE, Mark.OK if reachable == chunks else Mark.FAIL, text, chunks=chunks, reachable=reachable)

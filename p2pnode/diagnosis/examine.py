"""From what the user asked about to a report."""

from __future__ import annotations

import trio

from p2pnode import link, local
from p2pnode.diagnosis.causes import causes
from p2pnode.diagnosis.image import examine_image
from p2pnode.diagnosis.itself import examine_itself
from p2pnode.diagnosis.model import Report
from p2pnode.diagnosis.peer import examine_peer
from p2pnode.diagnosis.scene import Journal, Scene, Stopwatch
from p2pnode.errors import UsageError
from p2pnode.net.addresses import check_peer_id, parse
from p2pnode.progress import Report as Reporter


async def examine(scene: Scene, target: str | None, report: Reporter) -> Report:
    """Look at this node (`target` None), a peer (its id, or an address that ends in /p2p/<id>) or an image (its id, a
    link, or the name of one that is here). Takes a minute at most. Raises `UsageError`, `NotFound`."""
    watch, journal = Stopwatch(), Journal(report)
    if target is None:
        about = "self"
        await examine_itself(scene, journal)
    elif (given := as_peer(target)) is not None:
        about, addrs = given
        if about == scene.network.peer_id:
            raise UsageError(f"{about} is this node itself; run `p2pnode doctor` without an argument")
        await examine_peer(scene, journal, about, addrs)
    else:
        wanted = await _as_image(scene, target)
        about = str(wanted.image)
        await examine_image(scene, journal, wanted.image, wanted.peers)
    return Report(about, tuple(journal.steps), tuple(causes(journal.steps)), watch.seconds)


def as_peer(target: str) -> tuple[str, list[str]] | None:
    """The peer id and addresses that `target` stands for; None if it names an image. Raises `UsageError`."""
    target = target.strip()
    if target.startswith("/p2p/"):
        return check_peer_id(target.removeprefix("/p2p/")), []
    if target.startswith("/"):
        address = parse(target)
        if address.peer is None:
            raise UsageError(f"the address {target} lacks /p2p/<peer id> at its end, so nobody could be recognised")
        return address.peer, [target]
    if target.startswith(link.SCHEME):
        return None
    try:
        return check_peer_id(target), []
    except UsageError:
        return None


async def _as_image(scene: Scene, target: str) -> link.Link:
    try:
        return link.parse(target)
    except UsageError:
        if target.startswith(link.SCHEME):
            raise
    return link.Link((await trio.to_thread.run_sync(local.find, scene.store, target)).id)

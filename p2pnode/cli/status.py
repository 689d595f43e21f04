"""`p2pnode status`: how the node is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from p2pnode.cli import text
from p2pnode.cli.app import App, pass_app

if TYPE_CHECKING:
    from p2pnode.config import Config
    from p2pnode.store import Store

MAX_MIRRORS = 10  # things that are told of; `p2pnode mirror` tells of all


@click.command(short_help="Show how the node and its store are.")
@pass_app
def status(app: App) -> None:
    """Show how the node and its store are, and what is wrong with the originals they point to.

    \b
    Examples:
      p2pnode status
      p2pnode --json status | jq .problems
    """
    config = app.load()
    for row in app.ask(config, "status", {}, lambda store, _: [_without_node(config, store)]):
        app.emit(row, _human)


def _without_node(config: Config, store: Store) -> dict[str, Any]:
    from p2pnode import __version__, local

    return {
        "running": False,
        "version": __version__,
        "home": str(config.home),
        "store": local.statistics(store.stats()),
        "mirrors": local.mirror_states(store),
        "problems": [local.problem(each) for each in store.problems()],
    }


def _human(row: dict[str, Any]) -> str:
    store = row["store"]
    pairs = [("home", row["home"]), ("version", row["version"])]
    if "peer_id" in row:
        pairs += [("peer id", row["peer_id"]), *(("address", addr) for addr in row["addrs"])]
        pairs += [("up for", text.duration(row["uptime"])), ("peers", str(row["peers"]))]
        pairs += _reachability(row["reachability"])
        pairs += _gateway(row.get("gateway"))
        pairs += [("fetching", image) for image in row.get("fetching", ())]
        pairs += [("banned", f"{peer}, for {left} s more") for peer, left in row.get("banned", {}).items()]
    else:
        pairs.append(("node", "not running; start it with `p2pnode run`"))
    incomplete = store["images"] - store["complete_images"]
    pairs += [
        ("images", f"{store['images']}" + (f" ({incomplete} incomplete)" if incomplete else "")),
        ("in the store", text.size(store["owned_bytes"])),
        ("in your files", text.size(store["referenced_bytes"])),
        ("free on disk", text.size(store["free_bytes"])),
    ]
    pairs += _mirrors(row.get("mirrors", []))
    pairs += [("problem", f"{each['path']}: {each['reason']}") for each in row["problems"]]
    return text.fields(pairs)


def _reachability(row: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [("reachable", f"{row['state']}: {row['reason']}")]
    pairs += [("through relay", relay) for relay in row["relays"]]
    if row["waiting_for_relay"]:
        pairs.append(("through relay", "none is left, so nobody outside can connect until one returns"))
    pairs += [("relay failed", why) for why in row["relay_failures"].values()]
    if (serving := row.get("serving")) is not None:
        pairs.append(("relay for", f"{serving['reservations']} nodes, {serving['circuits']} connections"))
    return pairs


def _mirrors(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Those with a problem first: of many, not all are told."""
    pairs = []
    for row in sorted(rows, key=lambda row: row["problem"] is None)[:MAX_MIRRORS]:
        if row["kind"] == "image":
            told = "complete" if row["complete_images"] else "not complete"
        elif row["images"]:
            told = f"{row['complete_images']} of {row['images']} images complete"
        else:
            told = "no images" if row["looked"] is not None else "not looked at yet"
        problem = f"; {row['problem']}" if row["problem"] else ""
        pairs.append(("mirrors", f"{row['name'] or row['mirror']}: {told}{problem}"))
    if len(rows) > MAX_MIRRORS:
        pairs.append(("mirrors", f"and {len(rows) - MAX_MIRRORS} more; `p2pnode mirror` lists them"))
    return pairs


def _gateway(row: dict[str, Any] | None) -> list[tuple[str, str]]:
    if row is None:
        return []
    found, missed = row["narinfo_hits"], row["narinfo_misses"]
    pairs = [("gateway", url) for url in row["urls"]]
    pairs.append(("Nix asked", f"{row['requests']} times: {found} paths found, {missed} not"))
    got = [
        f"{row[name]['nars']} {words} ({text.size(row[name]['bytes'])})"
        for name, words in (("store", "from the store"), ("swarm", "from the swarm"), ("upstream", "from upstream"))
        if row[name]["nars"]
    ]
    told = f"{row['nars']} NAR{'s' if row['nars'] != 1 else ''}, {text.size(row['bytes'])}"
    told += f": {', '.join(got)}" if got else ""
    if row["in_progress"]:
        told += f"; {row['in_progress']} of them going on"
    if row["nar_misses"]:
        told += f"; {row['nar_misses']} could not be had"
    pairs.append(("Nix got", told))
    return pairs

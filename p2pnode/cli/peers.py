"""`p2pnode peers`: who the daemon is connected to."""

from __future__ import annotations

from typing import Any

import click

from p2pnode.cli import text
from p2pnode.cli.app import App, pass_app
from p2pnode.failures import CommandFailed, Failure
from p2pnode.progress import silent


@click.command(short_help="List the peers the daemon is connected to.")
@pass_app
def peers(app: App) -> None:
    """List the peers the daemon is connected to. Needs `p2pnode run` on the same home.

    \b
    Examples:
      p2pnode peers
      p2pnode --json peers | jq -r .peer
    """
    config = app.load()
    daemon = app.daemon(config)
    if daemon is None:
        message = f"no node is running on {config.home}, so there are no peers; start one with `p2pnode run`"
        raise CommandFailed(Failure("NotRunning", message, 3))
    app.emit_all(daemon.call("peers", {}, silent), _human)


def _human(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "not connected to any peer; give one with --bootstrap when starting `p2pnode run`"
    return text.table(
        ("PEER", "ADDRESS", "DIR", "RTT", "FOR", "RECEIVED", "SENT"),
        [
            (
                row["peer"],
                row["addr"],
                f"{row['direction']}{' via relay' if row['relayed'] else ''}",
                "-" if row["rtt"] is None else f"{1000 * row['rtt']:.1f} ms",
                text.duration(row["seconds"]),
                text.size(row["received_bytes"]),
                text.size(row["sent_bytes"]),
            )
            for row in rows
        ],
        right=(3, 4, 5, 6),
    )

"""`p2pnode doctor`: why is it slow, or not found?"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from p2pnode.cli import display, options, text
from p2pnode.cli.app import App, own_port, pass_app
from p2pnode.errors import NotListening

if TYPE_CHECKING:
    from p2pnode.config import Config
    from p2pnode.node import Node
    from p2pnode.progress import Report

WIDTH = 100
_MARK = 4  # columns


@click.command(short_help="Find out why something is slow or not found.")
@click.argument("target", required=False, metavar="[PEER|IMAGE]")
@options.network
@pass_app
def doctor(app: App, target: str | None, listen: tuple[str, ...], bootstrap: tuple[str, ...], no_mdns: bool) -> int:
    """Find out why something is slow or not found: try each step, and name likely causes and what to do.

    Without an argument, this node: can others connect to it, and it to them? With a peer (its id, or an address that
    ends in /p2p/ID): each step of finding it and connecting to it. With an image (its id, or a link): who has it, and
    can they be reached?

    The exit code is 0 when no problem was found, and else that of the likeliest cause.

    \b
    Examples:
      p2pnode doctor
      p2pnode doctor 12D3KooW...
      p2pnode doctor 'p2pnode:...'
      p2pnode --json doctor | jq '.causes[].code'
    """
    config = app.load(listen=listen, bootstrap=bootstrap, mdns=False if no_mdns else None)
    daemon = app.daemon(config, listen=listen, bootstrap=bootstrap)
    with display.progress(app.quiet) as report:
        if daemon is not None:
            [row] = daemon.call("doctor", {"target": target}, report)
        else:
            row = _embedded(app, config, target, report)
    app.emit(row, _human)
    return int(row["exit_code"])


def _embedded(app: App, config: Config, target: str | None, report: Report) -> dict[str, Any]:
    async def examine(node: Node) -> dict[str, Any]:
        return await node.doctor(target, report)

    try:  # at the port that the daemon would have: what is forwarded or open is that one
        return app.run_node(config, examine, serving=False)
    except NotListening:
        return app.run_node(own_port(config), examine, serving=False)


def _human(row: dict[str, Any]) -> str:
    lines = []
    for step in row["steps"]:
        took = "" if step["ms"] is None else f"{step['ms']:,.0f} ms"
        about = step["step"].removeprefix("peer-")
        lines.append(f"{step['mark'].ljust(_MARK)}  {took.rjust(9)}  {about.ljust(12)}  {text.safe(step['text'])}")
    lines.append("")
    problems = [cause for cause in row["causes"] if cause["problem"]]
    others = [cause for cause in row["causes"] if not cause["problem"]]
    if not problems:
        lines.append("No problem was found." if not others else "No problem was found; worth knowing:")
    elif len(problems) == 1:
        lines.append("The likely cause:")
    else:
        lines.append("The likely causes:")
    for cause in (*problems, *others):
        lines += _paragraph(f"{cause['text']} [{cause['code']}]", "  * ")
        lines += _paragraph(cause["advice"], "    ")
    return "\n".join(lines)


def _paragraph(words: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text.safe(words),
        WIDTH,
        initial_indent=indent,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )

"""`p2pnode mirror`: complete, pinned copies of what others provide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from p2pnode import link
from p2pnode.cli import display, options, text
from p2pnode.cli.app import App, own_port, pass_app
from p2pnode.errors import UsageError
from p2pnode.failures import Failure

if TYPE_CHECKING:
    from p2pnode.config import Config
    from p2pnode.progress import Report
    from p2pnode.store import Store

MAX_THINGS = 64


@click.command(short_help="Keep complete, pinned copies of images, or of all that a node publishes.")
@click.argument("things", metavar="[IMAGE|LINK|PUBLISHER]...", nargs=-1)
@click.option("--stop", is_flag=True, help="Mirror these no longer; what was fetched stays, unpinned.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=30 * 86400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Give an image up after so long without any progress.",
)
@options.network
@pass_app
def mirror(
    app: App,
    things: tuple[str, ...],
    stop: bool,
    timeout: float,
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
    no_mdns: bool,
) -> int:
    """Keep complete, pinned copies of images in this node's store, with all signatures, and serve them.

    PUBLISHER is the peer id, or an address with /p2p/ID, of a node that runs with --publish: everything it provides is
    mirrored. `p2pnode run` looks again at what is mirrored every few minutes, gets what is new and mends what is
    missing; what a publisher has removed is kept. Without arguments: what is mirrored.

    When interrupted, run the same command again: nothing is transferred twice.

    \b
    Examples:
      p2pnode mirror 'p2pnode:bafyr...?peer=/ip4/192.0.2.7/tcp/4747/p2p/12D3KooW...'
      p2pnode mirror /ip4/192.0.2.7/tcp/4747/p2p/12D3KooW...
      p2pnode mirror                       what is mirrored, and how it is
      p2pnode mirror --stop 12D3KooW...
    """
    config = app.load(listen=listen, bootstrap=bootstrap, mdns=False if no_mdns else None)
    if len(things) > MAX_THINGS:
        raise UsageError(f"at most {MAX_THINGS} things can be named at once")
    if stop:
        if not things:
            raise UsageError("--stop needs to know what; `p2pnode mirror` lists what is mirrored")
        return _stop(app, config, things)
    if not things:
        from p2pnode import local

        app.emit_all(app.ask(config, "mirrors", {}, lambda store, _: local.mirrors(store)), _human_list)
        return 0
    for thing in things:  # here too, before libp2p is imported or a daemon asked
        link.parse_thing(thing)
    return _mirror(app, config, things, timeout, listen, bootstrap)


def _mirror(
    app: App,
    config: Config,
    things: tuple[str, ...],
    timeout: float,
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
) -> int:
    daemon = app.daemon(config, listen=listen, bootstrap=bootstrap)
    with display.progress(app.quiet) as report:
        if daemon is not None:
            results = list(daemon.call("mirror", {"things": list(things), "timeout": timeout}, report))
        else:
            results = app.run_node(
                own_port(config), lambda node: node.mirror(things, timeout=timeout, report=report), serving=False
            )
    for result in results:
        if "error" not in result or app.as_json:
            app.emit(result, _human)
        else:
            app.fail(Failure(result["error"], _problem(result), result["exit_code"]))
    if not results and not app.as_json:
        app.emit({}, lambda _: "nothing is published there yet; it is remembered, and `p2pnode run` looks again")
    return next((result["exit_code"] for result in results if "error" in result), 0)


def _stop(app: App, config: Config, things: tuple[str, ...]) -> int:
    for thing in things:

        def embedded(store: Store, _report: Report, thing: str = thing) -> list[dict[str, Any]]:
            from p2pnode import local

            return [local.stop_mirror(store, thing)]

        for row in app.ask(config, "stop_mirror", {"thing": thing}, embedded):
            app.emit(row, lambda row: text.safe(f"{row['name'] or row['mirror']} is mirrored no longer"))
    return 0


def _problem(result: dict[str, Any]) -> str:
    """A message about a publisher names it; one about one of several images need not."""
    return f"{result['image']}: {result['message']}" if "image" in result else str(result["message"])


def _human(result: dict[str, Any]) -> str:
    received = result["received_bytes"]
    news = (
        f"{text.size(received)} received in {text.duration(result['seconds'])}" if received else "nothing was missing"
    )
    return text.safe(f"{result['image']}: {text.size(result['bytes'])}, verified and pinned, {news}")


def _human_list(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "nothing is mirrored; begin with `p2pnode mirror LINK` or `p2pnode mirror ADDRESS`"
    table = text.table(
        ("MIRROR", "NAME", "IMAGES", "SIZE", "HERE", "LAST LOOK"),
        [
            (
                row["mirror"],
                row["name"] or "-",
                f"{sum(each['complete'] for each in row['images'])} of {len(row['images'])}",
                text.size(row["bytes"]),
                "all" if row["complete"] else text.size(row["held_bytes"]),
                "-" if row["looked"] is None else text.moment(row["looked"]),
            )
            for row in rows
        ],
        right=(2, 3, 4),
    )
    problems = [text.safe(f"{row['name'] or row['mirror']}: {row['problem']}") for row in rows if row["problem"]]
    return "\n".join([table, *problems])

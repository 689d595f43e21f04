"""`p2pnode fetch`: get an image."""

from __future__ import annotations

from typing import Any

import click

from p2pnode import link
from p2pnode.cli import display, options, text
from p2pnode.cli.app import App, absolute, own_port, pass_app
from p2pnode.errors import OutputExists, UsageError
from p2pnode.net import addresses


@click.command(short_help="Get an image, verified, from whoever has it.")
@click.argument("image", metavar="IMAGE|LINK")
@click.option("-o", "--out", metavar="OUT", help="Where to put it; without, it is only kept in the store.")
@click.option("--into-store", is_flag=True, help="Put the store paths into the Nix store; those valid there are kept.")
@click.option("--add-root", metavar="LINK", help="With --into-store: make LINK a root for the garbage collector.")
@click.option("--to-cache", metavar="DIR", help="Put the store paths into a binary cache that any Nix can read.")
@options.sign_keys("With --to-cache: sign every store path there with this secret key.")
@options.require_signatures(
    "By default into the Nix store if Nix requires it, elsewhere if p2pnode has a key of its own (trusted_public_keys, "
    "--trusted-key)."
)
@options.trusted_keys
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--keep-chunks", is_flag=True, help="Keep the store's own copy beside OUT.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=30 * 86400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up after so long without any progress.",
)
@click.option(
    "--peer", "peers", multiple=True, metavar="ADDR", help="Multiaddress with /p2p/ID of a peer that may have it."
)
@options.network
@pass_app
def fetch(
    app: App,
    image: str,
    out: str | None,
    into_store: bool,
    add_root: str | None,
    to_cache: str | None,
    sign_keys: tuple[str, ...],
    require_signatures: str | None,
    trusted_keys: tuple[str, ...],
    force: bool,
    keep_chunks: bool,
    timeout: float,
    peers: tuple[str, ...],
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
    no_mdns: bool,
) -> None:
    """Get an image, verified, from whoever has it; what is here already is not fetched again.

    OUT appears under its name only when everything was verified. When interrupted, run the same command again: it goes
    on from where it was.

    \b
    Examples:
      p2pnode fetch 'p2pnode:bafyr...?peer=/ip4/192.0.2.7/tcp/4747/p2p/12D3KooW...' -o disk.img
      p2pnode fetch 'p2pnode:bafyr...' --into-store --add-root ./result
      p2pnode fetch bafyr... --peer /ip4/192.0.2.7/tcp/4747/p2p/12D3KooW...
    """
    config = app.load(listen=listen, bootstrap=bootstrap, mdns=False if no_mdns else None)
    # Checked here too, before libp2p is imported or a daemon asked: a mistyped link is told at once.
    link.parse(image)
    for peer in peers:
        if addresses.parse(peer).peer is None:
            raise UsageError(f"the peer address {peer!r} does not end in /p2p/<peer id>")
    if len(peers) > link.MAX_PEERS:
        raise UsageError(f"--peer can be given at most {link.MAX_PEERS} times")
    if sum((out is not None, into_store, to_cache is not None)) > 1:
        raise UsageError("give one of -o, --into-store and --to-cache")
    if add_root is not None and not into_store:
        raise UsageError("--add-root keeps what --into-store puts there; give that too")
    if sign_keys and to_cache is None:
        raise UsageError("--sign-key signs what --to-cache writes; give that too")
    target = None if out is None else absolute(out)
    if target is not None and not force:
        check_absent(target)
    args: dict[str, Any] = {
        "out": target,
        "force": force,
        "keep_chunks": keep_chunks,
        "timeout": timeout,
        "peers": list(peers),
        "into_store": into_store,
        "add_root": None if add_root is None else absolute(add_root),
        "to_cache": None if to_cache is None else absolute(to_cache),
        "sign_keys": [absolute(path) for path in sign_keys],
        "require_signatures": require_signatures,
        "trusted_keys": list(trusted_keys),
    }
    daemon = app.daemon(config, listen=listen, bootstrap=bootstrap)
    with display.progress(app.quiet) as report:
        if daemon is not None:
            results = list(daemon.call("fetch", {"spec": image, **args}, report))
        else:
            results = [
                app.run_node(own_port(config), lambda node: node.fetch(image, **args, report=report), serving=False)
            ]
    for result in results:
        app.emit(result, _human)


def check_absent(target: str) -> None:
    """Raise `OutputExists` if something is at `target`; the exporter decides in the end, this only tells early."""
    import os
    import stat

    try:
        mode = os.lstat(target).st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode) and not os.listdir(target):
        return  # a closure may be put into an empty directory; the exporter knows which kind it is
    raise OutputExists(f"{target} exists already; give another -o, or --force to replace it")


def _human(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    received = result["received_bytes"]
    rate = f", {text.size(received / seconds)}/s" if seconds > 0 and received else ""
    lines = [f"{result['path'] or result['image']}: {text.size(result['bytes'])}, verified"]
    lines.append(f"  {text.size(received)} received in {text.duration(seconds)}{rate}")
    lines += [
        f"  {text.size(count)} from {peer}" for peer, count in sorted(result["from"].items(), key=lambda item: -item[1])
    ]
    for place, name in (("store", "the Nix store"), ("cache", "the cache")):
        if place in result:
            said = result[place]
            lines.append(f"  {said['added']} paths added to {name}, {said['present']} were there")
    lines += [f"  banned for sending bad data: {peer}" for peer in result["banned"]]
    return "\n".join("  " * line.startswith("  ") + text.safe(line) for line in lines)

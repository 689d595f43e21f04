"""`p2pnode cache`: what has to do with binary caches of Nix."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from p2pnode.cli import display, options, text
from p2pnode.cli.app import App, absolute, own_port, pass_app, start_logging, write
from p2pnode.cli.interrupts import EXIT_INTERRUPTED, Interrupted
from p2pnode.cli.provide import provided
from p2pnode.errors import (
    EXIT_NETWORK,
    EXIT_NOT_FOUND,
    EXIT_STORE,
    EXIT_TRUST,
    EXIT_USAGE,
    EXIT_VERIFY,
    PathError,
    UsageError,
)
from p2pnode.failures import Failure

if TYPE_CHECKING:
    from p2pnode.config import Config
    from p2pnode.node import Node

_WORST = (EXIT_TRUST, EXIT_VERIFY, EXIT_STORE, EXIT_NETWORK, EXIT_NOT_FOUND, EXIT_USAGE)
"""Of several faults the first of these is the exit code."""


@click.group(short_help="Put binary caches of Nix into the swarm.")
def cache() -> None:
    """Put binary caches of Nix into the swarm.

    \b
    Examples:
      p2pnode cache publish /srv/cache
    """


@cache.command(short_help="Put what a binary cache holds into the swarm.")
@click.argument("source", metavar="DIR|URL")
@click.option(
    "--path",
    "paths",
    metavar="STOREPATH",
    multiple=True,
    help="Only this path, or the one with this hash part, and all that it refers to, as one image. Repeatable.",
)
@click.option("--name", help="A name for the image of the one --path, by default the path's own.")
@click.option("--no-serve", is_flag=True, help="Only take it into the catalog; do not serve it now.")
@options.sign_keys(
    "Sign every store path with this secret key too, as nix-store --generate-binary-cache-key makes them."
)
@options.require_signatures(
    "By default if p2pnode has a key of its own (trusted_public_keys, --trusted-key); never in a directory that "
    "--sign-key signs."
)
@options.trusted_keys
@options.network
@pass_app
def publish(
    app: App,
    source: str,
    paths: tuple[str, ...],
    name: str | None,
    no_serve: bool,
    sign_keys: tuple[str, ...],
    require_signatures: str | None,
    trusted_keys: tuple[str, ...],
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
    no_mdns: bool,
) -> int:
    """Put what a binary cache holds into the swarm, with its signatures: each store path as an image.

    A directory, also as file:///DIR, is published whole; from http:// and https:// what --path names. NARs that lie
    uncompressed in a directory are served from there, others are unpacked into the store. What is here already is not
    read again, so the command may be repeated, after an interruption or when the cache has grown. What does not verify
    is told in a line each and left out; the exit code then is 4, or 7 for what is not trusted.

    \b
    Examples:
      p2pnode cache publish /srv/cache
      p2pnode cache publish https://cache.example.org --path /nix/store/...-nixos-system-web
      p2pnode --json cache publish --no-serve /srv/cache | jq -r .link
    """
    config = app.load(listen=listen, bootstrap=bootstrap, mdns=False if no_mdns else None)
    roots = [_root(path) for path in paths]
    args: dict[str, Any] = {
        "cache": source if "://" in source else absolute(source),
        "paths": roots,
        "name": name,
        "sign_keys": [absolute(path) for path in sign_keys],
        "require_signatures": require_signatures,
        "trusted_keys": list(trusted_keys),
    }
    from p2pnode.images.publish import parse_cache, parse_root

    parse_cache(args["cache"], [parse_root(root) for root in roots], name)  # a mistake is told before anything starts
    daemon = app.daemon(config, listen=listen, bootstrap=bootstrap)
    if daemon is None and args["cache"].startswith("/") and not os.path.isdir(args["cache"]):
        raise PathError(f"{args['cache']} is not a directory")
    listing = _Listing(app, whole=not roots)
    if daemon is not None:
        with display.progress(app.quiet) as report:
            for result in daemon.call("publish", args, report):
                listing.tell(result)
    elif no_serve:
        _import_only(app, config, args, listing)
    else:
        try:
            app.run_node(own_port(config), lambda node: _serve(app, node, args, listing), serving=True)
        except Interrupted as end:
            if end.exit_code in (0, EXIT_INTERRUPTED) and listing.finished and listing.exit_code:
                return listing.exit_code
            raise
    listing.finish()
    return listing.exit_code


class _Listing:
    """Prints results as they come. `exit_code`: of the worst fault so far; `whole`: nothing was asked for by name."""

    def __init__(self, app: App, *, whole: bool) -> None:
        self._app = app
        self._whole = whole
        self._codes: set[int] = set()
        self._images = self._bytes = self._new_bytes = self._failed = 0
        self.finished = False

    @property
    def exit_code(self) -> int:
        return next((code for code in _WORST if code in self._codes), max(self._codes, default=0))

    @property
    def images(self) -> int:
        return self._images

    def tell(self, result: dict[str, Any]) -> None:
        if "error" in result:
            self._failed += 1
            self._codes.add(result["exit_code"])
            if self._app.as_json:
                write(json.dumps(result, ensure_ascii=True))
            else:
                self._app.fail(Failure(result["error"], result["message"], result["exit_code"]))
        elif "warning" in result:
            if self._app.as_json:
                write(json.dumps(result, ensure_ascii=True))
            else:
                click.echo(text.safe(f"p2pnode: warning: {result['path']}: {result['warning']}"), err=True)
        else:
            self._images += 1
            self._bytes += result["bytes"]
            self._new_bytes += result["new_bytes"]
            if self._app.as_json or not self._whole:
                self._app.emit(result, provided)

    def finish(self) -> None:
        """Say how much it was, where there were too many images to name each."""
        if self.finished:
            return
        self.finished = True
        if self._whole and not self._app.as_json:
            paths = f"{self._images} store path{'' if self._images == 1 else 's'}"
            line = f"{paths} published, {text.size(self._bytes)}, of which {text.size(self._new_bytes)} were new"
            write(line + (f"; {self._failed} could not be" if self._failed else ""))


async def _serve(app: App, node: Node, args: dict[str, Any], listing: _Listing) -> None:
    import trio

    async def tell(result: dict[str, Any]) -> None:
        listing.tell(result)

    with display.progress(app.quiet) as report:
        await node.publish(**args, tell=tell, report=report)
    listing.finish()
    if not listing.images:
        return  # there is nothing to serve
    if not (app.as_json or app.quiet):
        click.echo("serving until Ctrl-C", err=True)
    await trio.sleep_forever()


def _import_only(app: App, config: Config, args: dict[str, Any], listing: _Listing) -> None:
    """Publish with no network at all; the links name no peers."""
    from p2pnode import local
    from p2pnode.home import lock
    from p2pnode.store import Store

    start_logging(config)
    with lock(config.home), Store.open(config.home) as store, display.progress(app.quiet) as report:
        local.publish(store, config, **args, report=report, tell=listing.tell)


def _root(path: str) -> str:
    """What --path names; a link into the store, such as ./result, is followed."""
    from p2pnode.nix.storepath import STORE_DIR

    if "/" in path and not path.startswith(STORE_DIR + "/"):
        target = os.path.realpath(path)
        if not target.startswith(STORE_DIR + "/"):
            raise UsageError(f"--path {path} is neither a store path nor a link to one")
        return target
    return path.rstrip("/")

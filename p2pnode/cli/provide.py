"""`p2pnode provide`: put paths into the swarm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from p2pnode.cli import display, options, text
from p2pnode.cli.app import App, absolute, own_port, pass_app, start_logging
from p2pnode.errors import PathError, StreamClosed, UsageError

if TYPE_CHECKING:
    from p2pnode.config import Config
    from p2pnode.node import Node

KINDS = ("file", "directory", "store-path", "closure")


@click.command(short_help="Put files, directories, store paths or closures into the swarm.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(KINDS), help="What to make of it; by default what the path looks like.")
@click.option("--name", help="A name for the image, by default the path's last part. For one PATH only.")
@click.option("--no-serve", is_flag=True, help="Only take it into the catalog; do not serve it now.")
@click.option("--nix-store", metavar="DIR", help="Root of a chroot store: the paths lie in DIR/nix/store.")
@options.sign_keys("Sign every store path with this secret key, as nix-store --generate-binary-cache-key makes them.")
@options.network
@pass_app
def provide(
    app: App,
    paths: tuple[str, ...],
    kind: str | None,
    name: str | None,
    no_serve: bool,
    nix_store: str | None,
    sign_keys: tuple[str, ...],
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
    no_mdns: bool,
) -> None:
    """Put files, directories, store paths or closures into the swarm, and print a link to each.

    Nothing is copied: the catalog points into the original, so leave it where it is. With `p2pnode run` on the same
    home this returns at once; without, it serves until Ctrl-C.

    \b
    Examples:
      p2pnode provide disk.img
      p2pnode provide --kind closure /nix/store/...-nixos-system-web
      p2pnode provide --sign-key /etc/nix/secret-key /nix/store/...-nixos-system-web
      p2pnode --json provide --no-serve disk.img | jq -r .link
    """
    if name is not None and len(paths) > 1:
        raise UsageError("--name names one image, but several paths were given")
    config = app.load(
        listen=listen, bootstrap=bootstrap, mdns=False if no_mdns else None, nix_store=nix_store and absolute(nix_store)
    )
    full_paths = [absolute(path) for path in paths]
    key_files = [absolute(path) for path in sign_keys]
    daemon = app.daemon(config, listen=listen, bootstrap=bootstrap, nix_store=nix_store)
    if daemon is None and config.nix_store is None:  # at once, before a node starts; a daemon looks for itself
        for path in full_paths:
            if not os.path.lexists(path):
                raise PathError(f"{path} does not exist")
    if daemon is not None:
        for path in full_paths:
            args = {"path": path, "kind": kind, "name": name, "sign_keys": key_files}
            connection = daemon if path is full_paths[0] else app.daemon(config)  # a connection carries one request
            if connection is None:
                raise StreamClosed(f"the daemon ended before {path} was provided; start it and provide that again")
            with display.progress(app.quiet) as report:
                results = list(connection.call("provide", args, report))
            for result in results:
                app.emit(result, provided)
    elif no_serve:
        for result in _import_only(app, config, full_paths, kind, name, key_files):
            app.emit(result, provided)
    else:
        app.run_node(own_port(config), lambda node: _serve(app, node, full_paths, kind, name, key_files), serving=True)


async def _serve(
    app: App, node: Node, paths: list[str], kind: str | None, name: str | None, sign_keys: list[str]
) -> None:
    import trio

    for path in paths:
        with display.progress(app.quiet) as report:
            result = await node.provide(path, kind=kind, name=name, report=report, sign_keys=sign_keys)
        app.emit(result, provided)
    if not (app.as_json or app.quiet):
        click.echo("serving until Ctrl-C", err=True)
    await trio.sleep_forever()


def _import_only(
    app: App, config: Config, paths: list[str], kind: str | None, name: str | None, sign_keys: list[str]
) -> Iterator[dict[str, Any]]:
    """Results of importing `paths` with no network at all; the links name no peers."""
    from p2pnode import local
    from p2pnode.home import lock
    from p2pnode.store import Store

    start_logging(config)
    with lock(config.home), Store.open(config.home) as store:
        for path in paths:
            with display.progress(app.quiet) as report:
                result = local.provide(store, config, path, kind=kind, name=name, report=report, sign_keys=sign_keys)
            yield result


def provided(result: dict[str, Any]) -> str:
    """An image that is being served, for people: title and link."""
    title = f"{result['name']} ({result['kind']}, {text.size(result['bytes'])}, {result['chunks']} chunks)"
    return f"{text.safe(title)}\n{text.safe(result['link'])}"

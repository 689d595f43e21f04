"""`p2pnode rm`: forget images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from p2pnode.cli import text
from p2pnode.cli.app import App, pass_app

if TYPE_CHECKING:
    from p2pnode.progress import Report
    from p2pnode.store import Store


@click.command(short_help="Forget images and free the space they take in the store.")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@pass_app
def rm(app: App, images: tuple[str, ...]) -> None:
    """Forget images and free the space they take in the store.

    Provided originals and fetched OUT paths are yours and stay where they are.

    \b
    Examples:
      p2pnode rm disk.img
      p2pnode rm bafyr4ib bafyr4ic
    """
    config = app.load()
    for image in images:
        for row in app.ask(config, "rm", {"spec": image}, partial(_remove, image)):
            app.emit(row, _human)


def _remove(spec: str, store: Store, _report: Report) -> list[dict[str, Any]]:
    from p2pnode import local

    return [local.remove(store, spec)[0]]


def _human(row: dict[str, Any]) -> str:
    return text.safe(f"forgot {row['name'] or row['image']}, {text.size(row['freed_bytes'])} freed")

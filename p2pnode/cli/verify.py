"""`p2pnode verify`: read an image again."""

from __future__ import annotations

from typing import Any

import click

from p2pnode.cli import text
from p2pnode.cli.app import App, pass_app


@click.command(short_help="Read an image again and check every hash.")
@click.argument("image")
@pass_app
def verify(app: App, image: str) -> None:
    """Read an image again, every byte, and check every hash. Exit code 4 if it is damaged.

    \b
    Examples:
      p2pnode verify disk.img
      p2pnode verify bafyr4ib && echo intact
    """
    from p2pnode import local

    args = {"spec": image}
    for row in app.ask(app.load(), "verify", args, lambda store, report: [local.verify(store, image, report)]):
        app.emit(row, _human)


def _human(row: dict[str, Any]) -> str:
    what = f"{row['name'] or row['image']}: intact, {text.size(row['bytes'])} in {row['chunks']} chunks"
    return text.safe(f"{what} read in {text.duration(row['seconds'])}")

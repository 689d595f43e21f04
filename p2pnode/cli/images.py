"""`p2pnode images`: what is here."""

from __future__ import annotations

from typing import Any

import click

from p2pnode.cli import text
from p2pnode.cli.app import App, pass_app


@click.command(short_help="List the images that are here.")
@pass_app
def images(app: App) -> None:
    """List the images that are here, the newest first.

    \b
    Examples:
      p2pnode images
      p2pnode --json images | jq -r .image
    """
    from p2pnode import local

    rows = app.ask(app.load(), "images", {}, lambda store, _: local.images(store))
    app.emit_all(rows, _human)


def _human(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no images yet; add one with `p2pnode provide PATH` or get one with `p2pnode fetch LINK`"
    return text.table(
        ("IMAGE", "NAME", "KIND", "SIZE", "HERE", "ADDED"),
        [
            (
                text.short(row["image"]),
                row["name"] or "-",
                row["kind"],
                text.size(row["bytes"]),
                here(row),
                text.moment(row["added"]),
            )
            for row in rows
        ],
        right=(3, 4),
    )


def here(row: dict[str, Any]) -> str:
    """How much of an image is here, and whether it may be used."""
    if row["complete"] and row["held_chunks"] == row["chunks"]:
        return "all"
    percent = 100 * row["held_bytes"] // row["chunk_bytes"] if row["chunk_bytes"] else 100
    return f"{percent} %"

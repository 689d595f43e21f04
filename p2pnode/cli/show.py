"""`p2pnode show`: one image in full."""

from __future__ import annotations

from typing import Any

import click

from p2pnode.cli import text
from p2pnode.cli.app import App, pass_app
from p2pnode.cli.images import here

MAX_OBJECTS = 50  # that a person is shown; --json has all


@click.command(short_help="Show one image in full.")
@click.argument("image")
@pass_app
def show(app: App, image: str) -> None:
    """Show one image in full: by id, the first 8 or more characters of it, link, or name.

    \b
    Examples:
      p2pnode show bafyr4ib
      p2pnode --json show disk.img | jq .objects
    """
    from p2pnode import local

    for row in app.ask(app.load(), "show", {"spec": image}, lambda store, _: [local.show(store, image)]):
        app.emit(row, _human)


def _human(row: dict[str, Any]) -> str:
    pairs = [
        ("image", row["image"]),
        ("name", row["name"] or "-"),
        ("kind", row["kind"]),
        ("size", f"{text.size(row['bytes'])} in {row['chunks']} distinct chunks"),
        ("here", f"{here(row)} ({text.size(row['held_bytes'])} in {row['held_chunks']} chunks)"),
        ("path", row["path"] or "-"),
        *([("pinned", "yes")] if row["pinned"] else []),
        (row["origin"], text.moment(row["added"])),
        *((f"attribute {name}", str(value)) for name, value in row["attributes"].items()),
    ]
    objects = row["objects"]
    lines = [text.fields([(text.safe(name), value) for name, value in pairs]), ""]
    lines.append(
        text.table(
            ("OBJECT", "SIZE", "HASH"),
            [
                (each["path"], text.size(each["bytes"]), each.get("nar_hash") or each.get("file_hash") or "-")
                for each in objects[:MAX_OBJECTS]
            ],
            right=(1,),
        )
    )
    if len(objects) > MAX_OBJECTS:
        lines.append(f"and {len(objects) - MAX_OBJECTS} more (all with --json)")
    return "\n".join(lines)

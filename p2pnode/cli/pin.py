"""`p2pnode pin` and `p2pnode unpin`: keep images, or let them go."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from p2pnode.cli import text
from p2pnode.cli.app import App, pass_app

if TYPE_CHECKING:
    from p2pnode.progress import Report
    from p2pnode.store import Store


@click.command(short_help="Keep images: nothing removes them until they are unpinned.")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@pass_app
def pin(app: App, images: tuple[str, ...]) -> None:
    """Keep images: nothing removes them until they are unpinned, `p2pnode rm` included.

    \b
    Examples:
      p2pnode pin disk.img
      p2pnode pin bafyr4ib bafyr4ic
    """
    _change(app, images, pinned=True)


@click.command(short_help="Let pinned images go.")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@pass_app
def unpin(app: App, images: tuple[str, ...]) -> None:
    """Let pinned images go. They stay until something removes them.

    What is mirrored stays pinned until that ends (`p2pnode mirror --stop`).

    \b
    Examples:
      p2pnode unpin disk.img && p2pnode rm disk.img
    """
    _change(app, images, pinned=False)


def _change(app: App, images: tuple[str, ...], *, pinned: bool) -> None:
    config = app.load()
    operation = "pin" if pinned else "unpin"
    for image in images:
        for row in app.ask(config, operation, {"spec": image}, partial(_pin, image, pinned)):
            app.emit(row, _human)


def _pin(spec: str, pinned: bool, store: Store, _report: Report) -> list[dict[str, Any]]:
    from p2pnode import local

    return [local.pin(store, spec, pinned=pinned)]


def _human(row: dict[str, Any]) -> str:
    return text.safe(f"{'pinned' if row['pinned'] else 'unpinned'} {row['name'] or row['image']}")

"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

listen = click.option(
    "--listen",
    multiple=True,
    metavar="ADDR",
    help="Multiaddress to listen on, such as /ip4/0.0.0.0/tcp/4747. Repeatable.",
)
bootstrap = click.option(
    "--bootstrap",
    multiple=True,
    metavar="ADDR",
    help="Multiaddress with /p2p/ID of a node to join the network through. Repeatable.",
)
no_mdns = click.option("--no-mdns", is_flag=True, help="Do not look for nodes on the local network.")


def network(command: F) -> F:
    """--listen, --bootstrap and --no-mdns."""
    return listen(bootstrap(no_mdns(command)))

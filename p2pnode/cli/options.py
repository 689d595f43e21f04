"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from p2pnode.config import SIGNATURE_POLICIES

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
trusted_keys = click.option(
    "--trusted-key", "trusted_keys", metavar="NAME:BASE64", multiple=True, help="Trust this public key as well."
)


def sign_keys(help: str) -> Callable[[F], F]:
    """--sign-key, any number of them."""
    return click.option("--sign-key", "sign_keys", metavar="FILE", multiple=True, help=help)


def require_signatures(default: str) -> Callable[[F], F]:
    """--require-signatures; `default` is a sentence on what holds without it."""
    return click.option(
        "--require-signatures",
        type=click.Choice(SIGNATURE_POLICIES),
        help=f"Whether store paths must be signed by a trusted key, or proved by their content address. {default}",
    )


def network(command: F) -> F:
    """--listen, --bootstrap and --no-mdns."""
    return listen(bootstrap(no_mdns(command)))

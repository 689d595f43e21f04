"""`p2pnode run`: the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from p2pnode.cli import options, text
from p2pnode.cli.app import App, pass_app
from p2pnode.cli.readiness import tell_ready
from p2pnode.errors import HomeLocked

if TYPE_CHECKING:
    from p2pnode.node import Node


@click.command(short_help="Run the node of this machine until it is stopped.")
@options.network
@click.option("--relay", is_flag=True, help="Also carry connections of nodes that nobody can connect to.")
@click.option("--gateway", metavar="HOST:PORT", help="Be a binary cache for Nix there, fed by the swarm.")
@click.option("--upstream", multiple=True, metavar="URL", help="Binary cache that the gateway asks too. Repeatable.")
@click.option("--ipfs-cid", is_flag=True, help="Name the root of a NAR's blocks in its narinfo, for IPLD tools.")
@click.option("--publish", is_flag=True, help="Tell whoever asks which images this node provides, for mirrors.")
@pass_app
def run(
    app: App,
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
    no_mdns: bool,
    relay: bool,
    gateway: str | None,
    upstream: tuple[str, ...],
    ipfs_cid: bool,
    publish: bool,
) -> None:
    """Run the node of this machine until it is stopped (Ctrl-C or SIGTERM).

    It serves all images it holds, and keeps what it mirrors complete. While it runs, the other commands on the same
    home go through it.

    \b
    Examples:
      p2pnode run
      p2pnode run --listen /ip4/0.0.0.0/tcp/4747 --bootstrap /ip4/192.0.2.7/tcp/4747/p2p/12D3KooW...
      p2pnode run --relay
      p2pnode run --gateway 127.0.0.1:5080      then, in nix.conf: substituters = http://127.0.0.1:5080
    """
    config = app.load(
        listen=listen,
        bootstrap=bootstrap,
        mdns=False if no_mdns else None,
        relay=relay or None,
        gateway=gateway,
        gateway_upstreams=upstream or None,
        gateway_ipfs_cid=ipfs_cid or None,
        publish=publish or None,
    )
    if app.daemon(config) is not None:
        raise HomeLocked(f"a node is running on {config.home} already; `p2pnode status` shows it")

    async def serve(node: Node) -> None:
        gateway = {"gateway": node.gateway_urls()} if node.gateway_urls() else {}
        app.emit({"peer_id": node.peer_id, "addrs": node.addrs(), **gateway}, _human)
        tell_ready()
        await node.keep_mirrors()

    app.run_node(config, serve, serving=True)


def _human(result: dict[str, Any]) -> str:
    lines = [f"running as {text.safe(result['peer_id'])}; stop with Ctrl-C", "others reach this node at:"]
    lines += [f"  {text.safe(addr)}" for addr in result["addrs"]]
    return "\n".join([*lines, *(f"Nix finds a binary cache at {url}" for url in result.get("gateway", ()))])

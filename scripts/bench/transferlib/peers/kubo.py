"""kubo, from the shared library in PyPI's kubo-python: no routing, no bootstrap peers, TCP only.

kubo.py LIBRARY serve REPO FILE ADDRESS               prints {"cid", "addr"} once it has the file and listens
kubo.py LIBRARY fetch REPO CID OUT ADDRESS ADDR...    prints {"seconds"}
kubo.py LIBRARY nothing                               loads what it needs
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


class Kubo:
    """A node whose repository is the new directory `repo`."""

    def __init__(self, library: ctypes.CDLL, repo: Path, address: str) -> None:
        self._library = library
        self._repo = os.fsencode(repo)
        for name in ("AddFile", "GetNodeID", "GetNodeMultiAddrs"):
            getattr(library, name).restype = ctypes.c_char_p
        repo.mkdir()
        self.call("CreateRepo")
        path = repo / "config"
        path.write_text(json.dumps(confined(json.loads(path.read_text()), address)))
        self.call("RunNode")

    def call(self, name: str, *args: str) -> None:
        """A function that returns 1 when all is well; those two return 0."""
        result = getattr(self._library, name)(self._repo, *(arg.encode() for arg in args))
        if result < (0 if name in ("ConnectToPeer", "Download") else 1):
            raise RuntimeError(f"kubo's {name}{args} returned {result}")

    def ask(self, name: str, *args: Any) -> str:
        text: bytes = getattr(self._library, name)(self._repo, *args)
        return text.decode()


def confined(config: dict[str, Any], address: str) -> dict[str, Any]:
    off = {"Enabled": False}
    config["Bootstrap"] = []
    config["Routing"] = {"Type": "none"}
    config["Addresses"].update(Swarm=[f"/ip4/{address}/tcp/0"], API="/ip4/127.0.0.1/tcp/0", Gateway="")
    config["Discovery"] = {"MDNS": off}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    config["Swarm"].update(
        DisableNatPortMap=True,
        RelayClient=off,
        RelayService=off,
        EnableHolePunching=False,
        Transports={"Network": {"QUIC": False, "Relay": False, "Websocket": False, "WebTransport": False}},
    )
    return config


def serve(library: ctypes.CDLL, repo: Path, path: Path, address: str) -> None:
    kubo = Kubo(library, repo, address)
    cid = kubo.ask("AddFile", os.fsencode(path), ctypes.c_bool(False))
    name = kubo.ask("GetNodeID").removeprefix("ID:")
    (addr, *_) = json.loads(kubo.ask("GetNodeMultiAddrs"))
    say({"cid": cid, "addr": f"{addr}/p2p/{name}"})
    while True:
        time.sleep(3600)


def fetch(library: ctypes.CDLL, repo: Path, cid: str, out: Path, address: str, addrs: tuple[str, ...]) -> None:
    kubo = Kubo(library, repo, address)
    began = time.monotonic()
    for addr in addrs:
        kubo.call("ConnectToPeer", addr)
    kubo.call("Download", cid, str(out))
    if not out.is_file():
        raise RuntimeError(f"kubo's Download did not write {out}")
    say({"seconds": time.monotonic() - began})
    os._exit(0)  # what its repository does at the end is no part of a transfer


def main(library: str, what: str, *args: str) -> None:
    loaded = ctypes.CDLL(library)
    if what == "serve":
        serve(loaded, Path(args[0]), Path(args[1]), args[2])
    elif what == "fetch":
        fetch(loaded, Path(args[0]), args[1], Path(args[2]), args[3], args[4:])
    else:
        os._exit(0)  # as `fetch` does


if __name__ == "__main__":
    main(*sys.argv[1:])

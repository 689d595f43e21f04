"""libtorrent, as it comes, except that only TCP is used and nobody outside is looked for.

torrent.py make FILE TORRENT                         prints {"pieces", "piece_bytes"}
torrent.py serve TORRENT DIRECTORY ADDRESS           prints {"port", "uploaded": 0} once it seeds, then what it uploaded
torrent.py fetch TORRENT DIRECTORY ADDRESS PEER...   prints {"seconds"}; a PEER is an address and a port: 127.0.0.1:6881
torrent.py nothing                                   loads what it needs
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import libtorrent as lt  # type: ignore[import-not-found,unused-ignore]

SETTINGS = {
    "enable_outgoing_utp": False,
    "enable_incoming_utp": False,
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
}
POLL = 0.005  # s


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def make(path: Path, torrent: Path) -> None:
    # v1: one hash (SHA-1) over every byte, which is the less work for libtorrent; by default it takes SHA-256 as well.
    creator = lt.create_torrent(lt.list_files(str(path)), 0, lt.create_torrent.v1_only)
    lt.set_piece_hashes(creator, str(path.parent))
    torrent.write_bytes(lt.bencode(creator.generate()))
    say({"pieces": creator.num_pieces(), "piece_bytes": creator.piece_length()})


def session(address: str) -> Any:
    return lt.session({**SETTINGS, "listen_interfaces": f"{address}:0"})


def added(session: Any, torrent: Path, directory: Path) -> Any:
    params = lt.load_torrent_file(str(torrent))
    params.save_path = str(directory)
    params.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)  # begin at once
    return session.add_torrent(params)


def serve(torrent: Path, directory: Path, address: str) -> None:
    here = session(address)
    handle = added(here, torrent, directory)
    while not handle.status().is_seeding:
        time.sleep(0.02)
    uploaded = 0
    say({"port": here.listen_port(), "uploaded": uploaded})
    while True:
        time.sleep(0.1)
        total = handle.status().total_payload_upload
        if total != uploaded:
            uploaded = total
            say({"uploaded": uploaded})


def fetch(torrent: Path, directory: Path, address: str, peers: tuple[str, ...]) -> None:
    here = session(address)
    began = time.monotonic()
    handle = added(here, torrent, directory)
    while handle.status().state == lt.torrent_status.checking_files:
        time.sleep(POLL)
    for peer in peers:
        host, _, port = peer.rpartition(":")
        handle.connect_peer((host, int(port)))
    while not handle.status().is_seeding:
        time.sleep(POLL)
    say({"seconds": time.monotonic() - began})


def main(what: str, *args: str) -> None:
    if what == "make":
        make(Path(args[0]), Path(args[1]))
    elif what == "serve":
        serve(Path(args[0]), Path(args[1]), args[2])
    elif what == "fetch":
        fetch(Path(args[0]), Path(args[1]), args[2], args[3:])


if __name__ == "__main__":
    main(*sys.argv[1:])

#!/usr/bin/env python3
"""What scripts/quickstart shows: three nodes on this machine, an image provided on one and fetched on two at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from swarmlib.content import difference
from swarmlib.control import ask
from swarmlib.process import Command, Daemon, Home, SwarmError

MIB = 1 << 20
IMAGE_BYTES = 48 * MIB  # enough to see it move, little enough to be over in seconds
SKIPPED = ("__pycache__", "site-packages", "test")
BAR = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory")
    keep = parser.parse_args().keep
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # in step with stderr, also into a file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="p2pnode-"))
    try:
        with contextlib.ExitStack() as stack:
            demonstrate(directory, stack)
    except SwarmError as error:
        print(f"\nquickstart failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        if keep:
            print(f"the nodes' homes and logs stay in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    print(f"\nIt works ({time.monotonic() - began:.0f} s). What to do next is in README.md, under Daily use.")
    return 0


def demonstrate(directory: Path, stack: contextlib.ExitStack) -> None:
    print("[2/4] building an image")
    image = directory / "rootfs"
    files, size = build(image)
    print(f"      {image}: {files} files, {size / MIB:.1f} MiB")

    print("[3/4] starting three nodes on loopback")
    alice = stack.enter_context(Daemon(Home(directory / "a")))
    others = [Daemon(Home(directory / name, bootstrap=alice.addrs[:1])) for name in ("b", "c")]
    for node in others:
        stack.enter_context(node)
    for name, node in zip("abc", (alice, *others), strict=True):
        print(f"      {name}: {node.addrs[0]}")

    print("[4/4] providing on a, fetching on b and c at the same time")
    print(f"      a$ p2pnode provide {shlex.quote(str(image))}")
    provided = alice.run("provide", str(image)).check().json
    print(f"      {provided['chunks']} chunks in {provided['seconds']:.1f} s, link: {provided['link']}")
    outs = [directory / f"copy-{node.home.path.name}" for node in others]
    fetches: list[Command] = []
    for node, out in zip(others, outs, strict=True):
        print(f"      {node.home.path.name}$ p2pnode fetch '{provided['image'][:16]}...' -o {out}")
        fetches.append(node.begin("fetch", provided["link"], "-o", str(out)))
        stack.callback(fetches[-1].stop)
    follow(others, fetches, provided["image"], size)

    names = {node.peer_id: node.home.path.name for node in (alice, *others)}
    for node, fetch, out in zip(others, fetches, outs, strict=True):
        result = fetch.finished().check().json
        wrong = difference(image, out)
        if wrong is not None:
            raise SwarmError(f"the copy is not equal to the original: {wrong}")
        sources = ", ".join(
            f"{moved / MIB:.1f} MiB from {names.get(peer, peer)}" for peer, moved in result["from"].items()
        )
        print(f"      {node.home.path.name}: {size / MIB:.1f} MiB in {result['seconds']:.1f} s, {sources}; verified")


def build(root: Path) -> tuple[int, int]:
    """Make a root file system of what every machine with Python has; returns the number of files and bytes."""
    sources = {
        "lib/python": Path(sysconfig.get_path("stdlib")),
        "lib/site-packages": Path(sysconfig.get_path("purelib")),
    }
    files = size = 0
    for target, source in sources.items():
        for folder, folders, names in os.walk(source):
            folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("config-"))
            for name in sorted(names):
                path = Path(folder) / name
                if size >= IMAGE_BYTES or not path.is_file():
                    continue
                copy = root / target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
                files, size = files + 1, size + path.stat().st_size
    (root / "bin").mkdir(parents=True, exist_ok=True)
    (root / "bin" / "python").symlink_to("../lib/python")
    return files, size


def follow(nodes: list[Daemon], fetches: list[Command], image: str, size: int) -> None:
    """Show how far the fetches have come until all have ended: one line that is redrawn, or one per second in a log."""
    terminal = sys.stdout.isatty()
    next_line = 0.0
    while any(fetch.poll() is None for fetch in fetches):
        time.sleep(0.1)
        if time.monotonic() < next_line:
            continue
        next_line = time.monotonic() + (0.2 if terminal else 1.0)
        parts = []
        for node in nodes:
            rows = ask(node.home.path, "images") or []
            held = next((row["held_bytes"] / max(row["chunk_bytes"], 1) for row in rows if row["image"] == image), 0.0)
            done = round(BAR * held)
            parts.append(f"{node.home.path.name} [{'#' * done}{'.' * (BAR - done)}] {100 * held:3.0f} %")
        print(f"{chr(13) if terminal else ''}      {'   '.join(parts)}", end="" if terminal else "\n", flush=True)
    if terminal:
        print("\r" + " " * 100 + "\r", end="")


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Peak memory of a provider and a fetcher, for a small image and a large one: it must not grow with the image.

    scripts/bench/memory.py [--small 256M] [--large 4G] [--tmp DIR]

Both nodes are daemons; what is read is VmHWM of /proc, which is resident memory with the libraries. Prints a table on
stderr and one JSON object on stdout; exit code 1 if the large image takes 64 MiB more than the small one, or over 350.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from swarmlib.content import difference, parse_size, write_random
from swarmlib.process import Daemon, Home, SwarmError

MIB = 1 << 20
GROWTH_LIMIT, LIMIT = 64 * MIB, 350 * MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=parse_size, default=parse_size("256M"), help="default 256M")
    parser.add_argument("--large", type=parse_size, default=parse_size("4G"), help="default 4G")
    parser.add_argument("--tmp", type=Path, help="where the temporary directory is made; needs twice the large size")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for name, size in (("small", options.small), ("large", options.large)):
        with tempfile.TemporaryDirectory(prefix="p2pnode-bench-", dir=options.tmp) as directory:
            figures[name] = measure(Path(directory), size)
        peaks = ", ".join(f"{role} {figures[name][role] / MIB:.0f} MiB" for role in ("provider", "fetcher"))
        print(f"{size / MIB:>6.0f} MiB in {figures[name]['seconds']:.1f} s: {peaks}", file=sys.stderr)
    figures["ok"] = all(
        figures["large"][role] <= min(figures["small"][role] + GROWTH_LIMIT, LIMIT) for role in ("provider", "fetcher")
    )
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


def measure(directory: Path, size: int) -> dict[str, Any]:
    """Peak bytes of both nodes after one transfer, and the seconds of the fetch. Raises SwarmError."""
    original, copy = directory / "image", directory / "copy"
    write_random(original, size)
    with contextlib.ExitStack() as stack:
        provider, fetcher = (stack.enter_context(Daemon(Home(directory / name))) for name in "ab")
        link = provider.run("provide", str(original)).check().json["link"]
        result = fetcher.run("fetch", link, "-o", str(copy)).check().json
        peaks = provider.usage().peak_bytes, fetcher.usage().peak_bytes
    if (wrong := difference(original, copy)) is not None:
        raise SwarmError(wrong)
    return {"bytes": size, "seconds": result["seconds"], "provider": peaks[0], "fetcher": peaks[1]}


if __name__ == "__main__":
    sys.exit(main())

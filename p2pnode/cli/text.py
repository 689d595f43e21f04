"""Human-readable forms of sizes, times and tables. All that peers or file names may have had a hand in is made safe."""

from __future__ import annotations

import time
from collections.abc import Sequence

from p2pnode.failures import one_line

SHORT_ID = 16  # characters of an id that a table shows; a prefix of 8 or more is accepted wherever an id is


def safe(value: object) -> str:
    """`value` on one line without control characters: terminals obey those."""
    return one_line(str(value))


def size(count: float) -> str:
    """Bytes as MiB, as kernels and disks count them."""
    return f"{count / (1 << 20):,.1f} MiB" if count >= 100_000 or count == 0 else f"{count:,.0f} bytes"


def short(identifier: str) -> str:
    return safe(identifier)[:SHORT_ID]


def duration(seconds: float) -> str:
    """12 s, 3:05 min, 2:10:00 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def moment(timestamp: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(timestamp))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns; those in `right` are set to the right."""
    cells = [list(header), *([safe(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ).rstrip()
        for row in cells
    )


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """`name  value` lines, the values aligned."""
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name.ljust(width)}  {safe(value)}".rstrip() for name, value in pairs)

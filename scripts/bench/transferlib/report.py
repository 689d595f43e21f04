"""Medians over the rounds, and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transferlib.measure import Fetched

MIB, GIB, MB = 1 << 20, 1 << 30, 10**6
REFERENCES = ("stock", "libtorrent", "kubo", "https")


@dataclass(slots=True)
class Row:
    """All runs of one contender with one number of providers.

    `startup_cpu`: processor seconds of only loading the fetcher's program. `extra`: one record for each run, of what
    was measured beside it (see link.py).
    """

    name: str
    title: str
    providers: int
    daemon: bool = False  # the fetcher was running already, so its CPU has no start in it
    startup_cpu: float = 0.0
    runs: list[Fetched] = field(default_factory=list)
    extra: list[dict[str, Any]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Medians over the runs, in units that can be compared between sizes."""

        def median(values: Sequence[float]) -> float:
            return round(statistics.median(values), 3)

        runs, start = self.runs, 0.0 if self.daemon else self.startup_cpu
        return {
            "name": self.name,
            "title": self.title,
            "providers": self.providers,
            "mb_per_s": median([run.size / MB / run.seconds for run in runs]),
            "mb_per_s_with_start": median([run.size / MB / run.process_seconds for run in runs]),
            "fetch_cpu_s_per_gib": median([(run.fetch_cpu - start) * GIB / run.size for run in runs]),
            "fetch_cpu_s_per_gib_with_start": median([run.fetch_cpu * GIB / run.size for run in runs]),
            "startup_cpu_s": round(self.startup_cpu, 3),
            "provide_cpu_s_per_gib": median([run.provide_cpu * GIB / run.size for run in runs]),
            "fetch_peak_bytes": int(median([run.fetch_peak for run in runs])),
            "provide_peak_bytes": int(median([run.provide_peak for run in runs])),
            "least_share": None
            if (shares := [s for s in map(fairness, runs) if s is not None]) == []
            else median(shares),
            "extra": medians(self.extra),
        }

    def to_json(self) -> dict[str, Any]:
        runs = [{**asdict(run), "fairness": fairness(run)} for run in self.runs]
        return {**self.figures(), "runs": runs, "extra_runs": self.extra}


def fairness(run: Fetched) -> float | None:
    """The smallest provider's bytes as a fraction of an equal share; None where it is not known, or there is one."""
    if run.shares is None or len(run.shares) < 2 or not sum(run.shares):
        return None
    return min(run.shares) * len(run.shares) / sum(run.shares)


def medians(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median of each number that every record has."""
    if not records:
        return {}
    keys = [key for key in records[0] if all(isinstance(record.get(key), int | float) for record in records)]
    return {key: statistics.median([record[key] for record in records]) for key in keys}


def ratios(rows: Sequence[Mapping[str, Any]], subject: str = "p2pnode") -> list[dict[str, Any]]:
    """How many times as fast the subject is as each reference with as many providers, and as itself with one."""
    rates = {(row["name"], row["providers"]): row["mb_per_s"] for row in rows}
    found = []
    for (name, providers), rate in rates.items():
        if name != subject:
            continue
        against = {reference: rates.get((reference, providers)) for reference in REFERENCES}
        if providers != 1:
            against["itself with 1"] = rates.get((subject, 1))
        found += [
            {"providers": providers, "against": reference, "ratio": round(rate / other, 2)}
            for reference, other in against.items()
            if other
        ]
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns as wide as they must be; the first `left` begin on the left, the others end on the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if column < left else word.rjust(width)
            for column, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        *("contender", "providers", "MB/s", "with start", "fetcher CPU s/GiB", "with start", "its start s"),
        *("providers CPU s/GiB", "fetcher MiB", "provider MiB", "least share"),
    )
    body = [
        (
            row["name"],
            str(row["providers"]),
            f"{row['mb_per_s']:.1f}",
            f"{row['mb_per_s_with_start']:.1f}",
            f"{row['fetch_cpu_s_per_gib']:.2f}",
            f"{row['fetch_cpu_s_per_gib_with_start']:.2f}",
            f"{row['startup_cpu_s']:.2f}",
            f"{row['provide_cpu_s_per_gib']:.2f}",
            f"{row['fetch_peak_bytes'] / MIB:.0f}",
            f"{row['provide_peak_bytes'] / MIB:.0f}",
            "-" if row["least_share"] is None else f"{row['least_share']:.2f}",
        )
        for row in rows
    ]
    parts = [table(head, body)]
    names = {row["name"]: row["title"] for row in rows}
    parts.append("\n".join(f"{name}: {title}" for name, title in names.items()))
    if found := ratios(rows):
        lines = [(f"p2pnode / {r['against']}", str(r["providers"]), f"{r['ratio']:.2f}") for r in found]
        parts.append(table(("ratio of MB/s", "providers", "times"), lines))
    return "\n\n".join(parts)

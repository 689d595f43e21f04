"""What a swarm run found, as a record, as text, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swarmlib.process import SwarmError

MIB = 1 << 20


@dataclass(slots=True)
class NodeReport:
    """One node. Bytes are of blocks; `sources` by node number; `samples` are (seconds, chunks held).

    `line_sent_bytes`: everything that left the node's network device, where it has one of its own.
    """

    number: int
    role: str  # bootstrap, provider or leecher
    peer_id: str = ""
    fault: str | None = None  # killed, slow, liar or stalled
    seconds: float | None = None
    received_bytes: int = 0
    duplicate_bytes: int = 0
    uploaded_bytes: int = 0
    line_sent_bytes: int | None = None
    sources: dict[str, int] = field(default_factory=dict)
    banned: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    error: str | None = None
    verified: bool = False
    samples: list[tuple[float, int]] = field(default_factory=list)


@dataclass(slots=True)
class SwarmReport:
    """A whole run. `bound_seconds`: what no distribution can beat at this rate, where a rate was given."""

    image: str
    kind: str
    bytes: int
    chunks: int
    nodes: list[NodeReport]
    seconds: float = 0.0
    rate_bytes: float | None = None
    bound_seconds: float | None = None

    @property
    def leechers(self) -> list[NodeReport]:
        return [node for node in self.nodes if node.role == "leecher"]

    @property
    def ok(self) -> bool:
        return bool(self.leechers) and all(node.verified for node in self.leechers)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def lower_bound(size: int, rate: float, providers: int, leechers: int) -> float:
    """Seconds below which nobody can bring `size` bytes to `leechers`, when each line carries `rate` bytes/s each way.

    The largest of: sending one copy at all, receiving one copy, and moving all copies with everybody's uplink
    (Kumar and Ross, "Peer-Assisted File Distribution: The Minimum Distribution Time", HotWeb 2006).
    """
    return max(size / (rate * providers), size / rate, leechers * size / (rate * (providers + leechers)))


def text(report: SwarmReport) -> str:
    """The table for a terminal."""
    lines = [
        f"image {report.image} ({report.kind}, {report.bytes / MIB:.1f} MiB, {report.chunks} chunks)",
        f"{'node':>4}  {'role':<9} {'fault':<8} {'time':>8} {'received':>10} {'dupl.':>8} {'uploaded':>10}"
        f" {'cpu':>7} {'memory':>8}  from (MiB by node)",
    ]
    for node in report.nodes:
        sources = " ".join(
            f"{number}:{size / MIB:.1f}" for number, size in sorted(node.sources.items(), key=_by_number)
        )
        lines.append(
            f"{node.number:>4}  {node.role:<9} {node.fault or '':<8}"
            f" {'' if node.seconds is None else f'{node.seconds:.2f} s':>8}"
            f" {_mib(node.received_bytes):>10} {_mib(node.duplicate_bytes):>8} {_mib(node.uploaded_bytes):>10}"
            f" {node.cpu_seconds:>5.1f} s {node.peak_memory_bytes / MIB:>4.0f} MiB  {sources}".rstrip()
        )
        if node.banned:
            lines.append(f"      banned: {', '.join(node.banned)}")
        if node.error:
            lines.append(f"      failed: {node.error}")
    return "\n".join([*lines, summary(report)])


def summary(report: SwarmReport) -> str:
    """One line: what came of it."""
    good = sum(node.verified for node in report.leechers)
    found = f"{good} of {len(report.leechers)} fetches complete and equal to the original in {report.seconds:.2f} s"
    if report.bound_seconds:
        found += (
            f"; bound {report.bound_seconds:.2f} s, that is {report.seconds / report.bound_seconds:.2f} x the bound"
        )
    sent = sum(node.uploaded_bytes for node in report.nodes if node.role == "provider")
    return found + f"; providers sent {sent / report.bytes:.2f} copies" if report.bytes else found


def plot(report: SwarmReport, path: Path) -> None:
    """Draw the chunks held by each node over time. Raises SwarmError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise SwarmError("--plot needs matplotlib: pip install matplotlib (it comes with '.[dev]')") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6))
    for node in report.nodes:
        if node.role != "bootstrap" and node.samples:
            times, held = zip(*node.samples, strict=True)
            style = "--" if node.role == "provider" else "-"
            label = f"{node.number} {node.role}" + (f" ({node.fault})" if node.fault else "")
            axes.plot(times, held, style, label=label, drawstyle="steps-post" if len(times) < 3 else "default")
    if report.bound_seconds:
        axes.axvline(report.bound_seconds, color="grey", linewidth=1, label=f"bound {report.bound_seconds:.1f} s")
    axes.set(xlabel="seconds since the fetches began", ylabel="chunks held", ylim=(0, report.chunks * 1.05))
    axes.set_title(f"{report.bytes / MIB:.0f} MiB, {len(report.leechers)} leechers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _by_number(item: tuple[str, int]) -> tuple[bool, Sequence[int | str]]:
    number = item[0]
    return not number.isdigit(), [int(number) if number.isdigit() else number]


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size else "-"

"""The transfer benchmark: its arithmetic, and one small transfer of p2pnode and of stock py-libp2p."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from swarmlib.process import REPOSITORY, Command
from transferlib import link, measure, profiling, report
from transferlib.measure import Fetched
from transferlib.report import Row

TRANSFER = REPOSITORY / "scripts" / "bench" / "transfer.py"
GIB = 1 << 30


def fetched(seconds: float, *, shares: tuple[int, ...] | None = None) -> Fetched:
    return Fetched(
        size=GIB,
        seconds=seconds,
        process_seconds=seconds + 1,
        fetch_cpu=5.0,
        provide_cpu=3.0,
        fetch_peak=100,
        provide_peak=200,
        shares=shares,
        began=0.0,
        ended=seconds,
    )


def row(name: str, providers: int, *seconds: float) -> Row:
    return Row(name, name.title(), providers, startup_cpu=1.5, runs=[fetched(s) for s in seconds])


def test_figures_are_medians_per_gib_without_the_start_of_the_fetcher() -> None:
    figures = row("p2pnode", 1, 2.0, 4.0, 100.0).figures()
    assert figures["mb_per_s"] == pytest.approx(GIB / 1e6 / 4.0, abs=0.001)
    assert figures["mb_per_s_with_start"] == pytest.approx(GIB / 1e6 / 5.0, abs=0.001)
    assert (figures["fetch_cpu_s_per_gib"], figures["fetch_cpu_s_per_gib_with_start"]) == (3.5, 5.0)
    assert figures["provide_cpu_s_per_gib"] == 3.0
    assert figures["least_share"] is None


def test_the_least_share_is_a_fraction_of_an_equal_one() -> None:
    assert report.fairness(fetched(1, shares=(25, 25, 25, 25))) == 1.0
    assert report.fairness(fetched(1, shares=(10, 30, 30, 30))) == pytest.approx(0.4)
    assert report.fairness(fetched(1, shares=(0, 100))) == 0.0
    assert report.fairness(fetched(1, shares=(100,))) is None
    assert report.fairness(fetched(1)) is None


def test_ratios_compare_equal_numbers_of_providers() -> None:
    rows = [row("p2pnode", 1, 2.0), row("p2pnode", 4, 4.0), row("stock", 1, 8.0), row("kubo", 4, 8.0)]
    found = {(r["against"], r["providers"]): r["ratio"] for r in report.ratios([r.figures() for r in rows])}
    assert found == {("stock", 1): 4.0, ("kubo", 4): 2.0, ("itself with 1", 4): 0.5}


def test_quantiles_are_samples() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [link.quantile(values, q) for q in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert link.quantile([7.0], 0.99) == 7.0


def test_a_profile_is_counted_by_thread_and_function() -> None:
    lines = [
        "thread (0x1): MainThread;main (a/b.py:3);inner (c.py:9) 6",
        "thread (0x1): MainThread;main (a/b.py:3) 2",
        "thread (0x2): Trio thread 3;work (d.py:1);work (d.py:1) 1",
        "thread (0x3): Trio thread 14;work (d.py:1) 1",
        "thread (0x4): Thread-2;run (threading.py:1);Condition.wait (threading.py:5) 9",
        "nonsense",
    ]
    profile = profiling.parse(lines, ignored={"Condition.wait  threading.py"})
    assert profile.samples == 10
    assert profile.threads == {"MainThread": 8, "Trio thread N": 2}
    assert profile.own["MainThread", "inner  c.py"] == 6
    assert profile.cumulative["MainThread", "main  b.py"] == 8
    assert profile.cumulative["Trio thread N", "work  d.py"] == 2  # recursion counts once
    assert "inner  c.py" in profiling.text("fetcher", "cpu", profile)


def test_processor_time_and_memory_of_a_command_are_those_it_used(tmp_path: Path) -> None:
    code = "import time; b = bytearray(100 << 20); d = time.process_time() + 0.3\nwhile time.process_time() < d: pass"
    cpu, peak = measure.followed(Command([sys.executable, "-c", code], tmp_path / "log"))
    assert 0.3 <= cpu < 0.6
    assert 100 << 20 < peak < 160 << 20


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory in which nodes can have their homes: pytest's own are too deep for a control socket."""
    with tempfile.TemporaryDirectory(prefix="p2pnode-test-") as path:
        yield Path(path)


@pytest.mark.slow
def test_a_small_transfer(short_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    args = ["--only", "p2pnode,stock", "--size", "4M", "--providers", "1,2", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(TRANSFER), "--tmp", str(short_path), *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    rows = {(row["name"], row["providers"]): row for row in figures["rows"]}
    assert set(rows) == {("p2pnode", 1), ("p2pnode", 2), ("stock", 1)}
    for row in rows.values():
        (run,) = row["runs"]
        assert run["size"] == 4 << 20
        assert 0 < run["seconds"] < run["process_seconds"]
        assert run["fetch_cpu"] > 0
        assert row["fetch_peak_bytes"] > 20 << 20
        assert row["startup_cpu_s"] > 0.1
    assert sum(rows["p2pnode", 2]["runs"][0]["shares"]) >= 4 << 20
    assert {(r["against"], r["providers"]) for r in figures["ratios"]} == {("stock", 1), ("itself with 1", 2)}
    assert "p2pnode / stock" in done.stdout
    assert list(short_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupt_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    args = [sys.executable, str(TRANSFER), "--only", "stock", "--size", "192M", "--tmp", str(tmp_path)]
    bench = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/stock-1/out/image.bin")):  # the fetch is on its way
            assert bench.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        bench.send_signal(signal.SIGINT)
        _, said = bench.communicate(timeout=30)
    finally:
        bench.kill()
    assert bench.returncode == 130
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(tmp_path) in command_line(pid)]


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""

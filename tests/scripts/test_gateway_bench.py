"""The benchmark of the binary cache, with few look-ups and a small NAR."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench/gateway.py"


@pytest.mark.slow
@pytest.mark.nix
def test_figures(tmp_path: Path) -> None:
    few = ["--misses", "100", "--storm", "400", "--connections", "20", "--size", "8M", "--runs", "1"]
    command = [sys.executable, str(SCRIPT), "--json", "--only", "misses,storm,nars", "--tmp", str(tmp_path), *few]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["ok"] and figures.keys() == {"ok", "misses", "storm", "nars"}
    assert 0 < figures["misses"]["median_ms"] <= figures["misses"]["p99_ms"] < 50
    assert figures["storm"]["per_second"] > 50
    assert figures["nars"]["store"]["mb_per_second"] > 0 and figures["nars"]["swarm"]["cpu_seconds_per_gib"] > 0
    assert not list(tmp_path.iterdir())


def test_bad_arguments() -> None:
    for arguments in (["--only", "nothing"], ["--misses", "1"], ["--size", "many"]):
        done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr

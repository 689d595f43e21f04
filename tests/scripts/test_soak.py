"""The soak, short: a leak that takes ten minutes to show is for `scripts/soak.py` alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"


@pytest.mark.slow
def test_twenty_seconds_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--minutes", "0.33", "--connections", "8", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    report = json.loads(done.stdout)
    assert report["leaks"] == []
    jobs = {"echo", "half_close", "reset_in_the_middle", "reset_by_the_peer", "cancelled_reads", "cancelled_write"}
    assert all(report["counts"].get(job) for job in jobs), report["counts"]

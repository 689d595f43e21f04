"""Swarms that lose, distrust and wait for their members, run by scripts/swarm.py as a developer would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from swarmlib.process import REPOSITORY

MIB = 1 << 20


def swarm(directory: Path, *args: str, timeout: float = 300) -> dict[str, Any]:
    """The report of a run that went well."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "swarm.py"), "--json", "--tmp", str(directory), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    assert (done.returncode, report["ok"]) == (0, True), f"{json.dumps(report, indent=1)}\n{done.stderr}"
    assert list(directory.iterdir()) == [], "the run left something behind"
    return report


def leechers(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in report["nodes"] if node["role"] == "leecher"]


@pytest.mark.slow
def test_one_provider_and_three_that_start_together(tmp_path: Path) -> None:
    report = swarm(tmp_path, "--nodes", "4", "--size", "24M")
    for node in leechers(report):
        assert node["received_bytes"] < 26 * MIB
        assert node["peak_memory_bytes"] < 350 * MIB
        assert node["cpu_seconds"] > 0
        assert node["samples"]
    sent = sum(node["sources"].get("1", 0) for node in leechers(report))
    assert sum(sum(node["sources"].values()) for node in leechers(report)) >= 3 * 24 * MIB
    assert sent <= 3 * 25 * MIB


@pytest.mark.slow
def test_four_providers_with_a_different_quarter_each(tmp_path: Path) -> None:
    report = swarm(tmp_path, "--nodes", "6", "--seeds", "4", "--split", "--size", "24M")
    used = {number for node in leechers(report) for number in node["sources"]}
    assert used >= {"1", "2", "3", "4"}
    for node in leechers(report):
        assert node["received_bytes"] < 26 * MIB


@pytest.mark.slow
def test_two_providers_die_one_stalls_and_one_lies(tmp_path: Path) -> None:
    args = ["--nodes", "8", "--seeds", "6", "--split", "--copies", "5", "--size", "48M", "--seed-rate", "4M"]
    report = swarm(tmp_path, *args, "--kill", "2", "--stall", "1", "--liar", "1", "--fetch-timeout", "150")
    faults = {node["fault"]: str(node["number"]) for node in report["nodes"] if node["fault"]}
    assert faults.keys() == {"killed", "stalled", "liar"}
    for node in leechers(report):
        assert node["banned"] == [faults["liar"]]
        assert faults["stalled"] not in node["sources"]
        # What a liar costs is bounded, and so is what is asked twice because somebody went.
        assert node["received_bytes"] < 1.25 * 48 * MIB


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.usefixtures("network_namespaces")
def test_eight_leechers_come_near_the_bound(tmp_path: Path) -> None:
    """One seed, 64 MiB, 100 Mbit/s lines: within 2.5 x the bound, and the seed sends at most two copies."""
    report = swarm(tmp_path, "--nodes", "9", "--netns", "--rate", "100mbit", "--size", "64M", timeout=600)
    assert report["bound_seconds"] == pytest.approx(64 * MIB / 12.5e6)
    assert report["seconds"] <= 2.5 * report["bound_seconds"]
    (seed,) = [node for node in report["nodes"] if node["role"] == "provider"]
    assert seed["uploaded_bytes"] <= 2 * 64 * MIB
    assert seed["line_sent_bytes"] <= 2.1 * 64 * MIB


@pytest.mark.slow
def test_slow_providers_hold_nobody_up(tmp_path: Path) -> None:
    report = swarm(tmp_path, "--nodes", "6", "--seeds", "4", "--slow", "3", "--slow-rate", "64K", "--size", "64M")
    # At 64 KiB/s the last chunk of a slow one alone would take 4 s, and a quarter of the image 4 minutes.
    assert report["seconds"] < 40

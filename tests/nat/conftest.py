"""The lab: a small internet of network namespaces, described in scripts/swarmlib/lab.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from swarmlib import lab as laboratory
from swarmlib.content import write_random
from swarmlib.crossing import Site
from swarmlib.lab import Lab


@pytest.fixture(scope="session")
def _namespaces() -> None:
    reason = laboratory.available()
    if reason is not None:
        pytest.skip(f"network namespaces with nftables: {reason}")


@pytest.fixture
def lab(_namespaces: None) -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def site(lab: Lab, tmp_path: Path) -> Iterator[Site]:
    """Nodes on hosts of `lab`, all ended with it."""
    with Site(lab, tmp_path) as site:
        yield site


@pytest.fixture
def original(tmp_path: Path) -> Callable[[int], Path]:
    """Makes the file to be sent, of so many bytes."""

    def make(size: int) -> Path:
        path = tmp_path / "original.bin"
        write_random(path, size)
        return path

    return make

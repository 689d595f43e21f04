from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nix") and shutil.which("nix-store") is None:
        pytest.skip("nix-store is not installed")


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that other users can reach too (pytest's tmp_path is closed to them)."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)

"""Every input the fuzzers found worth keeping, again: what `scripts/fuzz/run` asserts, without Atheris."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = REPOSITORY / "tests" / "fuzz_corpus"
MOST = 1_000_000  # bytes, of all corpora together

sys.path.append(str(REPOSITORY / "scripts"))


@pytest.mark.parametrize("target", ["yamux", "noise_records", "exchange_frames", "manifest", "catalog"])
def test_kept_inputs_hold_every_invariant(target: str) -> None:
    check = importlib.import_module(f"fuzz.{target}").check
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) > 20, "the corpus is missing"
    for path in inputs:
        try:
            check(path.read_bytes())
        except Exception as exc:
            exc.add_note(f"scripts/fuzz/run --replay {path.relative_to(REPOSITORY)} {target}")
            raise


def test_corpora_stay_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < MOST

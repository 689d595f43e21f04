"""How far something long has come; made by the services, drawn by the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. `done` and `total` are bytes (`total` 0: not known yet); `note` says what is being waited for."""

    phase: str
    done: int = 0
    total: int = 0
    peers: int = 0
    note: str = ""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Report to nobody."""

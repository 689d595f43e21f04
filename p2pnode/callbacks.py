"""Telling those who want to know."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import ParamSpec

log = logging.getLogger(__name__)

P = ParamSpec("P")


def call_all(callbacks: Iterable[Callable[P, object]], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call each of those there are now. One that fails is logged: it must not keep the news from the others, nor end
    whoever has them."""
    for callback in tuple(callbacks):
        try:
            callback(*args, **kwargs)
        except Exception:
            log.exception("the callback %r failed", callback)

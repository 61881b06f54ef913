"""Parts of a request that are accepted and have no effect."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final

ignored_parts: Final[ContextVar[list[str] | None]] = ContextVar("ignored_parts", default=None)
"""Their names, of the request that a task answers."""


def report_ignored(names: Iterable[str]) -> None:
    """The reply will name them."""
    parts = ignored_parts.get()
    if parts is not None:
        parts += names

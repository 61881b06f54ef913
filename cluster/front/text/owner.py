"""Whose requests take turns with those of others."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

current_owner: Final[ContextVar[str]] = ContextVar("owner", default="")
"""Of the request that a task works for: its API key's digest, or its client's address where keys are not needed."""

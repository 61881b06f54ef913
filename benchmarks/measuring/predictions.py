"""How near a plan's predictions are wanted to what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

WANTED: Final = 0.15


def count_near(ratios: Iterable[float]) -> int:
    """Of ratios predicted / measured, those that are near enough to 1."""
    return sum(abs(ratio - 1) <= WANTED for ratio in ratios)

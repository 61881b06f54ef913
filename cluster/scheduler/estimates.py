"""Estimates of times that are learned from samples."""

from __future__ import annotations

_SLOW_WEIGHT = 0.1
_FAST_WEIGHT = 0.4
"""A sample above the estimate weighs less than one below it: hiccups make a step slow, nothing makes one too fast."""


def moved(estimate: float, sample: float) -> float:
    """The estimate after a sample of the same time."""
    weight = _SLOW_WEIGHT if sample > estimate else _FAST_WEIGHT
    return estimate + weight * (sample - estimate)

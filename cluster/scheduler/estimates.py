"""Time estimates that are learned from samples."""

from __future__ import annotations

_SLOW_WEIGHT = 0.1
_FAST_WEIGHT = 0.4
"""Weights of samples above and below the estimate. A chance delay makes a step slow, but nothing makes it too fast."""


def moved(estimate: float, sample: float) -> float:
    weight = _SLOW_WEIGHT if sample > estimate else _FAST_WEIGHT
    return estimate + weight * (sample - estimate)

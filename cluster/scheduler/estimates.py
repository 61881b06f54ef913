from __future__ import annotations

_SLOW_WEIGHT = 0.1
_FAST_WEIGHT = 0.4
"""Weight of a measured time below the estimate. A longer time weighs less, because a random delay may cause it."""


def moved(estimate: float, sample: float) -> float:
    weight = _SLOW_WEIGHT if sample > estimate else _FAST_WEIGHT
    return estimate + weight * (sample - estimate)

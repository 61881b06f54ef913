"""How long a step may take before what computes it counts as hung. Pure."""

from __future__ import annotations

from math import inf

_TIMES = 20
_LEAST_S = 30.0
"""Other programs on the GPU, a bucket of rows that is captured, longer contexts of the same kind: all far below."""


def step_limit_s(last_ns: int | None, *, on_gpus: bool) -> float:
    """Of a step, by the time that the last one of its kind took.

    Without limit (only the coordinator's) where none of its kind was computed, since kernels may still be compiled, and
    where weights are in RAM: the system may have to read them from disk again.
    """
    return _LEAST_S + _TIMES * last_ns / 1e9 if on_gpus and last_ns is not None else inf

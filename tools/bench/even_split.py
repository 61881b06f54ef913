"""Divides a model's layers among equal workers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.costs import ModelCosts

_PROMPT_TOKENS, _STEPS = 512, 16
"""Assumed prompt tokens and decode steps per request. A batch of 8 requests takes 128 steps for 128 tokens each."""
_MACS_PER_BYTE = 15.0
"""Number of multiply-adds that take about as long as reading one byte."""
_SHARPNESS = 8
"""Stage times are raised to this power and summed. The power is so large that the slowest stage dominates the sum."""


def even_split(costs: ModelCosts, workers: int) -> list[tuple[int, int]]:
    """Returns half-open layer ranges that minimize the slowest stage's time. The last stage includes the LM head."""
    times = [_time(layer.macs_per_token, layer.used_file_bytes) for layer in costs.layers]
    head = _time(0, costs.head_file_bytes)
    until = np.concatenate(([0.0], np.cumsum(times))) / (sum(times) + head)
    head /= sum(times) + head
    layers = len(times)
    assert 1 <= workers <= layers
    # best[end] is the minimum sum with which `stage` stages can hold layers [0, end).
    best: NDArray[np.float64] = np.where(np.arange(layers + 1) == 0, 0.0, np.inf)
    starts: list[list[int]] = []
    for stage in range(1, workers + 1):
        of_last = head if stage == workers else 0.0
        chosen, sums = [0] * (layers + 1), np.full(layers + 1, np.inf)
        for end in range(stage, layers + 1):
            each = best[:end] + (until[end] - until[:end] + of_last) ** _SHARPNESS
            chosen[end] = int(np.argmin(each))
            sums[end] = each[chosen[end]]
        best = sums
        starts.append(chosen)
    cut, end = [], layers
    for chosen in reversed(starts):
        cut.append((chosen[end], end))
        end = chosen[end]
    return cut[::-1]


def _time(macs_per_token: int, read_bytes: int) -> float:
    return _PROMPT_TOKENS * macs_per_token / _MACS_PER_BYTE + _STEPS * read_bytes

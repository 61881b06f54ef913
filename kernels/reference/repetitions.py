"""DRY in plain Python: what a token costs that goes on with a repetition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.sampler_chain import SamplerChain
from llamaclust.core.sampling import SampleTask

Float32 = NDArray[np.float32]


def penalize_repetitions(logits: Float32, task: SampleTask, chain: SamplerChain) -> None:
    """Subtracts from each token that would go on with a repetition of the history's end."""
    window = len(task.history) if task.dry_window is None else min(task.dry_window, len(task.history))
    history = task.history[len(task.history) - window :]
    for token, length in repetitions(history, task.breakers, chain.dry_allowed_length).items():
        penalty = chain.dry_multiplier * _power(chain.dry_base, length - chain.dry_allowed_length)
        logits[token] -= np.float32(min(penalty, float(np.finfo(np.float32).max)))


def repetitions(history: tuple[int, ...], breakers: tuple[tuple[int, ...], ...], allowed_length: int) -> dict[int, int]:
    """For each token that would go on with one, how many of the last tokens stood before it earlier: `allowed_length`
    at least, none beyond the newest breaker."""
    reach = _reach(history, breakers)
    if len(history) <= allowed_length or reach < allowed_length:
        return {}
    longest: dict[int, int] = {}
    for end in range(len(history) - 1):
        length = 0
        while length < min(reach, end + 1) and history[end - length] == history[-1 - length]:
            length += 1
        if length >= allowed_length:
            token = history[end + 1]
            longest[token] = max(longest.get(token, 0), length)
    return {token: length for token, length in longest.items() if (token,) not in breakers}


def _reach(history: tuple[int, ...], breakers: tuple[tuple[int, ...], ...]) -> int:
    for start in reversed(range(len(history))):
        found = [len(one) for one in breakers if history[start : start + len(one)] == one]
        if found:
            return len(history) - start - max(found)
    return len(history)


def _power(base: float, exponent: int) -> float:
    """By repeated squaring; infinity where it is too large."""
    power, square = 1.0, base
    while exponent > 0:
        if exponent & 1:
            power *= square
        square *= square
        exponent >>= 1
    return power

"""The input of the reference samplers: a row's candidates in order, their weights, and random bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.sampler.params import SamplerChain
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.reference.exact import exp32, log64

LARGEST = np.finfo(np.float32).max
UNIT_WEIGHT = 1 << 40
_MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Computes Philox4x32-10: four random 32-bit numbers that depend only on `counter` and `key`."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((b >> 32) ^ c[1] ^ k[0], b & _MASK, (a >> 32) ^ c[3] ^ k[1], a & _MASK)
        k = ((k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK)
    return c


def random_bits(task: SampleTask, purpose: int = 0) -> int:
    """Returns 64 random bits for the next token. Purpose 0 draws the token, and purpose 1 decides on XTC."""
    low, high, _, _ = philox((task.position, task.choice, purpose, 0), (task.seed & _MASK, task.seed >> 32))
    return high << 32 | low


def ranked(logits: Float32) -> NDArray[np.int64]:
    order = np.lexsort((np.arange(len(logits)), -logits))
    return order[np.isfinite(logits[order])]


@dataclass(slots=True)
class Candidates:
    """The candidates of one row. `order` has their ids, best first. The logit of a candidate is its value /
    `divisor`."""

    values: Float32  # [vocabulary]; -inf for tokens that must not be chosen.
    task: SampleTask
    chain: SamplerChain
    order: NDArray[np.int64] = field(init=False)
    divisor: float = 1.0
    w: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order = ranked(self.values)

    def keep(self, count: int) -> None:
        self.order = self.order[:count]

    def change(self, change: Callable[[Float32], None]) -> None:
        """Applies `change` to the logits in place, and sorts the candidates again."""
        x = np.full_like(self.values, -np.inf)
        with np.errstate(over="ignore"):
            x[self.order] = np.clip(self.values[self.order] / np.float32(self.divisor), -LARGEST, LARGEST)
        change(x)
        self.values, self.divisor, self.order = x, 1.0, ranked(x)

    def _logits(self) -> Float32:
        with np.errstate(over="ignore"):
            x = (self.values[self.order] - self.values[self.order[0]]) / np.float32(self.divisor)
        return np.asarray(x, np.float32)

    def weigh(self) -> list[int]:
        """Returns exp(logit - largest logit) of each candidate, in units of 2^-40. Sums of these integers are exact."""
        self.w = [int(w) for w in np.rint(exp32(self._logits()).astype(np.float64) * UNIT_WEIGHT)]
        return self.w

    def information(self) -> list[float]:
        """Returns -ln of each candidate's probability. `weigh` must be called first."""
        log_total = log64(float(sum(self.w)) / UNIT_WEIGHT)
        return [log_total - float(x) for x in self._logits()]

    def entropy(self) -> float:
        total = 0.0
        for weight, information in zip(self.w, self.information(), strict=True):
            if weight > 0:
                total += float(weight) * information
        return total / float(sum(self.w))

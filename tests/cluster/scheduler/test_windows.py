"""Tests chains of windows: the best chain gives the most tokens a second."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from llamaclust.cluster.scheduler.speculation.candidates import Chain
from llamaclust.cluster.scheduler.speculation.costs import counts_to_try
from llamaclust.cluster.scheduler.speculation.windows import best_chain
from support.seed import SEED

LENGTH = 128
MOST = 32


@dataclass(frozen=True, slots=True)
class Times:
    """The times of equal stages."""

    stages: int
    hops_us: float
    fixed_us: float
    row_us: float

    def plain_ns(self, sequences: int, groups: int) -> float:
        return self.window_ns(sequences, groups)

    def window_ns(self, rows: int, groups: int) -> float:
        return self.stages * self.slowest_ns(rows) + 1e3 * self.hops_us

    def slowest_ns(self, rows: int) -> float:
        return 1e3 * (self.fixed_us + self.row_us * rows)


def drawn(draw: random.Random) -> Times:
    return Times(draw.randint(2, 8), draw.choice([0.0, 300.0, 20_000.0]), 1000.0, draw.uniform(1.0, 300.0))


def speed(chain: Chain | None) -> float:
    return 0.0 if chain is None else chain.speed


@pytest.mark.parametrize("seed", range(SEED, SEED + 30))
def test_no_window_of_fewer_tokens_would_be_faster(seed: int) -> None:
    draw = random.Random(seed)
    times, rate = drawn(draw), draw.uniform(0.3, 0.99)
    best = best_chain(rate, LENGTH, times, MOST)
    speeds = [speed(best_chain(rate, LENGTH, times, most)) for most in counts_to_try(MOST)]
    assert speed(best) == max(speeds) > 0.0

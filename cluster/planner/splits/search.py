"""Searches for the best split by dynamic programming, exactly for few workers. Workers may stay idle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.splits.dynamic_program import Split, Steps
from llamaclust.cluster.planner.splits.holders import StageTable
from llamaclust.cluster.planner.work import Work

CLOSE = 0.995
"""The search ends if no other split can take less than this fraction of the best time so far."""
CLEARLY_BETTER = 0.98
"""A split with groups, or in another order than the cluster file, must take less than this fraction of the time of a
simpler split."""


@dataclass(frozen=True, slots=True)
class SplitSearch:
    """A search for the best split for one workload. `limits` has ascending time limits to try for the slowest stage."""

    steps: Steps
    work: Work
    limits: Table
    least_slowest: float = 0.0  # Lower bound of the slowest stage's time in any split.

    def best(self, below: float) -> Split | None:
        """Returns the best split that takes less than `below` seconds, or None."""
        best: Split | None = None
        # (lower bound of the time, low, high) for limits[low:high]. The cheapest split at an interval's upper limit
        # is a lower bound for the total of all splits in the interval.
        open_ = [(self.work.seconds(self.least_slowest, 0.0), 0, len(self.limits))]
        while open_ and open_[0][0] < below:
            _, low, high = heappop(open_)
            most = below - self._least(low) if self.work.adds_up else inf
            split = self.steps.least(float(self.limits[high - 1]), most)
            if split is None:
                continue
            seconds = self.work.seconds(split.slowest, split.total)
            if seconds < below:
                best, below = split, CLOSE * seconds
            high = min(high - 1, int(np.searchsorted(self.limits, split.slowest)))
            for start, end in ((low, (low + high) // 2), ((low + high) // 2, high)):
                if start < end:
                    heappush(open_, (self.work.seconds(self._least(start), split.total), start, end))
        return best

    def _least(self, place: int) -> float:
        return max(self.least_slowest, float(self.limits[place - 1]) if place else 0.0)


@dataclass(frozen=True, slots=True)
class Best:
    split: Split
    search: SplitSearch
    seconds: float

    @property
    def work(self) -> int:
        """Index of the workload."""
        return self.search.steps.work


def best_of(kinds: Iterable[Sequence[SplitSearch]], below: float = inf) -> Best | None:
    """Returns the best split, or None. A split of a later kind is more complex, so it must be clearly faster to win."""
    best: Best | None = None
    for searches in kinds:
        limit = below if best is None else CLEARLY_BETTER * best.seconds
        for search in searches:
            split = search.best(limit)
            if split is not None:
                best = Best(split, search, search.work.seconds(split.slowest, split.total))
                limit = CLOSE * best.seconds
    return best


def stage_limits(tables: Iterable[StageTable]) -> Table:
    found: Table = np.unique(np.concatenate([table.slow[np.isfinite(table.slow)] for table in tables]))
    return found

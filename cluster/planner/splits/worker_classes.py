"""Classes of workers on which stages cost the same: the search treats their workers as interchangeable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.planner.costs import Table, WorkerFacts


@dataclass(frozen=True, slots=True, eq=False)
class WorkerClass:
    """Interchangeable workers, and the cost of a stage of layers [start, end) on one of them."""

    workers: tuple[int, ...]
    slow: Table  # of which the slowest stage should have little; infinite where a stage cannot be
    total: Table  # of which all stages together should have little

    @property
    def layers(self) -> int:
        return len(self.slow) - 1

    def costs_as(self, other: WorkerClass) -> bool:
        """Whether every stage costs the same on both."""
        return np.array_equal(self.slow, other.slow) and np.array_equal(self.total, other.total)

    def within(self, limit: float) -> NDArray[np.bool_]:
        """Which stages can be, and are within the limit."""
        return (self.slow <= limit) & (self.slow < inf)

    def allowed(self, limit: float) -> Table:
        """Totals of those stages."""
        return np.where(self.within(limit), self.total, inf)


def worker_classes(
    workers: Sequence[WorkerFacts], tables: Callable[[WorkerFacts], tuple[Table, Table]], unlike: Collection[str] = ()
) -> list[WorkerClass]:
    """Workers grouped by cost, those in `unlike` each alone; `tables` has (slow, total) of one worker of each."""
    alike: dict[WorkerFacts, list[int]] = {}
    for index, worker in enumerate(workers):
        alike.setdefault(worker if worker.name in unlike else replace(worker, name=""), []).append(index)
    return [WorkerClass(tuple(indices), *tables(facts)) for facts, indices in alike.items()]


Order = Sequence[tuple[int, WorkerClass]]
"""Workers in order, each with its class."""

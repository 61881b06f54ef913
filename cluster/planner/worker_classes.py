"""Workers by what stages cost on them: the plan's search treats those that are alike as one kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.planner.costs import Table, WorkerFacts


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Workers that are alike, and what a stage of layers [start, end) costs on one of them."""

    workers: tuple[int, ...]
    slow: Table  # of which the slowest stage should have little; infinite where a stage cannot be
    total: Table  # of which all stages together should have little

    @property
    def layers(self) -> int:
        return len(self.slow) - 1

    def costs_as(self, other: Kind) -> bool:
        """Whether every stage costs the same on both."""
        return np.array_equal(self.slow, other.slow) and np.array_equal(self.total, other.total)

    def within(self, limit: float) -> NDArray[np.bool_]:
        """Which stages can be, and are within the limit."""
        return (self.slow <= limit) & (self.slow < inf)

    def allowed(self, limit: float) -> Table:
        """Totals of those stages."""
        return np.where(self.within(limit), self.total, inf)


def kinds_of(
    workers: Sequence[WorkerFacts],
    tables: Callable[[WorkerFacts], tuple[Table, Table]],
    unlike: Collection[str] = (),
) -> list[Kind]:
    """Workers by kind, those named in `unlike` each of its own; `tables` says what is slow and what the total is of,
    for one of each."""
    alike: dict[WorkerFacts, list[int]] = {}
    for index, worker in enumerate(workers):
        alike.setdefault(worker if worker.name in unlike else replace(worker, name=""), []).append(index)
    return [Kind(tuple(indices), *tables(facts)) for facts, indices in alike.items()]


Order = Sequence[tuple[int, Kind]]
"""Workers one behind the other, each with its kind."""

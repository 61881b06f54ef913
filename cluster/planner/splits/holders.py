"""Holders of stages. A holder is a group of workers, or one of several interchangeable workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

import numpy as np

from llamaclust.cluster.planner.costs import Flags, Table, WorkerFacts


@dataclass(frozen=True, slots=True, eq=False)
class StageTable:
    slow: Table  # Cost of which the maximum over all stages counts. Infinite if the stage is impossible.
    total: Table  # Cost of which the sum over all stages counts.

    @property
    def layers(self) -> int:
        return len(self.slow) - 1

    def where(self, fits: Flags) -> StageTable:
        return StageTable(np.where(fits, self.slow, inf), self.total)

    def within(self, limit: float) -> Flags:
        return (self.slow <= limit) & (self.slow < inf)

    def allowed(self, limit: float) -> Table:
        return np.where(self.within(limit), self.total, inf)

    def equals(self, other: StageTable) -> bool:
        return np.array_equal(self.slow, other.slow) and np.array_equal(self.total, other.total)


class Holder(Protocol):
    @property
    def members(self) -> tuple[int, ...]:
        """The members' indices in the cluster file, leader first. `WorkerClass` has only its first worker's index."""
        ...

    def table(self, work: int) -> StageTable: ...


@dataclass(frozen=True, slots=True, eq=False)
class WorkerClass:
    workers: tuple[int, ...]
    tables: tuple[StageTable, ...]

    @property
    def members(self) -> tuple[int, ...]:
        return self.workers[:1]

    def table(self, work: int) -> StageTable:
        return self.tables[work]

    def costs_as(self, other: WorkerClass) -> bool:
        return all(one.equals(two) for one, two in zip(self.tables, other.tables, strict=True))


def worker_classes(
    workers: Sequence[WorkerFacts],
    tables: Callable[[WorkerFacts], tuple[StageTable, ...]],
    unlike: Collection[str] = (),
) -> list[WorkerClass]:
    """Groups equal workers into classes. Workers in `unlike` get separate classes. Calls `tables` once per class."""
    alike: dict[WorkerFacts, list[int]] = {}
    for index, worker in enumerate(workers):
        alike.setdefault(worker if worker.name in unlike else replace(worker, name=""), []).append(index)
    return [WorkerClass(tuple(indices), tables(facts)) for facts, indices in alike.items()]

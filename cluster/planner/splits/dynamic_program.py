"""Finds the split with the minimum total cost by dynamic programming. Each step assigns layers to a worker or group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf
from typing import Protocol

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.splits.holders import Holder, StageTable

Stage = tuple[int, int, int]
"""A stage as (holder number, start, end). The holder is a worker or a group, and has the layers [start, end)."""

Partitions = frozenset[frozenset[int]]
"""Pairs of workers, as indices in the cluster file."""

Counts = tuple[int, ...]
"""Numbers of workers by class."""


@dataclass(frozen=True, slots=True)
class Split:
    stages: tuple[Stage, ...]
    slowest: float
    total: float


@dataclass(frozen=True, slots=True)
class Step:
    holder: int
    before: tuple[int, ...]
    is_first: bool  # True if the holder may have the first stage.
    own: Counts = ()  # Numbers of the holder's workers by class. Empty: unknown.
    left: Counts = ()  # Numbers of unused workers by class after this step.


@dataclass(frozen=True, slots=True)
class Choice:
    """A step that compares the steps in `before`. It keeps the cheapest one for each number of assigned layers."""

    before: tuple[int, ...]


Places = Sequence[Step | Choice]


@dataclass(frozen=True, slots=True)
class Ends:
    """Constraints for the first and the last stage. Only workers in `first` may lead the first stage (None: all
    workers). Workers in `not_last` must not lead the last stage."""

    first: Collection[int] | None = None
    not_last: Collection[int] = ()


class Bounds(Protocol):
    """Lower bounds of the cost of layers. `workers` has the numbers of available workers by class."""

    def together(self, workers: Counts) -> Table:
        """Returns lower bounds of costs. Entry n is for layers [0, n), computed by all `workers` as one group."""
        ...

    def of_rest(self, workers: Counts) -> Table:
        """Returns lower bounds of costs. Entry n is for layers [n, end), with `workers` in groups or alone."""
        ...


@dataclass(slots=True, eq=False)
class Steps:
    places: Places
    holders: Sequence[Holder]
    work: int
    ends: Sequence[Ends] = (Ends(),)
    bounds: Bounds | None = None

    def least(self, limit: float, most_total: float = inf) -> Split | None:
        """Returns the cheapest split whose slowest stage takes at most `limit`, or None if there is none."""
        tables = dict[int, tuple[StageTable, Table]]()
        runs = (_Run(self, ends, tables, limit, most_total) for ends in self.ends)
        splits = [split for run in runs if (split := run.least()) is not None]
        return min(splits, key=lambda split: split.total, default=None)


class _Run:
    def __init__(
        self,
        steps: Steps,
        ends: Ends,
        tables: dict[int, tuple[StageTable, Table]],
        limit: float,
        most_total: float,
    ) -> None:
        self._steps, self._ends, self._tables = steps, ends, tables
        self._limit, self._most = limit, most_total
        self._layers = self._table(0)[0].layers
        self._never = np.full(self._layers + 1, inf)
        self._best: list[Table] = []  # Minimum cost at each step, by number of assigned layers.
        self._before: list[Table] = []  # Like `_best`, but without the stage of the step itself.

    def least(self) -> Split | None:
        last, least = None, inf
        for number, place in enumerate(self._steps.places):
            costs = self._cheapest(place.before)
            if isinstance(place, Choice):
                self._before.append(costs)
                self._best.append(costs)
                continue
            leader = self._steps.holders[place.holder].members[0]
            if place.is_first and (self._ends.first is None or leader in self._ends.first):
                costs = costs.copy()
                costs[0] = 0.0
            self._before.append(costs)
            self._best.append(self._never if costs is self._never else self._extended(costs, place))
            total = float(self._best[-1][self._layers])
            if total < least and leader not in self._ends.not_last:
                last, least = number, total
        return None if last is None else self._split(last)

    def _table(self, holder: int) -> tuple[StageTable, Table]:
        if holder not in self._tables:
            table = self._steps.holders[holder].table(self._steps.work)
            self._tables[holder] = table, table.allowed(self._limit)
        return self._tables[holder]

    def _extended(self, costs: Table, place: Step) -> Table:
        """Adds a step's stage to `costs`. The result is infinite where the whole split would exceed the limit."""
        bounds = self._steps.bounds if place.own and self._most < inf else None
        rest: Table = np.zeros(1)
        if bounds is not None:
            own, rest = bounds.together(place.own), bounds.of_rest(place.left)
            if (np.minimum.accumulate(costs - own) + own + rest).min() > self._most:
                return self._never
        totals: Table = (costs[:, np.newaxis] + self._table(place.holder)[1]).min(axis=0)
        if self._most < inf:
            totals[totals + rest > self._most] = inf
        return totals if totals.min() < inf else self._never

    def _cheapest(self, places: tuple[int, ...]) -> Table:
        found = [self._best[place] for place in places if self._best[place] is not self._never]
        if len(found) < 2:
            return found[0] if found else self._never
        least: Table = np.minimum.reduce(found)
        return least

    def _split(self, last: int) -> Split:
        stages: list[Stage] = []
        number, end = last, self._layers
        while end:
            place = self._steps.places[number]
            if isinstance(place, Step):
                start = int((self._before[number] + self._table(place.holder)[1][:, end]).argmin())
                stages.append((place.holder, start, end))
                end = start
            if end:
                number = min(place.before, key=lambda one: float(self._best[one][end]))
        costs = [(self._table(holder)[0], start, end) for holder, start, end in reversed(stages)]
        slowest = max(float(table.slow[start, end]) for table, start, end in costs)
        total = sum(float(table.total[start, end]) for table, start, end in costs)
        return Split(tuple(reversed(stages)), slowest, total)


HolderOf = Callable[[tuple[int, ...]], int | None]
"""Returns the number of the holder with these workers, or None if they cannot hold a stage together."""
LeaderOf = Callable[[int], int]


def in_order(
    order: Sequence[int],
    sizes: Sequence[int],
    holder_of: HolderOf,
    leader_of: LeaderOf,
    partitions: Partitions = frozenset(),
) -> Places:
    """Returns the dynamic program's steps for one order of workers. The members of a group must be adjacent in this
    order. The two workers of a pair in `partitions` never lead adjacent stages."""
    places: list[Step | Choice] = []
    # For the first n workers in the order: indices of their steps, and the index of the choice among these steps.
    upto: list[tuple[list[int], tuple[int, ...]]] = [([], ())]
    for end in range(1, len(order) + 1):
        steps, choice = [*upto[-1][0]], upto[-1][1]
        for size in (size for size in sizes if size <= end):
            holder = holder_of(tuple(order[end - size : end]))
            if holder is not None:
                before = _following(leader_of(holder), *upto[end - size], places, leader_of, partitions)
                steps.append(len(places))
                places.append(Step(holder, before, is_first=True))
        new = steps[len(upto[-1][0]) :]
        if new:
            places.append(Choice((*choice, *new)))
            choice = (len(places) - 1,)
        upto.append((steps, choice))
    return places


@lru_cache(maxsize=8)
def any_order(
    sizes: Counts,
    held_by: tuple[tuple[Counts, int], ...],
    leaders: tuple[int, ...],
    partitions: Partitions = frozenset(),
) -> Places:
    """Returns the dynamic program's steps for all sets of workers in all orders. `held_by` has pairs (numbers of
    workers by class, index of the holder with these workers). A worker in `partitions` must be alone in its class."""
    numbers = dict(held_by)
    places: list[Step | Choice] = []
    found: dict[Counts, tuple[list[int], tuple[int, ...]]] = {}  # Steps and choices by used workers.
    for used in product(*(range(size + 1) for size in sizes)):
        left = tuple(size - count for size, count in zip(sizes, used, strict=True))
        steps: list[int] = []
        for last in _within(used, numbers):
            before = tuple(count - more for count, more in zip(used, last, strict=True))
            if last not in numbers or (any(before) and not found[before][0]):
                continue
            holder = numbers[last]
            reached = _following(leaders[holder], *found[before], places, leaders.__getitem__, partitions)
            steps.append(len(places))
            places.append(Step(holder, reached, not any(before), last, left))
        if steps:
            places.append(Choice(tuple(steps)))
        found[used] = steps, (len(places) - 1,) if steps else ()
    return places


def _within(used: Counts, held_by: Collection[Counts]) -> Sequence[Counts]:
    subsets = 1
    for count in used:
        subsets *= count + 1
    if subsets < len(held_by):
        return [*product(*(range(count + 1) for count in used))][1:]
    return [one for one in held_by if all(more <= count for more, count in zip(one, used, strict=True))]


def _following(
    leader: int,
    steps: Sequence[int],
    choice: tuple[int, ...],
    places: Places,
    leader_of: LeaderOf,
    partitions: Partitions,
) -> tuple[int, ...]:
    if not any(leader in pair for pair in partitions):
        return choice
    reached = []
    for at in steps:
        step = places[at]
        assert isinstance(step, Step)
        if frozenset((leader, leader_of(step.holder))) not in partitions:
            reached.append(at)
    return tuple(reached)


def steps_in_any_order(sizes: Sequence[int], held_by: Sequence[Counts]) -> int:
    total = 0
    for counts in held_by:
        steps = 1
        for size, count in zip(sizes, counts, strict=True):
            steps *= size + 1 - count
        total += steps
    return total


def constrained_ends(workers: Collection[int], partitions: Partitions) -> list[Ends]:
    """Returns alternative constraints. Under each of them, the leaders of the first and the last stage are never a pair
    in `partitions`."""
    bound = sorted(worker for worker in workers if any(worker in pair for pair in partitions))
    ends = [Ends(frozenset(workers) - frozenset(bound))]
    for first in bound:
        ends.append(Ends({first}, {other for other in bound if frozenset((first, other)) in partitions}))
    return ends

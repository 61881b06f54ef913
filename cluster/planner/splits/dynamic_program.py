"""Splits with the least total cost, by dynamic programming over steps: each gives the next layers to one more worker.
Pure.

The steps define which workers may be used in which orders, and which may follow which.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.splits.worker_classes import Order, WorkerClass

Stage = tuple[int, int, int]
"""(worker, start, end): layers [start, end) on a worker, by its place in the file."""

Ways = frozenset[frozenset[int]]
"""Pairs of workers, by their places in the file."""


@dataclass(frozen=True, slots=True)
class Split:
    """Stages in order, from the first layer to the last."""

    stages: tuple[Stage, ...]
    slowest: float
    total: float


@dataclass(frozen=True, slots=True)
class Step:
    """One more worker gets the next layers. `before`: positions of possible predecessors among steps and choices."""

    worker: int
    worker_class: WorkerClass
    before: tuple[int, ...]
    is_first: bool  # it may be


@dataclass(frozen=True, slots=True)
class Choice:
    """The best of these; the first one of equals."""

    before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ends:
    """Workers that may be first (None: all), and those that must not be last then."""

    first: Collection[int] | None = None
    not_last: Collection[int] = ()


class Steps:
    """All splits along steps, with any of `ends`."""

    def __init__(self, places: Sequence[Step | Choice], ends: Sequence[Ends] = (Ends(),)) -> None:
        self._places = places
        self._ends = ends
        self._kinds = {id(place.worker_class): place.worker_class for place in places if isinstance(place, Step)}
        self._layers = next(iter(self._kinds.values())).layers

    def least(self, limit: float) -> Split | None:
        """The split with the least total whose slowest stage is within the limit; None where there is none."""
        allowed = {key: worker_class.allowed(limit) for key, worker_class in self._kinds.items()}
        splits = [split for ends in self._ends if (split := self._least(allowed, ends)) is not None]
        return min(splits, key=lambda split: split.total, default=None)

    def _least(self, allowed: dict[int, Table], ends: Ends) -> Split | None:
        never = np.full(self._layers + 1, inf)
        best: list[Table] = []  # of each place: [layers covered]
        before: list[Table] = []  # the same without its own stage
        last, least = None, inf
        for number, place in enumerate(self._places):
            costs = _cheapest(best, place.before, never)
            if isinstance(place, Choice):
                best.append(costs)
                before.append(costs)
                continue
            if place.is_first and (ends.first is None or place.worker in ends.first):
                costs = costs.copy()
                costs[0] = 0.0
            before.append(costs)
            own = allowed[id(place.worker_class)]
            best.append(never if costs is never else (costs[:, np.newaxis] + own).min(axis=0))
            if best[-1][self._layers] < least and place.worker not in ends.not_last:
                last, least = number, float(best[-1][self._layers])
        return None if last is None else self._walk(allowed, before, best, last)

    def _walk(self, allowed: dict[int, Table], before: Sequence[Table], best: Sequence[Table], last: int) -> Split:
        """The split behind best[last][layers]."""
        stages: list[tuple[int, WorkerClass, int, int]] = []  # the last one first
        number, end = last, self._layers
        while end:
            place = self._places[number]
            if isinstance(place, Step):
                start = int((before[number] + allowed[id(place.worker_class)][:, end]).argmin())
                stages.append((place.worker, place.worker_class, start, end))
                end = start
            if end:
                number = min(place.before, key=lambda one: float(best[one][end]))
        slowest = max(float(worker_class.slow[start, end]) for _, worker_class, start, end in stages)
        total = sum(float(worker_class.total[start, end]) for _, worker_class, start, end in stages)
        return Split(tuple((worker, start, end) for worker, _, start, end in reversed(stages)), slowest, total)


def _cheapest(best: Sequence[Table], places: tuple[int, ...], never: Table) -> Table:
    if len(places) < 2:
        return best[places[0]] if places else never
    least: Table = np.minimum.reduce([best[place] for place in places])
    return least


def in_order(order: Order, partitions: Ways = frozenset()) -> list[Step | Choice]:
    """Workers in one order, any of which may be unused. Pairs in `partitions` are not adjacent."""
    places: list[Step | Choice] = []
    steps: list[Step] = []
    at: list[int] = []  # places of the steps
    so_far: tuple[int, ...] = ()  # the choice of all of them
    for worker, worker_class in order:
        before = _beside(worker, steps, at, partitions) if _is_bound(worker, partitions) else so_far
        steps.append(Step(worker, worker_class, before, is_first=True))
        at.append(len(places))
        places += (steps[-1], Choice((*so_far, at[-1])))
        so_far = (len(places) - 1,)
    return places


def any_order(classes: Sequence[WorkerClass], partitions: Ways = frozenset()) -> list[Step | Choice]:
    """Any workers in any order, the first ones of a class before its others: a step for each combination of numbers of
    workers used of each class, and for each class of the last worker. Workers of pairs have classes of their own."""
    places: list[Step | Choice] = []
    found: dict[tuple[int, ...], tuple[list[Step], list[int], tuple[int, ...]]] = {}  # by workers used
    for used in np.ndindex(*(len(worker_class.workers) + 1 for worker_class in classes)):
        steps: list[Step] = []
        first = len(places)
        for number, worker_class in enumerate(classes):
            if used[number]:
                fewer = (*used[:number], used[number] - 1, *used[number + 1 :])
                worker = worker_class.workers[used[number] - 1]
                others, at, choice = found[fewer]
                before = _beside(worker, others, at, partitions) if _is_bound(worker, partitions) else choice
                steps.append(Step(worker, worker_class, before, is_first=not any(fewer)))
        places += steps
        own = list(range(first, len(places)))
        if own:
            places.append(Choice(tuple(own)))
        found[used] = steps, own, (len(places) - 1,) if own else ()
    return places


def any_order_steps(classes: Sequence[WorkerClass]) -> int:
    """How many steps those are."""
    sizes = [len(worker_class.workers) + 1 for worker_class in classes]
    return sum(prod(sizes) // size * (size - 1) for size in sizes)


def constrained_ends(workers: Collection[int], partitions: Ways) -> list[Ends]:
    """The last worker is adjacent to the first one. So each worker of a pair is tried as the first,
    and all others at once."""
    bound = sorted(worker for worker in workers if _is_bound(worker, partitions))
    ends = [Ends(frozenset(workers) - frozenset(bound))]
    for first in bound:
        ends.append(Ends({first}, {other for other in bound if frozenset((first, other)) in partitions}))
    return ends


def _is_bound(worker: int, partitions: Ways) -> bool:
    return any(worker in pair for pair in partitions)


def _beside(worker: int, steps: Sequence[Step], at: Sequence[int], partitions: Ways) -> tuple[int, ...]:
    """Positions of the steps whose workers it may follow."""
    reached = (frozenset((worker, step.worker)) not in partitions for step in steps)
    return tuple(place for place, is_fine in zip(at, reached, strict=True) if is_fine)

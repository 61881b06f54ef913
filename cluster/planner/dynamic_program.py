"""Cuts along steps, each of which gives the next layers to one more worker: the least total, by dynamic programming.
Pure.

Which steps there are says which workers may be used in which orders, and who may stand behind whom: every search of the
planner is one along some steps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.worker_classes import Kind, Order

Stage = tuple[int, int, int]
"""(worker, start, end): layers [start, end) on a worker, by its place in the file."""

Ways = frozenset[frozenset[int]]
"""Pairs of workers, by their places in the file."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Stages in order, from the first layer to the last."""

    stages: tuple[Stage, ...]
    slowest: float
    total: float


@dataclass(frozen=True, slots=True)
class Step:
    """One more worker has layers: the last ones so far. What was before it, by place among steps and choices."""

    worker: int
    kind: Kind
    before: tuple[int, ...]
    is_first: bool  # it may be


@dataclass(frozen=True, slots=True)
class Choice:
    """Whichever of these is best, the first one of those that are as good."""

    before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ends:
    """Who may be first, and who is not the last one then; `first` None: all."""

    first: Collection[int] | None = None
    not_last: Collection[int] = ()


class Steps:
    """Every cut along them, with any of those `ends`."""

    def __init__(self, places: Sequence[Step | Choice], ends: Sequence[Ends] = (Ends(),)) -> None:
        self._places = places
        self._ends = ends
        self._kinds = {id(place.kind): place.kind for place in places if isinstance(place, Step)}
        self._layers = next(iter(self._kinds.values())).layers

    def least(self, limit: float) -> Cut | None:
        """The one with the least total of those whose slowest stage is within the limit; None where there is none."""
        allowed = {key: kind.allowed(limit) for key, kind in self._kinds.items()}
        cuts = [cut for ends in self._ends if (cut := self._least(allowed, ends)) is not None]
        return min(cuts, key=lambda cut: cut.total, default=None)

    def _least(self, allowed: dict[int, Table], ends: Ends) -> Cut | None:
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
            best.append(never if costs is never else (costs[:, np.newaxis] + allowed[id(place.kind)]).min(axis=0))
            if best[-1][self._layers] < least and place.worker not in ends.not_last:
                last, least = number, float(best[-1][self._layers])
        return None if last is None else self._walk(allowed, before, best, last)

    def _walk(self, allowed: dict[int, Table], before: Sequence[Table], best: Sequence[Table], last: int) -> Cut:
        """The cut behind best[last][layers]."""
        stages: list[tuple[int, Kind, int, int]] = []
        number, end = last, self._layers
        while end:
            place = self._places[number]
            if isinstance(place, Step):
                start = int((before[number] + allowed[id(place.kind)][:, end]).argmin())
                stages.append((place.worker, place.kind, start, end))
                end = start
            if end:
                number = min(place.before, key=lambda one: float(best[one][end]))
        return _cut(stages)


def _cheapest(best: Sequence[Table], places: tuple[int, ...], never: Table) -> Table:
    if len(places) < 2:
        return best[places[0]] if places else never
    least: Table = np.minimum.reduce([best[place] for place in places])
    return least


def _cut(backwards: Sequence[tuple[int, Kind, int, int]]) -> Cut:
    """Of stages from the last to the first."""
    stages = tuple((worker, start, end) for worker, _, start, end in reversed(backwards))
    slowest = max(float(kind.slow[start, end]) for _, kind, start, end in backwards)
    return Cut(stages, slowest, sum(float(kind.total[start, end]) for _, kind, start, end in backwards))


def in_order(order: Order, apart: Ways = frozenset()) -> list[Step | Choice]:
    """Of workers in one order; each may be left out. Pairs that are `apart` do not stand side by side."""
    places: list[Step | Choice] = []
    steps: list[Step] = []
    at: list[int] = []  # places of the steps
    so_far: tuple[int, ...] = ()  # the choice of all of them
    for worker, kind in order:
        before = _beside(worker, steps, at, apart) if _is_bound(worker, apart) else so_far
        steps.append(Step(worker, kind, before, is_first=True))
        at.append(len(places))
        places += (steps[-1], Choice((*so_far, at[-1])))
        so_far = (len(places) - 1,)
    return places


def any_order(kinds: Sequence[Kind], apart: Ways = frozenset()) -> list[Step | Choice]:
    """Of any workers in any order, of those that are alike the first ones: a step for each number of workers used of
    each kind, and for each kind of the last of them. Workers of pairs that are `apart` are each of their own kind."""
    places: list[Step | Choice] = []
    found: dict[tuple[int, ...], tuple[list[Step], list[int], tuple[int, ...]]] = {}  # by workers used
    for used in np.ndindex(*(len(kind.workers) + 1 for kind in kinds)):
        steps: list[Step] = []
        first = len(places)
        for number, kind in enumerate(kinds):
            if used[number]:
                fewer = (*used[:number], used[number] - 1, *used[number + 1 :])
                worker = kind.workers[used[number] - 1]
                others, at, choice = found[fewer]
                before = _beside(worker, others, at, apart) if _is_bound(worker, apart) else choice
                steps.append(Step(worker, kind, before, is_first=not any(fewer)))
        places += steps
        own = list(range(first, len(places)))
        if own:
            places.append(Choice(tuple(own)))
        found[used] = steps, own, (len(places) - 1,) if own else ()
    return places


def any_order_steps(kinds: Sequence[Kind]) -> int:
    """How many steps those are."""
    sizes = [len(kind.workers) + 1 for kind in kinds]
    return sum(prod(sizes) // size * (size - 1) for size in sizes)


def ends_apart(workers: Collection[int], apart: Ways) -> list[Ends]:
    """The last worker stands beside the first one. Which one is first decides who may be the last one, so it is tried
    with each of those that are apart from somebody, and with all the others at once."""
    bound = sorted(worker for worker in workers if _is_bound(worker, apart))
    ends = [Ends(frozenset(workers) - frozenset(bound))]
    for first in bound:
        ends.append(Ends({first}, {other for other in bound if frozenset((first, other)) in apart}))
    return ends


def _is_bound(worker: int, apart: Ways) -> bool:
    return any(worker in pair for pair in apart)


def _beside(worker: int, steps: Sequence[Step], at: Sequence[int], apart: Ways) -> tuple[int, ...]:
    """Places of the steps whose workers it may stand behind."""
    reached = (frozenset((worker, step.worker)) not in apart for step in steps)
    return tuple(place for place, is_fine in zip(at, reached, strict=True) if is_fine)

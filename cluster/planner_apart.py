"""Cuts in which some workers are not neighbours: pairs that cannot reach each other. Pure.

Neighbours are stages that follow each other, and the last and the first one, for tokens go from that to this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np

from llamaclust.cluster.costs import Table
from llamaclust.cluster.planner_kinds import Kind, Order
from llamaclust.cluster.planner_search import Cut, Way

Pair = frozenset[str]
Pairs = frozenset[Pair]
"""Workers that are no neighbours, by name."""

_MOST_STEPS = 1024
"""All orders are tried where that takes no more."""


def split(ring: Sequence[str], apart: Pairs) -> Pair | None:
    """A pair that is apart and whose workers are neighbours in these stages' order; None where there is none."""
    neighbours = (frozenset((one, ring[place - 1])) for place, one in enumerate(ring))
    return next((pair for pair in neighbours if pair in apart), None)


def names_in(pairs: Pairs) -> frozenset[str]:
    return frozenset[str]().union(*pairs)


def ways_apart(kinds: Sequence[Kind], names: Sequence[str], apart: Pairs) -> list[Way]:
    """Ways that keep pairs apart. Workers of pairs must each be of a kind of its own; `names`: of all, in the file's
    order."""
    file = sorted((worker, kind) for kind in kinds for worker in kind.workers)
    if _steps(kinds) * (1 + len(names_in(apart))) <= _MOST_STEPS:
        return [
            _Apart(_in_order(file, names, apart), names, apart),
            _Apart(_any_order(kinds, names, apart), names, apart),
        ]
    orders = [file, _spread(file, names, apart), _spread(file[::-1], names, apart)[::-1]]
    return [_Apart(_in_order(order, names, apart), names, apart) for order in orders]


@dataclass(frozen=True, slots=True)
class _Step:
    """One more worker has layers: the last ones so far. Which ones were before it, by their place among all steps."""

    worker: int
    kind: Kind
    before: tuple[int, ...]
    is_first: bool  # it may be


class _Apart:
    """Every cut along steps. Which worker is first decides who may be the last one, so it is tried with each of those
    that are apart from somebody, and with all the others at once."""

    def __init__(self, steps: Sequence[_Step], names: Sequence[str], apart: Pairs) -> None:
        self._steps = steps
        bound = {worker for worker, name in enumerate(names) if name in names_in(apart)}
        free = frozenset({step.worker for step in steps} - bound)
        self._ends = [(free, frozenset[int]())]  # (first workers, which ones are not the last then)
        for first in sorted(bound):
            others = frozenset(other for other in bound if frozenset((names[first], names[other])) in apart)
            self._ends.append((frozenset((first,)), others))

    def least(self, limit: float) -> Cut | None:
        allowed = {id(step.kind): step.kind.allowed(limit) for step in self._steps}
        tables = [allowed[id(step.kind)] for step in self._steps]
        cuts = [cut for ends in self._ends if (cut := self._least(tables, *ends)) is not None]
        return min(cuts, key=lambda cut: cut.total, default=None)

    def _least(self, tables: Sequence[Table], first: Collection[int], not_last: Collection[int]) -> Cut | None:
        layers = self._steps[0].kind.layers
        never = np.full(layers + 1, inf)
        so_far: list[Table] = []  # of each step: [layers covered]
        best: list[Table] = []
        for step, table in zip(self._steps, tables, strict=True):
            costs = np.minimum.reduce([best[place] for place in step.before], initial=inf) if step.before else never
            if step.is_first and step.worker in first:
                costs = np.where(np.arange(layers + 1) == 0, 0.0, costs)
            so_far.append(np.broadcast_to(costs, never.shape))
            best.append(never if np.isinf(costs).all() else (costs[:, np.newaxis] + table).min(axis=0))
        ends = [place for place, step in enumerate(self._steps) if step.worker not in not_last]
        last = min(ends, key=lambda place: float(best[place][layers]), default=None)
        return None if last is None or best[last][layers] == inf else self._walk(tables, so_far, best, last)

    def _walk(self, tables: Sequence[Table], so_far: Sequence[Table], best: Sequence[Table], last: int) -> Cut:
        """The cut behind best[last][layers]."""
        stages: list[tuple[int, Kind, int, int]] = []
        place, end = last, self._steps[0].kind.layers
        while end:
            step = self._steps[place]
            start = int((so_far[place] + tables[place][:, end]).argmin())
            stages.append((step.worker, step.kind, start, end))
            if start:
                place = min(step.before, key=lambda before: float(best[before][start]))
            end = start
        stages.reverse()
        slowest = max(float(kind.slow[start, end]) for _, kind, start, end in stages)
        total = sum(float(kind.total[start, end]) for _, kind, start, end in stages)
        return Cut(tuple((worker, start, end) for worker, _, start, end in stages), slowest, total)


def _in_order(order: Order, names: Sequence[str], apart: Pairs) -> list[_Step]:
    """Of workers in one order; each may be left out."""
    return [
        _Step(
            worker,
            kind,
            tuple(place for place, (other, _) in enumerate(order[:own]) if _fine(names, worker, other, apart)),
            is_first=True,
        )
        for own, (worker, kind) in enumerate(order)
    ]


def _fine(names: Sequence[str], one: int, other: int, apart: Pairs) -> bool:
    return frozenset((names[one], names[other])) not in apart


def _steps(kinds: Sequence[Kind]) -> int:
    sizes = [len(kind.workers) + 1 for kind in kinds]
    return sum(prod(sizes) // size * (size - 1) for size in sizes)


def _any_order(kinds: Sequence[Kind], names: Sequence[str], apart: Pairs) -> list[_Step]:
    """Of any workers in any order: a step for each number of workers used of each kind, and for each kind of the last
    of them."""
    steps: list[_Step] = []
    places: dict[tuple[int, ...], list[int]] = {}  # by workers used
    for used in np.ndindex(*(len(kind.workers) + 1 for kind in kinds)):
        places[used] = []
        for number, kind in enumerate(kinds):
            if used[number]:
                fewer = (*used[:number], used[number] - 1, *used[number + 1 :])
                worker = kind.workers[used[number] - 1]
                before = [at for at in places[fewer] if _fine(names, worker, steps[at].worker, apart)]
                places[used].append(len(steps))
                steps.append(_Step(worker, kind, tuple(before), is_first=not any(fewer)))
    return steps


def _spread(order: Order, names: Sequence[str], apart: Pairs) -> Order:
    """As like the order as can be with no pair side by side; who finds no such place stands at the end."""
    spread: list[tuple[int, Kind]] = []
    waiting = list(order)
    while waiting:
        fitting = (one for one in waiting if not spread or _fine(names, one[0], spread[-1][0], apart))
        taken = next(fitting, None)
        if taken is None:
            break
        waiting.remove(taken)
        spread.append(taken)
    for one in waiting:
        spread.insert(next(_gaps(spread, one[0], names, apart), len(spread)), one)
    return spread


def _gaps(order: Order, worker: int, names: Sequence[str], apart: Pairs) -> Iterator[int]:
    """Where a worker can stand with neighbours that it reaches."""
    for place in range(len(order)):
        if all(_fine(names, worker, other, apart) for other in (order[place - 1][0], order[place][0])):
            yield place

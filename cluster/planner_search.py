"""Who gets which layers: the best cut over all sets and orders of workers, by dynamic programming.

Exact for a few workers, or many of a few kinds; else over orders that are likely, with a bound on what any cut could
reach. A cut is judged by its slowest stage and by the sum over its stages; a worker may stay without layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf, prod
from typing import Protocol

import numpy as np

from llamaclust.cluster.costs import Table
from llamaclust.cluster.planner_kinds import Kind, Order
from llamaclust.cluster.planner_orders import least_possible, likely_orders

_MOST_STEPS = 8 * (1 << 8) // 2
"""All orders are tried where that takes no more steps than with eight workers that are all different."""

_CLOSE = 0.99
"""A cut that is not better by more than this is not looked for."""

_CLEARLY_BETTER = 0.95
"""So much better a cut must be for another order than the file's."""

Stage = tuple[int, int, int]
"""(worker, start, end): layers [start, end) on a worker, by its place in the file."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Stages in order, from the first layer to the last."""

    stages: tuple[Stage, ...]
    slowest: float
    total: float


@dataclass(frozen=True, slots=True)
class Aim:
    """The least slowest * total ** `total_weight` with a total of `most_total` at most; equal ones by their total."""

    total_weight: int = 0
    most_total: float = inf

    def score(self, slowest: float, total: float) -> float:
        return float(slowest * total**self.total_weight)


class Way(Protocol):
    """Some set of cuts."""

    def least(self, limit: float) -> Cut | None:
        """The one with the least total of those whose slowest stage is within the limit; None where there is none."""
        ...


class GivenOrder:
    """Every cut of workers in one order."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def least(self, limit: float) -> Cut | None:
        layers = self._order[0][1].layers
        allowed = {id(kind): kind.allowed(limit) for _, kind in self._order}
        tables = [allowed[id(kind)] for _, kind in self._order]
        best = [_nothing(layers)]  # [workers asked][layers covered]
        for table in tables:
            best.append(np.minimum(best[-1], _one_more(best[-1], table)))
        if best[-1][layers] == inf:
            return None
        stages: list[tuple[int, Kind, int, int]] = []
        end = layers
        for index in reversed(range(len(tables))):
            if best[index + 1][end] < best[index][end]:
                start = int((best[index] + tables[index][:, end]).argmin())
                stages.append((*self._order[index], start, end))
                end = start
        return _cut(stages)


class AnyOrder:
    """Every cut of any workers in any order. Of workers that are alike only the number counts."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self._sizes = tuple(len(kind.workers) + 1 for kind in kinds)

    @property
    def steps(self) -> int:
        """How often one more worker is added."""
        return sum(prod(self._sizes) // size * (size - 1) for size in self._sizes)

    def least(self, limit: float) -> Cut | None:
        layers = self._kinds[0].layers
        tables = [kind.allowed(limit) for kind in self._kinds]
        best: dict[tuple[int, ...], Table] = {}  # [workers used of each kind][layers covered]
        for used in np.ndindex(*self._sizes):
            reached = [_one_more(best[before], tables[kind]) for kind, before in _one_less(used)]
            best[used] = np.minimum.reduce(reached) if reached else _nothing(layers)
        used = min(best, key=lambda used: float(best[used][layers]))
        return None if best[used][layers] == inf else self._walk(best, used, tables)

    def _walk(self, best: dict[tuple[int, ...], Table], used: tuple[int, ...], tables: Sequence[Table]) -> Cut:
        """The cut behind best[used][layers]."""
        stages: list[tuple[int, Kind, int, int]] = []
        end = self._kinds[0].layers
        while any(used):
            ways = [(best[before] + tables[kind][:, end], kind, before) for kind, before in _one_less(used)]
            costs, number, before = min(ways, key=lambda way: float(way[0].min()))
            kind, start = self._kinds[number], int(costs.argmin())
            stages.append((kind.workers[used[number] - 1], kind, start, end))
            used, end = before, start
        return _cut(stages)


def _nothing(layers: int) -> Table:
    """The cost of layers [0, end) without a worker."""
    return np.where(np.arange(layers + 1) == 0, 0.0, inf)


def _one_more(best: Table, table: Table) -> Table:
    """The least cost of layers [0, end), the last of them on one more worker."""
    least: Table = (best[:, np.newaxis] + table).min(axis=0)
    return least


def _one_less(used: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(kind, numbers without one worker of it)."""
    for kind, count in enumerate(used):
        if count:
            yield kind, (*used[:kind], count - 1, *used[kind + 1 :])


def _cut(backwards: Sequence[tuple[int, Kind, int, int]]) -> Cut:
    """Of stages from the last to the first."""
    stages = tuple((worker, start, end) for worker, _, start, end in reversed(backwards))
    slowest = max(float(kind.slow[start, end]) for _, kind, start, end in backwards)
    return Cut(stages, slowest, sum(float(kind.total[start, end]) for _, kind, start, end in backwards))


def _best_of(way: Way, limits: Table, aim: Aim, known: Cut | None = None) -> Cut | None:
    """The cut that comes closest to the aim; `known` where none is clearly better.

    Intervals of limits are halved, the most promising one first: the total at an interval's upper end is the least one
    in all of it.
    """
    best = known
    best_score = inf if known is None else aim.score(known.slowest, known.total) * _CLEARLY_BETTER / _CLOSE
    open_: list[tuple[float, int, int]] = [(0.0, 0, len(limits))]  # (score at best, limits [low, high))
    while open_ and open_[0][0] < best_score * _CLOSE:
        _, low, high = heappop(open_)
        cut = way.least(float(limits[high - 1]))
        if cut is None or cut.total > aim.most_total:
            continue
        score = aim.score(cut.slowest, cut.total)
        if score < best_score:
            best, best_score = cut, score
        high = min(high - 1, int(np.searchsorted(limits, cut.slowest)))
        for start, end in ((low, (low + high) // 2), ((low + high) // 2, high)):
            if start < end:
                heappush(open_, (aim.score(float(limits[start]), cut.total), start, end))
    return best


@dataclass(frozen=True, slots=True)
class Best:
    """The best cut that was found."""

    cut: Cut
    excess: float | None  # how far what it aims at is above what no cut can reach, at most; None: no cut is better


def best_cut(
    kinds: Sequence[Kind], total_weight: int = 0, total_slack: float = inf, ways: Sequence[Way] | None = None
) -> Best | None:
    """The least slowest * total ** total_weight, with a total of at most total_slack times the least one; `ways`: only
    of these.

    Workers keep the file's order unless another one is clearly better. None where no cut can be.
    """
    limits, is_free = _limits(kinds), ways is None
    ways = _ways(kinds, limits) if ways is None else ways
    totals = [cut.total for way in ways if (cut := way.least(inf)) is not None]
    if not totals:
        return None
    aim = Aim(total_weight, min(totals) * total_slack)
    best = None
    for way in ways:
        best = _best_of(way, limits, aim, best)
    assert best is not None
    if _is_exact(kinds) and is_free:
        return Best(best, None)
    slowest, total = least_possible(kinds, limits)
    return Best(best, best.total / total - 1 if total_weight else best.slowest / slowest - 1)


def least_total(kinds: Sequence[Kind]) -> float:
    """Of all cuts whose stages can be; infinite where there is none."""
    cuts = [way.least(inf) for way in _ways(kinds, _limits(kinds))]
    return min((cut.total for cut in cuts if cut is not None), default=inf)


def _limits(kinds: Sequence[Kind]) -> Table:
    """All costs that a slowest stage can have, ascending."""
    return np.unique(np.concatenate([kind.slow[np.isfinite(kind.slow)] for kind in kinds]))


def _is_exact(kinds: Sequence[Kind]) -> bool:
    return len(kinds) == 1 or AnyOrder(kinds).steps <= _MOST_STEPS


def _ways(kinds: Sequence[Kind], limits: Table) -> list[Way]:
    """The file's order, and what may be better."""
    order = sorted((worker, kind) for kind in kinds for worker in kind.workers)
    file: list[Way] = [GivenOrder(order)]
    if len(kinds) == 1 or not len(limits):
        return file
    return [*file, AnyOrder(kinds)] if _is_exact(kinds) else [*file, *map(GivenOrder, likely_orders(order, limits))]

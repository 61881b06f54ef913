"""Who gets which layers: the best cut over all sets and orders of workers, by dynamic programming.

Exact for a few workers, or many of a few kinds; else over orders that are likely, with a bound on what any cut could
reach. A cut is judged by its slowest stage and by the sum over its stages; a worker may stay without layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.dynamic_program import Cut, Steps, any_order, any_order_steps, in_order
from llamaclust.cluster.planner.orders import least_possible, likely_orders
from llamaclust.cluster.planner.worker_classes import Kind

_MOST_STEPS = 8 * (1 << 8) // 2
"""All orders are tried where that takes no more steps than with eight workers that are all different."""

_CLOSE = 0.99
"""A cut that is not better by more than this is not looked for."""

_CLEARLY_BETTER = 0.95
"""So much better a cut must be for another order than the file's."""


@dataclass(frozen=True, slots=True)
class Aim:
    """The least slowest * total ** `total_weight` with a total of `most_total` at most; equal ones by their total."""

    total_weight: int = 0
    most_total: float = inf

    def score(self, slowest: float, total: float) -> float:
        return float(slowest * total**self.total_weight)


def _best_of(way: Steps, limits: Table, aim: Aim, known: Cut | None = None) -> Cut | None:
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
    kinds: Sequence[Kind], total_weight: int = 0, total_slack: float = inf, ways: Sequence[Steps] | None = None
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
    return len(kinds) == 1 or any_order_steps(kinds) <= _MOST_STEPS


def _ways(kinds: Sequence[Kind], limits: Table) -> list[Steps]:
    """The file's order, and what may be better."""
    order = sorted((worker, kind) for kind in kinds for worker in kind.workers)
    if len(kinds) == 1 or not len(limits):
        return [Steps(in_order(order))]
    if _is_exact(kinds):
        return [Steps(in_order(order)), Steps(any_order(kinds))]
    return [Steps(in_order(one)) for one in (order, *likely_orders(order, limits))]

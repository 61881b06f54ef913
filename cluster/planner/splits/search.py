"""The best split over all sets and orders of workers, by dynamic programming.

Exact for a few workers or classes; else over likely orders, with a lower bound for any split. A split is judged by its
slowest stage and by the sum over its stages; workers may stay idle.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.splits.dynamic_program import Split, Steps, any_order, any_order_steps, in_order
from llamaclust.cluster.planner.splits.worker_classes import Order, WorkerClass

_MOST_STEPS = 8 * (1 << 8) // 2
"""All orders are tried where that takes no more steps than with eight workers that are all different."""
_CLOSE = 0.99
"""The search ends when no split can be better by more than this."""
_CLEARLY_BETTER = 0.95
"""A split in another order than the file's must be better by this factor."""


@dataclass(frozen=True, slots=True)
class Aim:
    """The least slowest * total ** `total_weight` with a total of `most_total` at most; equal ones by their total."""

    total_weight: int = 0
    most_total: float = inf

    def score(self, slowest: float, total: float) -> float:
        return float(slowest * total**self.total_weight)


def best_of(way: Steps, limits: Table, aim: Aim, known: Split | None = None) -> Split | None:
    """The split that comes closest to the aim; `known` where none is clearly better.

    Intervals of limits are halved, the most promising one first: the total at an interval's upper end is the least one
    in all of it.
    """
    best = known
    best_score = inf if known is None else aim.score(known.slowest, known.total) * _CLEARLY_BETTER / _CLOSE
    open_: list[tuple[float, int, int]] = [(0.0, 0, len(limits))]  # (score at best, limits [low, high))
    while open_ and open_[0][0] < best_score * _CLOSE:
        _, low, high = heappop(open_)
        split = way.least(float(limits[high - 1]))
        if split is None or split.total > aim.most_total:
            continue
        score = aim.score(split.slowest, split.total)
        if score < best_score:
            best, best_score = split, score
        high = min(high - 1, int(np.searchsorted(limits, split.slowest)))
        for start, end in ((low, (low + high) // 2), ((low + high) // 2, high)):
            if start < end:
                heappush(open_, (aim.score(float(limits[start]), split.total), start, end))
    return best


@dataclass(frozen=True, slots=True)
class Best:
    """The best split found."""

    split: Split
    optimality_gap: float | None  # at most, relative to a lower bound; None: it is the optimum


def best_split(
    classes: Sequence[WorkerClass], total_weight: int = 0, total_slack: float = inf, ways: Sequence[Steps] | None = None
) -> Best | None:
    """The least slowest * total ** total_weight, with a total of at most total_slack times the least one; `ways`: only
    of these.

    Workers keep the file's order unless another one is clearly better. None where no split can be.
    """
    limits, is_free = stage_limits(classes), ways is None
    ways = _ways(classes, limits) if ways is None else ways
    totals = [split.total for way in ways if (split := way.least(inf)) is not None]
    if not totals:
        return None
    aim = Aim(total_weight, min(totals) * total_slack)
    best = None
    for way in ways:
        best = best_of(way, limits, aim, best)
    assert best is not None
    if _is_exact(classes) and is_free:
        return Best(best, None)
    slowest, total = least_possible(classes, limits)
    return Best(best, best.total / total - 1 if total_weight else best.slowest / slowest - 1)


def least_total(classes: Sequence[WorkerClass]) -> float:
    """Of all splits whose stages can be; infinite where there is none."""
    splits = [way.least(inf) for way in _ways(classes, stage_limits(classes))]
    return min((split.total for split in splits if split is not None), default=inf)


def stage_limits(classes: Sequence[WorkerClass]) -> Table:
    """All costs that a slowest stage can have, ascending."""
    return np.unique(np.concatenate([worker_class.slow[np.isfinite(worker_class.slow)] for worker_class in classes]))


def _is_exact(classes: Sequence[WorkerClass]) -> bool:
    return len(classes) == 1 or any_order_steps(classes) <= _MOST_STEPS


def _ways(classes: Sequence[WorkerClass], limits: Table) -> list[Steps]:
    """The file's order, and what may be better."""
    order = sorted((worker, worker_class) for worker_class in classes for worker in worker_class.workers)
    if len(classes) == 1 or not len(limits):
        return [Steps(in_order(order))]
    if _is_exact(classes):
        return [Steps(in_order(order)), Steps(any_order(classes))]
    return [Steps(in_order(one)) for one in (order, *likely_orders(order, limits))]


def likely_orders(order: Order, limits: Table) -> list[Order]:
    """Orders with the best first and last worker, which hold the embedding and the head besides layers: of all workers,
    and of the fastest ones. Layers are much alike, so the order in between hardly matters."""
    by_total = sorted(order, key=lambda one: float(one[1].total[0, one[1].layers]))
    counts = range(1, len(order) + 1)
    fewest = bisect_left(counts, True, key=lambda count: _best_ends(by_total[:count], inf) is not None)
    if fewest == len(order):
        return []
    found = []
    for count in sorted({fewest + 1, (fewest + 1 + len(order)) // 2, len(order)}):
        some = sorted(by_total[:count], key=lambda one: one[0])
        limit = limits[bisect_left(limits, True, key=lambda limit: _best_ends(some, limit) is not None)]
        ends = _best_ends(some, limit)
        assert ends is not None
        found.append(ends)
    return found


def _best_ends(order: Order, limit: float) -> Order | None:
    """The order with another first and last worker that covers all layers within the limit; None where none does."""
    layers, numbers = order[0][1].layers, np.arange(len(order))
    # [workers, layers]: where a stage ends at most
    reach = np.array([_reach(worker_class, limit) for _, worker_class in order])
    first, last = numbers[:, np.newaxis], numbers[np.newaxis, :]
    covered = np.repeat(reach[:, :1], len(order), axis=1)  # [first worker, last worker]
    for number in numbers:
        covered = np.where((first == number) | (last == number), covered, reach[number][covered])
    covered = np.where(first == last, covered, reach[last, covered])
    if covered.max() < layers:
        return None
    begin, end = map(int, np.unravel_index(int(covered.argmax()), covered.shape))
    inner = [one for number, one in enumerate(order) if number not in (begin, end)]
    return [order[begin], *inner, *([order[end]] if begin != end else [])]


def _reach(worker_class: WorkerClass, limit: float) -> Table:
    """Where a stage from each layer ends at most, within the limit."""
    ends = np.arange(worker_class.layers + 1)
    furthest: Table = np.where(worker_class.within(limit), ends, ends[:, np.newaxis]).max(axis=1)
    return furthest


def least_possible(classes: Sequence[WorkerClass], limits: Table) -> tuple[float, float]:
    """(slowest, total): lower bounds of any split, every worker as good as at its best position."""
    layers = classes[0].layers
    index = bisect_left(limits, layers, key=lambda limit: _most_layers(classes, limit))
    rates, rooms = np.array([_cheapest(worker_class) for worker_class in classes]).T
    by_rate = np.argsort(rates)
    upto = np.concatenate([[0.0], np.cumsum(rooms[by_rate])])
    costs = np.concatenate([[0.0], np.cumsum((rooms * rates)[by_rate])])
    before = np.interp(np.arange(layers + 1), upto, costs, right=inf)  # of the layers before the last stage
    total = min(float((before + worker_class.allowed(inf)[:, -1]).min()) for worker_class in classes)
    return float(limits[index]), total


def _most_layers(classes: Sequence[WorkerClass], limit: float) -> int:
    """How many layers all workers together can hold within the limit, one of them the last ones."""
    inner, last = np.array([_longest(worker_class, limit) for worker_class in classes]).T
    everyone = sum(len(worker_class.workers) * int(count) for worker_class, count in zip(classes, inner, strict=True))
    return everyone + int((last - inner)[last > 0].max(initial=-everyone))


def _longest(worker_class: WorkerClass, limit: float) -> tuple[int, int]:
    """Most layers of (a stage without the last one, a stage with it) within the limit."""
    ends = np.arange(worker_class.layers + 1)
    sizes = np.where(worker_class.within(limit), ends - ends[:, np.newaxis], 0)
    return int(sizes[:, :-1].max()), int(sizes[:, -1].max())


def _cheapest(worker_class: WorkerClass) -> tuple[float, int]:
    """(least cost of a layer, most layers) on all workers of the class."""
    ends = np.arange(worker_class.layers + 1)
    inner = worker_class.allowed(inf)[:, :-1] / np.maximum(ends[:-1] - ends[:, np.newaxis], 1)
    room = len(worker_class.workers) * _longest(worker_class, inf)[0]
    return (float(inner.min()), room) if room else (0.0, 0)

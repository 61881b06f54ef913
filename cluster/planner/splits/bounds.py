"""Calculates a lower bound of the time of all splits. It assumes that every worker has its best position."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.splits.holders import StageTable, WorkerClass
from llamaclust.cluster.planner.splits.search import stage_limits
from llamaclust.cluster.planner.work import Work

_POINTS = 8


def least_seconds(classes: Sequence[WorkerClass], works: Sequence[Work]) -> float:
    """Returns a lower bound of the seconds that any split without groups takes for its fastest workload."""
    return min((_least_seconds(classes, number, work) for number, work in enumerate(works)), default=inf)


def _least_seconds(classes: Sequence[WorkerClass], number: int, work: Work) -> float:
    sized = [(len(one.workers), one.table(number)) for one in classes]
    limits, layers = stage_limits(table for _, table in sized), sized[0][1].layers
    first = bisect_left(limits, layers, key=lambda limit: _most_layers(sized, limit))
    if first == len(limits):
        return inf
    if not work.adds_up:
        return float(limits[first])
    points = np.unique(np.linspace(first, len(limits) - 1, _POINTS).astype(int))
    lower = [int(points[0]), *map(int, points[:-1])]
    # In each interval of limits, the lower limit bounds the slowest stage, and the upper limit bounds the total.
    return min(
        work.seconds(float(limits[low]), _least_total(sized, float(limits[high])))
        for low, high in zip(lower, points, strict=True)
    )


def _least_total(sized: Sequence[tuple[int, StageTable]], limit: float) -> float:
    layers = sized[0][1].layers
    rates, rooms = np.array([_cheapest(count, table, limit) for count, table in sized]).T
    by_rate = np.argsort(rates)
    upto = np.concatenate([[0.0], np.cumsum(rooms[by_rate])])
    costs = np.concatenate([[0.0], np.cumsum((rooms * rates)[by_rate])])
    # Minimum cost of the layers before the last stage.
    before = np.interp(np.arange(layers + 1), upto, costs, right=inf)
    return min(float((before + table.allowed(limit)[:, -1]).min()) for _, table in sized)


def _most_layers(sized: Sequence[tuple[int, StageTable]], limit: float) -> int:
    inner, last = np.array([_longest(table, limit) for _, table in sized]).T
    everyone = sum(count * int(longest) for (count, _), longest in zip(sized, inner, strict=True))
    return everyone + int((last - inner)[last > 0].max(initial=-everyone))


def _longest(table: StageTable, limit: float) -> tuple[int, int]:
    ends = np.arange(table.layers + 1)
    sizes: Table = np.where(table.within(limit), ends - ends[:, np.newaxis], 0)
    return int(sizes[:, :-1].max()), int(sizes[:, -1].max())


def _cheapest(count: int, table: StageTable, limit: float) -> tuple[float, int]:
    ends = np.arange(table.layers + 1)
    inner = table.allowed(limit)[:, :-1] / np.maximum(ends[:-1] - ends[:, np.newaxis], 1)
    room = count * _longest(table, limit)[0]
    return (float(inner.min()), room) if room else (0.0, 0)

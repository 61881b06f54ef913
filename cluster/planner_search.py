"""Cuts of layers into stages by dynamic programming: exact for a given order of workers, and over orders for a few.

A table [layers + 1, layers + 1] has the cost of a stage of layers [start, end) on one worker, infinite where it cannot
be. Costs of stages are combined by their maximum (the slowest stage) or their sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Bounds = tuple[int, ...]
"""Where the stages of workers in their order begin, and the last one's end; a worker between equal bounds has none."""

MAX_ORDERED = 8
"""Up to so many workers the best order is searched: all of their subsets are gone through."""


def slowest_cut(tables: Sequence[Table], extra: Sequence[Table], may_skip: bool) -> tuple[float, Bounds] | None:
    """The cut whose slowest stage is fastest, and among those the one with the least sum of `extra`.

    (cost of the slowest stage, bounds), or None where no cut can be. With `may_skip` a worker may have no layers.
    """
    best = _chain(tables, may_skip, np.maximum)
    if best is None:
        return None
    limit = best[0] * (1 + 1e-9)
    allowed = [np.where(table <= limit, more, np.inf) for table, more in zip(tables, extra, strict=True)]
    least = _chain(allowed, may_skip, np.add)
    assert least is not None
    return best[0], least[1]


def least_sum(tables: Sequence[Table], may_skip: bool) -> tuple[float, Bounds] | None:
    """The cut with the least sum, or None where no cut can be."""
    return _chain(tables, may_skip, np.add)


def _chain(tables: Sequence[Table], may_skip: bool, combine: np.ufunc) -> tuple[float, Bounds] | None:
    """best[end]: the cost of layers [0, end) on the workers so far; from[i][end]: where worker i begins then."""
    layers = tables[0].shape[0] - 1
    best = np.full(layers + 1, np.inf)
    best[0] = 0.0
    origins: list[NDArray[np.intp]] = []
    for table in tables:
        costs = combine(best[:, np.newaxis], table)  # [start, end]
        origin = costs.argmin(axis=0)
        reached = costs.min(axis=0)
        if may_skip:
            origin = np.where(best <= reached, np.arange(layers + 1), origin)
            reached = np.minimum(best, reached)
        best = reached
        origins.append(origin)
    if not np.isfinite(best[layers]):
        return None
    bounds = [layers]
    for origin in reversed(origins):
        bounds.append(int(origin[bounds[-1]]))
    return float(best[layers]), tuple(reversed(bounds))


def best_order(tables: Sequence[Table]) -> tuple[float, tuple[int, ...]] | None:
    """(cost of the slowest stage, order) of the order of all workers whose best cut has the fastest slowest stage."""
    assert len(tables) <= MAX_ORDERED
    layers = tables[0].shape[0] - 1
    everyone = (1 << len(tables)) - 1
    best = np.full((everyone + 1, layers + 1), np.inf)  # [workers used, layers covered]
    last = np.full((everyone + 1, layers + 1), -1)
    came = np.zeros((everyone + 1, layers + 1), np.intp)
    best[0, 0] = 0.0
    for used in range(1, everyone + 1):
        for worker, table in enumerate(tables):
            if used >> worker & 1:
                costs = np.maximum(best[used ^ 1 << worker][:, np.newaxis], table)
                cost = costs.min(axis=0)
                better = cost < best[used]
                best[used] = np.where(better, cost, best[used])
                last[used] = np.where(better, worker, last[used])
                came[used] = np.where(better, costs.argmin(axis=0), came[used])
    if not np.isfinite(best[everyone, layers]):
        return None
    order: list[int] = []
    used, end = everyone, layers
    while used:
        order.append(int(last[used, end]))
        used, end = used ^ 1 << order[-1], int(came[used, end])
    return float(best[everyone, layers]), tuple(reversed(order))

"""Where more workers of more kinds are there than can be tried in all orders: orders that are likely to have the best
cut, and what no cut can be below."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.worker_classes import Kind, Order


def likely_orders(order: Order, limits: Table) -> list[Order]:
    """Orders with the best first and last worker, which besides layers have the embedding and the head: of all workers,
    and of the fastest ones. In between the order hardly matters: layers are much alike."""
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
    reach = np.array([_reach(kind, limit) for _, kind in order])  # [workers, layers]: where a stage ends at most
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


def _reach(kind: Kind, limit: float) -> Table:
    """Where a stage from each layer ends at most, within the limit."""
    ends = np.arange(kind.layers + 1)
    furthest: Table = np.where(kind.within(limit), ends, ends[:, np.newaxis]).max(axis=1)
    return furthest


def least_possible(kinds: Sequence[Kind], limits: Table) -> tuple[float, float]:
    """(slowest, total) that no cut is below: every worker as good as at its best place, wherever that is."""
    layers = kinds[0].layers
    index = bisect_left(limits, layers, key=lambda limit: _most_layers(kinds, limit))
    rates, rooms = np.array([_cheapest(kind) for kind in kinds]).T
    by_rate = np.argsort(rates)
    upto = np.concatenate([[0.0], np.cumsum(rooms[by_rate])])
    costs = np.concatenate([[0.0], np.cumsum((rooms * rates)[by_rate])])
    before = np.interp(np.arange(layers + 1), upto, costs, right=inf)  # of the layers before the last stage
    return float(limits[index]), min(float((before + kind.allowed(inf)[:, -1]).min()) for kind in kinds)


def _most_layers(kinds: Sequence[Kind], limit: float) -> int:
    """How many layers all workers together can hold within the limit, one of them the last ones."""
    inner, last = np.array([_longest(kind, limit) for kind in kinds]).T
    everyone = sum(len(kind.workers) * int(count) for kind, count in zip(kinds, inner, strict=True))
    return everyone + int((last - inner)[last > 0].max(initial=-everyone))


def _longest(kind: Kind, limit: float) -> tuple[int, int]:
    """Most layers of (a stage without the last one, a stage with it) within the limit."""
    ends = np.arange(kind.layers + 1)
    sizes = np.where(kind.within(limit), ends - ends[:, np.newaxis], 0)
    return int(sizes[:, :-1].max()), int(sizes[:, -1].max())


def _cheapest(kind: Kind) -> tuple[float, int]:
    """(least cost of a layer, most layers) on all workers of the kind."""
    ends = np.arange(kind.layers + 1)
    inner = kind.allowed(inf)[:, :-1] / np.maximum(ends[:-1] - ends[:, np.newaxis], 1)
    room = len(kind.workers) * _longest(kind, inf)[0]
    return (float(inner.min()), room) if room else (0.0, 0)

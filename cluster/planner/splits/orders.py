"""Chooses the orders of workers to try: first that of the cluster file, then all others, or only likely ones."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.splits.dynamic_program import (
    Partitions,
    Places,
    Steps,
    any_order,
    constrained_ends,
    in_order,
    steps_in_any_order,
)
from llamaclust.cluster.planner.splits.holders import StageTable, WorkerClass
from llamaclust.cluster.planner.splits.search import SplitSearch, stage_limits
from llamaclust.cluster.planner.work import Work

_MOST_STEPS = 1024

_ANY_WORK = Work(slowest=(), slowest_rows=0, each=(), hops=0, hop_rows=0, adds_up=True)
"""Placeholder workload for tables whose values are not seconds."""

Order = Sequence[int]


def worker_searches(
    classes: Sequence[WorkerClass], works: Sequence[Work], partitions: Partitions
) -> Iterator[list[SplitSearch]]:
    """Yields lists of searches, the first in the cluster file's order. Pairs in `partitions` are never adjacent."""
    file = sorted(worker for worker_class in classes for worker in worker_class.workers)
    ends, limits = constrained_ends(file, partitions), _limits(classes, works)

    def searches(number: int, orders: Sequence[Places]) -> Iterator[SplitSearch]:
        for places in orders:
            yield SplitSearch(Steps(places, classes, number, ends), works[number], limits[number])

    numbers = [number for number in range(len(works)) if len(limits[number])]
    as_file = places_in_order(file, classes, partitions)
    yield [search for number in numbers for search in searches(number, [as_file])]
    if len(classes) == 1:
        return
    if is_exact(classes, partitions):
        places = _in_any_order(classes, partitions)
        yield [search for number in numbers for search in searches(number, [places])]
        return
    others = [likely_orders(file, classes, number, limits[number], partitions) for number in numbers]
    found = {tuple(order): places_in_order(order, classes, partitions) for orders in others for order in orders}
    for number, orders in zip(numbers, others, strict=True):
        yield [*searches(number, [found[tuple(order)] for order in orders])]


def least_total(classes: Sequence[WorkerClass]) -> float:
    searches = (search for kind in worker_searches(classes, (_ANY_WORK,), frozenset()) for search in kind)
    splits = (search.steps.least(inf) for search in searches)
    return min((split.total for split in splits if split is not None), default=inf)


def _limits(classes: Sequence[WorkerClass], works: Sequence[Work]) -> list[Table]:
    return [stage_limits(one.table(number) for one in classes) for number in range(len(works))]


def is_exact(classes: Sequence[WorkerClass], partitions: Partitions) -> bool:
    if len(classes) == 1:
        return True
    file = [worker for worker_class in classes for worker in worker_class.workers]
    sizes = [len(worker_class.workers) for worker_class in classes]
    return steps_in_any_order(sizes, _single(len(sizes))) * len(constrained_ends(file, partitions)) <= _MOST_STEPS


def _single(classes: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(one == other) for one in range(classes)) for other in range(classes))


def _in_any_order(classes: Sequence[WorkerClass], partitions: Partitions) -> Places:
    leaders = tuple(worker_class.workers[0] for worker_class in classes)
    held_by = tuple((counts, number) for number, counts in enumerate(_single(len(classes))))
    return any_order(tuple(len(one.workers) for one in classes), held_by, leaders, partitions)


def places_in_order(order: Order, classes: Sequence[WorkerClass], partitions: Partitions) -> Places:
    numbers = class_numbers(classes)
    return in_order(
        order, (1,), lambda workers: numbers[workers[0]], lambda number: classes[number].workers[0], partitions
    )


def class_numbers(classes: Sequence[WorkerClass]) -> dict[int, int]:
    return {worker: number for number, one in enumerate(classes) for worker in one.workers}


def likely_orders(
    file: Order, classes: Sequence[WorkerClass], work: int, limits: Table, partitions: Partitions
) -> list[Order]:
    if partitions:
        return [_spread(file, partitions), _spread(file[::-1], partitions)[::-1]]
    numbers = class_numbers(classes)
    return _with_best_ends([(worker, classes[numbers[worker]].table(work)) for worker in file], limits)


def _spread(order: Order, partitions: Partitions) -> list[int]:
    """Reorders workers so that no pair in `partitions` is adjacent. Workers for which there is no such position come
    last."""
    spread: list[int] = []
    waiting = list(order)
    while waiting:
        taken = next((one for one in waiting if not spread or _fine(one, spread[-1], partitions)), None)
        if taken is None:
            break
        waiting.remove(taken)
        spread.append(taken)
    for one in waiting:
        spread.insert(next(_gaps(spread, one, partitions), len(spread)), one)
    return spread


def _gaps(order: Order, worker: int, partitions: Partitions) -> Iterator[int]:
    for place in range(len(order)):
        if all(_fine(worker, other, partitions) for other in (order[place - 1], order[place])):
            yield place


def _fine(one: int, other: int, partitions: Partitions) -> bool:
    return frozenset((one, other)) not in partitions


_Tables = Sequence[tuple[int, StageTable]]


def _with_best_ends(file: _Tables, limits: Table) -> list[Order]:
    by_total = sorted(file, key=lambda one: float(one[1].total[0, one[1].layers]))
    counts = range(1, len(file) + 1)
    fewest = bisect_left(counts, True, key=lambda count: _best_ends(by_total[:count], inf) is not None)
    if fewest == len(file):
        return []
    found = []
    for count in sorted({fewest + 1, (fewest + 1 + len(file)) // 2, len(file)}):
        by_speed = by_total[:count]
        as_file = sorted(by_speed, key=lambda one: one[0])
        # If layers differ in size, the model may fit in one of the orders only.
        found += [_tightest(as_file, limits) or _tightest(by_speed, limits)]
    return [order for order in found if order is not None]


def _tightest(order: _Tables, limits: Table) -> Order | None:
    """Returns the order that meets the lowest possible limit, or None. Only its first and last worker are chosen."""
    lowest = bisect_left(limits, True, key=lambda limit: _best_ends(order, limit) is not None)
    return None if lowest == len(limits) else _best_ends(order, limits[lowest])


def _best_ends(order: _Tables, limit: float) -> Order | None:
    layers, numbers = order[0][1].layers, np.arange(len(order))
    # reach[worker, start] is the last possible end of a stage that begins at layer `start`.
    reach = np.array([_reach(table, limit) for _, table in order])
    first, last = numbers[:, np.newaxis], numbers[np.newaxis, :]
    covered = np.repeat(reach[:, :1], len(order), axis=1)  # [first worker, last worker]: number of assigned layers.
    for number in numbers:
        covered = np.where((first == number) | (last == number), covered, reach[number][covered])
    covered = np.where(first == last, covered, reach[last, covered])
    if covered.max() < layers:
        return None
    begin, end = map(int, np.unravel_index(int(covered.argmax()), covered.shape))
    inner = [worker for number, (worker, _) in enumerate(order) if number not in (begin, end)]
    return [order[begin][0], *inner, *([order[end][0]] if begin != end else [])]


def _reach(table: StageTable, limit: float) -> Table:
    ends = np.arange(table.layers + 1)
    furthest: Table = np.where(table.within(limit), ends, ends[:, np.newaxis]).max(axis=1)
    return furthest

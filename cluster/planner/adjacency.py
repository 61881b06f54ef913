"""Adjacency constraints: pairs of workers that cannot reach each other and so must not hold neighbouring stages. Pure.

Neighbours are consecutive stages, and the last and the first one, since tokens go from that to this. Of a stage that
is held by a group the leader is the neighbour of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from llamaclust.cluster.planner.splits.dynamic_program import (
    Steps,
    Ways,
    any_order,
    any_order_steps,
    constrained_ends,
    in_order,
)
from llamaclust.cluster.planner.splits.worker_classes import Order, WorkerClass

Pair = frozenset[str]
Pairs = frozenset[Pair]
"""Pairs of workers that must not be neighbours, by name."""

_MOST_STEPS = 1024
"""All orders are tried where that takes no more."""


def violated_pair(stages: Sequence[Sequence[str]], partitions: Pairs) -> Pair | None:
    """A pair of neighbours in this order of stages that cannot reach each other; None where there is none. `stages`:
    the workers of each, of a group the leader first. All members of a group are neighbours of each other."""
    leaders = [workers[0] for workers in stages]
    neighbours = [*zip(leaders, (leaders[-1:] + leaders), strict=False)]
    neighbours += [pair for workers in stages for pair in combinations(workers, 2)]
    return next((pair for pair in map(frozenset, neighbours) if pair in partitions), None)


def constrained_steps(classes: Sequence[WorkerClass], names: Sequence[str], partitions: Pairs) -> list[Steps]:
    """Steps along which no pair is adjacent. Workers of pairs each have a class of their own. `names`: of all workers,
    in the order of the cluster file."""
    places = {name: place for place, name in enumerate(names)}
    ways = frozenset(frozenset(places[name] for name in pair) for pair in partitions if pair <= places.keys())
    ends = constrained_ends(range(len(names)), ways)
    file = sorted((worker, worker_class) for worker_class in classes for worker in worker_class.workers)
    if any_order_steps(classes) * len(ends) <= _MOST_STEPS:
        return [Steps(in_order(file, ways), ends), Steps(any_order(classes, ways), ends)]
    orders = [file, _spread(file, ways), _spread(file[::-1], ways)[::-1]]
    return [Steps(in_order(order, ways), ends) for order in orders]


def _spread(order: Order, partitions: Ways) -> Order:
    """The order, changed as little as possible so that no pair is adjacent; workers without such a place come last."""
    spread: list[tuple[int, WorkerClass]] = []
    waiting = list(order)
    while waiting:
        fitting = (one for one in waiting if not spread or _fine(one[0], spread[-1][0], partitions))
        taken = next(fitting, None)
        if taken is None:
            break
        waiting.remove(taken)
        spread.append(taken)
    for one in waiting:
        spread.insert(next(_gaps(spread, one[0], partitions), len(spread)), one)
    return spread


def _gaps(order: Order, worker: int, partitions: Ways) -> Iterator[int]:
    """Positions between neighbours that the worker reaches."""
    for place in range(len(order)):
        if all(_fine(worker, other, partitions) for other in (order[place - 1][0], order[place][0])):
            yield place


def _fine(one: int, other: int, partitions: Ways) -> bool:
    return frozenset((one, other)) not in partitions

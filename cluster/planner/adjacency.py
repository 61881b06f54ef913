"""Cuts in which some workers are not neighbours: pairs that cannot reach each other. Pure.

Neighbours are stages that follow each other, and the last and the first one, for tokens go from that to this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamaclust.cluster.planner.dynamic_program import Steps, Ways, any_order, any_order_steps, ends_apart, in_order
from llamaclust.cluster.planner.worker_classes import Kind, Order

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


def ways_apart(kinds: Sequence[Kind], names: Sequence[str], apart: Pairs) -> list[Steps]:
    """Ways that keep pairs apart. Workers of pairs must each be of a kind of its own; `names`: of all, in the file's
    order."""
    places = {name: place for place, name in enumerate(names)}
    ways = frozenset(frozenset(places[name] for name in pair) for pair in apart if pair <= places.keys())
    ends = ends_apart(range(len(names)), ways)
    file = sorted((worker, kind) for kind in kinds for worker in kind.workers)
    if any_order_steps(kinds) * len(ends) <= _MOST_STEPS:
        return [Steps(in_order(file, ways), ends), Steps(any_order(kinds, ways), ends)]
    orders = [file, _spread(file, ways), _spread(file[::-1], ways)[::-1]]
    return [Steps(in_order(order, ways), ends) for order in orders]


def _spread(order: Order, apart: Ways) -> Order:
    """As like the order as can be with no pair side by side; who finds no such place stands at the end."""
    spread: list[tuple[int, Kind]] = []
    waiting = list(order)
    while waiting:
        fitting = (one for one in waiting if not spread or _fine(one[0], spread[-1][0], apart))
        taken = next(fitting, None)
        if taken is None:
            break
        waiting.remove(taken)
        spread.append(taken)
    for one in waiting:
        spread.insert(next(_gaps(spread, one[0], apart), len(spread)), one)
    return spread


def _gaps(order: Order, worker: int, apart: Ways) -> Iterator[int]:
    """Where a worker can stand with neighbours that it reaches."""
    for place in range(len(order)):
        if all(_fine(worker, other, apart) for other in (order[place - 1][0], order[place][0])):
            yield place


def _fine(one: int, other: int, apart: Ways) -> bool:
    return frozenset((one, other)) not in apart

"""Pairs of workers that cannot reach each other, and so must not hold neighbouring stages. Pure.

Neighbours are consecutive stages, and the last and the first one, since tokens go from that to this. Of a stage that
is held by a group the leader is the neighbour of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Pair = frozenset[str]
Pairs = frozenset[Pair]
"""Pairs of workers that must not be neighbours, by name."""


def violated_pair(stages: Sequence[Sequence[str]], partitions: Pairs) -> Pair | None:
    """A pair of neighbours in this order of stages that cannot reach each other; None where there is none. `stages`:
    the workers of each, of a group the leader first. All members of a group are neighbours of each other."""
    leaders = [workers[0] for workers in stages]
    neighbours = [*zip(leaders, (leaders[-1:] + leaders), strict=False)]
    neighbours += [pair for workers in stages for pair in combinations(workers, 2)]
    return next((pair for pair in map(frozenset, neighbours) if pair in partitions), None)

"""Finds neighbouring workers in a plan that cannot reach each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Pair = frozenset[str]
Pairs = frozenset[Pair]


def violated_pair(stages: Sequence[Sequence[str]], partitions: Pairs) -> Pair | None:
    """Returns two workers that must exchange data but cannot reach each other, or None."""
    leaders = [workers[0] for workers in stages]
    neighbours = [*zip(leaders, (leaders[-1:] + leaders), strict=False)]
    neighbours += [pair for workers in stages for pair in combinations(workers, 2)]
    return next((pair for pair in map(frozenset, neighbours) if pair in partitions), None)

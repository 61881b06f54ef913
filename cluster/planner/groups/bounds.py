"""Calculates lower bounds of the seconds that layers take on workers and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.splits.dynamic_program import Counts

_NEVER_S = 1e300


@dataclass(slots=True, eq=False)
class LayerBounds:
    _rates: Table  # [classes, layers]: layers per second of one worker.
    _gathers_s: Table  # [layers]: seconds of each layer's gathers in a group.
    _together: dict[Counts, Table] = field(default_factory=dict)
    _rest: dict[Counts, Table] = field(default_factory=dict)

    @classmethod
    def of(cls, totals: Sequence[Table], gathers_s: Table) -> LayerBounds:
        return cls(np.array([1 / _layers_s(total) for total in totals]), gathers_s)

    def together(self, workers: Counts) -> Table:
        if workers not in self._together:
            self._together[workers] = _before(self._as_group(workers))
        return self._together[workers]

    def of_rest(self, workers: Counts) -> Table:
        if workers not in self._rest:
            self._rest[workers] = self._of_rest(workers)
        return self._rest[workers]

    def _of_rest(self, workers: Counts) -> Table:
        if not any(workers):
            return np.array([*[_NEVER_S] * len(self._gathers_s), 0.0])
        used = np.array(workers) > 0
        alone = 1 / self._rates[used].max(axis=0)
        before = _before(np.minimum(alone, self._as_group(workers)))
        rest: Table = before[-1] - before
        return rest

    def _as_group(self, workers: Counts) -> Table:
        seconds: Table = 1 / (np.array(workers) @ self._rates)
        found: Table = seconds + self._gathers_s if sum(workers) > 1 else seconds
        return found


def _layers_s(total: Table) -> Table:
    layers = len(total) - 1
    starts, ends = np.triu_indices(layers + 1, 1)
    longer: Table = np.full(layers, np.inf)
    inner = ends - starts > 1
    np.minimum.at(longer, ends[inner] - 1, total[starts[inner], ends[inner]] - total[starts[inner], ends[inner] - 1])
    first = np.diagonal(total, 1)
    return np.maximum(np.minimum(longer, first), 1e-12)


def _before(seconds: Table) -> Table:
    found: Table = np.concatenate([[0.0], np.cumsum(seconds)])
    return found

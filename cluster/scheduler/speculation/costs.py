"""Predicts the times of microbatches with several rows per sequence, from measured stage times."""

from __future__ import annotations

from bisect import bisect_left
from math import inf

from llamaclust.cluster.scheduler.microbatching import cycle_ns
from llamaclust.cluster.scheduler.stage_times import StageTimes

_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256)
"""Numbers of drafted tokens that are considered, in addition to the maximum number."""
_REFRESHED = 16
MARGIN = 0.05
"""Minimum relative gain of speed for which a draft model or an MTP head drafts."""
HOPEFUL_RATE = 0.7
"""Minimum acceptance rate that is assumed when a draft model or an MTP head is tried again."""


class MeasuredRounds:
    def __init__(self, times: StageTimes) -> None:
        self._times = times
        self._refreshes = 0
        self._stage_ns: dict[tuple[int, bool], list[float] | None] = {}

    def refresh(self) -> None:
        self._refreshes += 1
        if self._refreshes % _REFRESHED == 0:
            self._stage_ns.clear()

    def plain_ns(self, sequences: int, groups: int) -> float:
        transit_ns = self._times.transit_ns if groups == 1 else self._times.whole_transit_ns
        stage_ns = self._at(sequences, groups)
        return inf if stage_ns is None else cycle_ns(stage_ns, groups, transit_ns)

    def window_ns(self, rows: int, groups: int) -> float:
        stage_ns = self._at(rows, groups)
        return inf if stage_ns is None else cycle_ns(stage_ns, groups, self._times.whole_transit_ns)

    def slowest_ns(self, rows: int) -> float:
        stage_ns = self._at(rows, 1)
        return inf if stage_ns is None else max(stage_ns)

    def _at(self, rows: int, groups: int) -> list[float] | None:
        key = rows, groups > 1
        if key not in self._stage_ns:
            curves = self._times.alone if groups == 1 else self._times.beside
            self._stage_ns[key] = curves.predict_beyond(rows, self._times.prefill)
        return self._stage_ns[key]


def counts_to_try(most: int) -> tuple[int, ...]:
    return (*_ROWS[: bisect_left(_ROWS, most)], most) if most else ()

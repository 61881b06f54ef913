"""What steps of a model take on a worker, as it tried them before it holds layers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """At so many rows of a microbatch: (stage_ms + layers_ms_per_gb * gigabytes of its layers + head_ms) a stage."""

    rows: int
    stage_ms: float  # whatever the stage holds
    layers_ms_per_gb: float  # of 10^9 bytes of weights in memory
    head_ms: float  # of the last stage besides

    def at(self, rows: int, other: TrialPoint) -> TrialPoint:
        """The point on the line through this one and another, for a number of rows."""
        share = (rows - self.rows) / (other.rows - self.rows)
        values = (max(0.0, a + share * (b - a)) for a, b in zip(_values(self), _values(other), strict=True))
        return TrialPoint(rows, *values)


Trial = tuple[TrialPoint, ...]
"""Points by rows, ascending; none where nothing was tried."""


def at_rows(trial: Trial, rows: int) -> TrialPoint:
    """Between the points, and beyond the last one, on lines."""
    if len(trial) == 1:
        return trial[0]
    index = next((i for i in range(1, len(trial) - 1) if rows <= trial[i].rows), len(trial) - 1)
    return trial[index - 1].at(rows, trial[index])


def read_trial(points: Iterable[Mapping[str, Any]]) -> Trial:
    """From JSON. KeyError, TypeError or ValueError for what is no trial."""
    return tuple(
        TrialPoint(int(one["rows"]), *(float(one[field.name]) for field in fields(TrialPoint)[1:])) for one in points
    )


def mean_trial(trials: Sequence[Trial]) -> Trial:
    """Of trials at the same rows."""
    tried = [trial for trial in trials if trial]
    points = zip(*tried, strict=False) if tried else ()
    return tuple(TrialPoint(group[0].rows, *map(fmean, zip(*map(_values, group), strict=True))) for group in points)


def _values(point: TrialPoint) -> tuple[float, ...]:
    return tuple(getattr(point, field.name) for field in fields(point)[1:])

"""What stages take, learned from results: predictions for the scheduler. Pure: times come in as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from llamaclust.wire.messages import StageTiming

_SLOW_WEIGHT = 0.1
_FAST_WEIGHT = 0.4
"""A sample above the estimate weighs less than one below it: hiccups make a step slow, nothing makes one too fast."""

_FIXED_SHARE = 0.5
"""Share of a time that is taken not to depend on the rows while only one number of rows has been seen."""

_NEGLIGIBLE = 0.02
"""A bubble of this share of a stage's time is not worth one more microbatch in flight."""


def _moved(estimate: float, sample: float) -> float:
    weight = _SLOW_WEIGHT if sample > estimate else _FAST_WEIGHT
    return estimate + weight * (sample - estimate)


class Curve:
    """Time of one stage over the rows of a microbatch: one learned point for each power of two, lines between them."""

    __slots__ = ("_points",)

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float]] = {}  # bucket: (rows, ns), buckets ascending

    def __bool__(self) -> bool:
        return bool(self._points)

    def learn(self, rows: int, ns: float) -> None:
        bucket = (rows - 1).bit_length()
        point = self._points.get(bucket)
        if point is None:
            self._points[bucket] = (rows, ns)
            self._points = dict(sorted(self._points.items()))
        else:
            self._points[bucket] = (point[0] + 0.25 * (rows - point[0]), _moved(point[1], ns))

    def predict(self, rows: float) -> float | None:
        """Nanoseconds for that many rows; None before the first sample."""
        points = list(self._points.values())
        if not points:
            return None
        if len(points) == 1:
            (seen, ns) = points[0]
            return ns * (_FIXED_SHARE + (1 - _FIXED_SHARE) * rows / seen)
        index = next((i for i in range(1, len(points) - 1) if rows <= points[i][0]), len(points) - 1)
        (low, low_ns), (high, high_ns) = points[index - 1], points[index]
        slope = min(max(0.0, (high_ns - low_ns) / max(high - low, 0.5)), high_ns / high)
        return max(low_ns + slope * (rows - low), 0.0)


class StageCurves:
    """The curves of all stages for one kind of microbatch, and what a round takes beyond their times."""

    def __init__(self, stages: int) -> None:
        self._curves = [Curve() for _ in range(stages)]
        self.transit_ns: float | None = None  # links and coordinator

    def __bool__(self) -> bool:
        return bool(self._curves[0])

    def learn(self, rows: int, timings: Sequence[StageTiming], transit_ns: float) -> None:
        for curve, timing in zip(self._curves, timings, strict=True):
            curve.learn(rows, timing.compute_ns)
        self.transit_ns = transit_ns if self.transit_ns is None else _moved(self.transit_ns, transit_ns)

    def predict(self, rows: float) -> list[float] | None:
        """Nanoseconds on each stage; None before the first sample."""
        times = [curve.predict(rows) for curve in self._curves]
        return None if None in times else [ns for ns in times if ns is not None]


class StageTimes:
    """Curves by kind: decode alone in the pipeline, decode beside other microbatches, and anything with prefill."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.alone = StageCurves(stages)
        self.beside = StageCurves(stages)
        self.prefill = StageCurves(stages)
        self._recent_ns: list[float] | None = None
        self._transit_ns = 0.0

    def learn_decode(self, rows: int, timings: Sequence[StageTiming], elapsed_ns: int, was_alone: bool) -> None:
        self._learn(self.alone if was_alone else self.beside, rows, timings, elapsed_ns)

    def learn_prefill(self, rows: int, timings: Sequence[StageTiming], elapsed_ns: int) -> None:
        self._learn(self.prefill, rows, timings, elapsed_ns)

    def forget_beside(self) -> None:
        """Decode beside other microbatches is measured anew when it is next tried."""
        self.beside = StageCurves(self.stages)

    @property
    def in_flight(self) -> int:
        """Microbatches that keep the slowest stage busy: ceil(cycle time / slowest stage time), at least the stages."""
        if self._recent_ns is None:
            return self.stages + 1
        slowest = max(*self._recent_ns, 1.0)
        wanted = ceil((sum(self._recent_ns) + self._transit_ns) / slowest - _NEGLIGIBLE)
        return max(self.stages, min(wanted, 2 * self.stages + 1))

    def _learn(self, curves: StageCurves, rows: int, timings: Sequence[StageTiming], elapsed_ns: int) -> None:
        if len(timings) != self.stages:
            return
        transit = max(0.0, elapsed_ns - sum(t.queue_ns + t.compute_ns + t.wire_ns for t in timings))
        curves.learn(rows, timings, transit)
        if self._recent_ns is None:
            self._recent_ns = [float(timing.compute_ns) for timing in timings]
            self._transit_ns = transit
        else:
            pairs = zip(self._recent_ns, timings, strict=True)
            self._recent_ns = [ns + 0.2 * (timing.compute_ns - ns) for ns, timing in pairs]
            self._transit_ns = _moved(self._transit_ns, transit)

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf

from llamaclust.cluster.scheduler.estimates import moved
from llamaclust.cluster.scheduler.speculation.mtp_times import MtpTimes
from llamaclust.wire.microbatch.messages import Result, StageTiming

_RECENT_WEIGHT = 0.2

_FIXED_ROWS = 10

_FRESH = 96
"""Number of later samples after which a point of a curve is stale."""

_NEGLIGIBLE = 0.02
"""The slowest stage may be idle for this share of its time before one more microbatch is kept in flight."""


def _occupied_ns(timing: StageTiming) -> int:
    return timing.compute_ns + timing.wire_ns


class Curve:
    """Time of one stage by number of rows. It has a point per power of two, and is linear between points."""

    __slots__ = ("_learned", "_learned_at", "_points")

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float]] = {}  # (rows, ns) by bucket, in ascending order of bucket.
        self._learned = 0
        self._learned_at: dict[int, int] = {}  # Value of `_learned` at the last sample of each bucket.

    def learn(self, rows: int, ns: float) -> None:
        bucket = (rows - 1).bit_length()
        self._learned += 1
        self._learned_at[bucket] = self._learned
        point = self._points.get(bucket)
        if point is None:
            self._points[bucket] = (rows, ns)
            self._points = dict(sorted(self._points.items()))
        else:
            self._points[bucket] = (point[0] + 0.25 * (rows - point[0]), moved(point[1], ns))

    def extended(self, other: Curve) -> Curve:
        """Returns this curve, extended with the points of `other` that have more rows."""
        # Stale points are omitted, so that a time that was too long by chance is measured again.
        curve, first, oldest = Curve(), min(self._points, default=0), self._learned - _FRESH
        own = {bucket: p for bucket, p in self._points.items() if bucket == first or self._learned_at[bucket] > oldest}
        if own:
            last = max(own)
            curve._points = _rising(own) | {bucket: point for bucket, point in other._points.items() if bucket > last}
        return curve

    def predict(self, rows: float, other: Curve | None = None) -> float | None:
        """Returns the nanoseconds of a microbatch with `rows` rows, or None without samples. `other` provides more
        points if this curve has only one."""
        points = list(self._points.values())
        if len(points) < 2 and other is not None:
            points = sorted((other._points | self._points).values())
        if not points:
            return None
        if len(points) == 1:
            (seen, ns) = points[0]
            return ns * (_FIXED_ROWS + rows) / (_FIXED_ROWS + seen)
        index = next((i for i in range(1, len(points) - 1) if rows <= points[i][0]), len(points) - 1)
        (low, low_ns), (high, high_ns) = points[index - 1], points[index]
        slope = min(max(0.0, (high_ns - low_ns) / max(high - low, 0.5)), high_ns / high)
        return max(low_ns + slope * (rows - low), 0.0)


def _rising(points: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """Lowers each time to the minimum over larger row counts, because more rows cannot take less time."""
    rising, most = dict[int, tuple[float, float]](), inf
    for bucket, (rows, ns) in sorted(points.items(), reverse=True):
        most = min(most, ns)
        rising[bucket] = rows, most
    return dict(sorted(rising.items()))


class StageCurves:
    def __init__(self, stages: int) -> None:
        self._curves = [Curve() for _ in range(stages)]

    def learn(self, rows: int, timings: Sequence[StageTiming]) -> None:
        for curve, timing in zip(self._curves, timings, strict=True):
            curve.learn(rows, _occupied_ns(timing))

    def predict(self, rows: float, other: StageCurves | None = None) -> list[float] | None:
        helpers = other._curves if other is not None else [None] * len(self._curves)
        times = [curve.predict(rows, helper) for curve, helper in zip(self._curves, helpers, strict=True)]
        return None if None in times else [ns for ns in times if ns is not None]

    def predict_beyond(self, rows: float, other: StageCurves) -> list[float] | None:
        extended = StageCurves(0)
        pairs = zip(self._curves, other._curves, strict=True)
        extended._curves = [curve.extended(helper) for curve, helper in pairs]
        return extended.predict(rows)


class StageTimes:
    """Measured times of all stages: for decode alone, decode beside other microbatches, prefill, and scored rows."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.alone = StageCurves(stages)
        self.beside = StageCurves(stages)
        self.prefill = StageCurves(stages)
        self.scoring = StageCurves(stages)
        self.mtp = MtpTimes()
        self.transit_ns = 0.0  # Nanoseconds of a round on links and in the coordinator.
        self.whole_transit_ns = 0.0  # `transit_ns` for rounds without lookahead steps.
        self.decode_ns: float | None = None  # Total nanoseconds of all stages for recent decode microbatches.
        self._recent_ns: list[float] | None = None

    def learn(
        self,
        result: Result,
        is_decode: bool,
        was_alone: bool,
        elapsed_ns: int,
        *,
        was_lookahead: bool = False,
        was_scored: bool = False,
    ) -> None:
        """Adds a microbatch's times. `elapsed_ns` is its time in flight or, for a lookahead step, the time since the
        last result. `was_alone` means that all other microbatches in flight were lookahead steps."""
        timings = result.timings
        if len(timings) != self.stages:
            return
        decode = self.alone if was_alone else self.beside
        (decode if is_decode else self.prefill).learn(timings[0].rows, timings)
        if was_scored:
            self.scoring.learn(timings[0].rows, timings)
        now = [float(_occupied_ns(timing)) for timing in timings]
        before = self._recent_ns or now
        self._recent_ns = [old + _RECENT_WEIGHT * (new - old) for old, new in zip(before, now, strict=True)]
        if is_decode:
            decode_ns = sum(now) if self.decode_ns is None else self.decode_ns
            self.decode_ns = decode_ns + _RECENT_WEIGHT * (sum(now) - decode_ns)
        if was_alone:  # A microbatch that is not alone also waits between stages, which no stage measures.
            transit = max(0.0, elapsed_ns - sum(t.queue_ns + _occupied_ns(t) for t in timings))
            self.transit_ns = moved(self.transit_ns, transit) if self.transit_ns else transit
            if not was_lookahead:
                whole = self.whole_transit_ns
                self.whole_transit_ns = moved(whole, transit) if whole else transit

    def predictions(self, rows: int) -> list[list[float]]:
        return [ns for curves in (self.alone, self.beside, self.prefill) if (ns := curves.predict(rows)) is not None]

    def forget_beside(self) -> None:
        self.beside = StageCurves(self.stages)

    @property
    def in_flight(self) -> int:
        """Number of microbatches that must be in flight to keep all stages busy."""
        if self._recent_ns is None:
            return self.stages + 1
        slowest = max(*self._recent_ns, 1.0)
        wanted = ceil((sum(self._recent_ns) + self.transit_ns) / slowest - _NEGLIGIBLE)
        return max(self.stages, min(wanted, 2 * self.stages + 1))

"""Estimates the CPU time of one sequence's grammar matcher. The matcher itself runs on the last stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llamaclust.core.sampler.results import RowResult

_SLOW_NS = 5_000_000
"""Minimum nanoseconds of CPU time per step at which a matcher counts as slow."""


@dataclass(slots=True)
class MatcherUse:
    is_started: bool = False  # True if the last stage was sent the grammar and the answer so far.
    deferred_ns: int | None = None  # Time when the sequence's next row was first deferred.
    step_ns: int = 0  # Estimated CPU time of a step in nanoseconds.
    turn: int = 0  # Number of the turn in which a slow matcher last got rows.

    @property
    def is_slow(self) -> bool:
        return self.step_ns >= _SLOW_NS

    def defer(self, now_ns: int) -> int:
        """Defers the next row. Returns the nanoseconds since its first deferral, or 0 if no matcher is started."""
        if self.deferred_ns is None and self.is_started:
            self.deferred_ns = now_ns
        return 0 if self.deferred_ns is None else now_ns - self.deferred_ns

    def learn(self, rows: Iterable[RowResult]) -> None:
        """Updates `step_ns` from measured rows. `step_ns` falls slowly, because slow rows may follow fast rows."""
        if taken := [row.matcher_ns for row in rows if not row.is_deferred]:
            self.step_ns = max(sum(taken), self.step_ns * 3 // 4)
            self.deferred_ns = None

    def release(self) -> None:
        self.is_started, self.deferred_ns = False, None

    def restart(self) -> None:
        self.release()
        self.turn = 0

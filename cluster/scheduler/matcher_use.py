"""The scheduler's record of a sequence's matcher. It only decides when rows run. The matcher runs at the last stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llamaclust.core.sampling import RowResult

_SLOW_NS = 5_000_000
"""The nanoseconds of processor time per step from which a matcher counts as slow. Large JSON schemas take less."""


@dataclass(slots=True)
class MatcherUse:
    is_started: bool = False  # the last stage has been sent what the matcher starts with
    step_ns: int = 0  # processor time that it may take for a step
    turn: int = 0  # the last one of a slow matcher

    @property
    def is_slow(self) -> bool:
        return self.step_ns >= _SLOW_NS

    def learn(self, rows: Iterable[RowResult]) -> None:
        """Updates `step_ns` from one step's rows. `step_ns` falls slowly, because slow rows may follow quick rows."""
        if taken := [row.matcher_ns for row in rows if not row.is_deferred]:
            self.step_ns = max(sum(taken), self.step_ns * 3 // 4)

    def restart(self) -> None:
        self.is_started, self.turn = False, 0

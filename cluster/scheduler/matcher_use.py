"""A sequence's matcher at the last stage: whether it is there, and the time that it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llamaclust.core.sampling import RowResult

_SLOW_NS = 5_000_000
"""Processor time for a step from which on a matcher is slow: those of large schemas take less."""


@dataclass(slots=True)
class MatcherUse:
    """Times are the last stage's claims, and decide nothing but when the sequence's next rows are computed."""

    is_started: bool = False  # the last stage has been sent what the matcher starts with
    step_ns: int = 0  # processor time that it may take for a step
    turn: int = 0  # the last one of a slow matcher

    @property
    def is_slow(self) -> bool:
        return self.step_ns >= _SLOW_NS

    def learn(self, rows: Iterable[RowResult]) -> None:
        """Updates `step_ns` by the rows of one step. It falls slowly: quick rows may be followed by slow ones."""
        if taken := [row.matcher_ns for row in rows if not row.is_deferred]:
            self.step_ns = max(sum(taken), self.step_ns * 3 // 4)

    def restart(self) -> None:
        """The last stage is another one, and so are the turns."""
        self.is_started, self.turn = False, 0

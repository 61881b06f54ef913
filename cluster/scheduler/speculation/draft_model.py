"""Interface of a draft model, and estimates of its times."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

from llamaclust.cluster.scheduler.estimates import moved
from llamaclust.core.drafts import DraftOrder, DraftReplies

_LATE = 4.0
"""Maximum ratio of a measured time to its estimate. Longer times are clipped, because machines may pause."""
_USUAL_OVERHEAD = 0.125
"""Assumed overhead of a draft before it is measured, as a share of the time per drafted token."""


class DraftTimes:
    def __init__(self, step_ns: float, row_ns: float) -> None:
        """Takes the shortest measured times for drafting one token (`step_ns`) and for reading one (`row_ns`)."""
        self._best_step_ns, self._best_row_ns = step_ns, row_ns
        self._step_ns = {1: step_ns}
        self._row_ns = row_ns
        self._overhead_ns = _USUAL_OVERHEAD * step_ns

    def draft_ns(self, sequences: int, tokens: int, rows: int, *, at_best: bool = False) -> float:
        """Returns the time to read `rows` known tokens in total, and to draft `tokens` tokens for each sequence.
        `at_best` assumes the shortest measured times."""
        lacking = max(0, rows - sequences)
        if at_best:
            return tokens * self._best_step_ns + lacking * self._best_row_ns
        nearest = min(self._step_ns, key=lambda known: abs(known - sequences))
        return self._overhead_ns + tokens * self._step_ns[nearest] + lacking * self._row_ns

    def take_in_ns(self, rows: int) -> float:
        return rows * self._row_ns

    def learn(self, replies: DraftReplies, taken_ns: int) -> None:
        if replies.rows:
            self._row_ns = _learned(self._row_ns, replies.rows_ns / replies.rows)
        if replies.steps:
            drafted = sum(1 for reply in replies.replies if reply.tokens)
            step_ns = replies.steps_ns / replies.steps
            self._step_ns[drafted] = _learned(self._step_ns.get(drafted, step_ns), step_ns)
            overhead_ns = max(0, taken_ns - replies.rows_ns - replies.steps_ns)
            least_ns = _USUAL_OVERHEAD * self._best_step_ns / _LATE
            self._overhead_ns = _learned(max(self._overhead_ns, least_ns), overhead_ns)


def _learned(estimate: float, sample: float) -> float:
    return moved(estimate, min(sample, _LATE * estimate))


class DraftModel(Protocol):
    """Interface of a draft model. All calls must come from one event loop. Orders wait while the model computes."""

    @property
    def times(self) -> DraftTimes: ...

    @property
    def is_lost(self) -> bool:
        """True after the first failure. The model is not used again."""

    def lose(self) -> None: ...

    def draft(self, orders: Sequence[DraftOrder]) -> Awaitable[DraftReplies]:
        """Drafts tokens for each order, if memory allows. Work begins even before the result is awaited."""

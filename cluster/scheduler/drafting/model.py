"""The interface of a draft model, and what it takes. It is asked ahead of a step, which waits for its draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llamaclust.core.drafts import DraftOrder, DraftReplies

_WEIGHT = 0.125
_LATE = 4.0
"""A time that is so many times the expected one counts as that: machines pause."""


class DraftTimes:
    """Of a draft model, in nanoseconds: measured, and learned from what its drafts take."""

    def __init__(self, step_ns: float, row_ns: float) -> None:
        """Of a token drafted for one sequence, and of one that it takes in."""
        self._step_ns = {1: step_ns}
        self._row_ns = row_ns
        self._overhead_ns = 0.0

    def draft_ns(self, sequences: int, tokens: int, rows: int) -> float:
        """For so many tokens of each sequence, of which the model lacks so many `rows` in all."""
        nearest = min(self._step_ns, key=lambda known: abs(known - sequences))
        lacking = max(0, rows - sequences)
        return self._overhead_ns + tokens * self._step_ns[nearest] + lacking * self._row_ns

    def take_in_ns(self, rows: int) -> float:
        return rows * self._row_ns

    def learn(self, replies: DraftReplies, taken_ns: int) -> None:
        """`taken_ns`: from the orders to the replies."""
        if replies.rows:
            self._row_ns = _moved(self._row_ns, replies.rows_ns / replies.rows)
        if replies.steps:
            drafted = sum(1 for reply in replies.replies if reply.tokens)
            step_ns = replies.steps_ns / replies.steps
            self._step_ns[drafted] = _moved(self._step_ns.get(drafted, step_ns), step_ns)
            overhead_ns = max(0, taken_ns - replies.rows_ns - replies.steps_ns)
            self._overhead_ns = _moved(self._overhead_ns or overhead_ns, overhead_ns)


def _moved(estimate: float, sample: float) -> float:
    return estimate + _WEIGHT * (min(sample, _LATE * estimate) - estimate)


class DraftModel(Protocol):
    """Used from one event loop. Orders that come meanwhile wait."""

    @property
    def times(self) -> DraftTimes: ...

    async def draft(self, orders: Sequence[DraftOrder]) -> DraftReplies:
        """Of each order's sequence, as far as there is memory for it."""

"""Decides how many tokens an MTP (multi-token prediction) head drafts after a step. Drafting makes the step longer."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from math import inf

from llamaclust.cluster.scheduler.drafting.drafter import MTP
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.speculation.costs import HOPEFUL_RATE, MARGIN, MeasuredRounds, counts_to_try
from llamaclust.cluster.scheduler.speculation.drafts import expected
from llamaclust.cluster.scheduler.speculation.mtp_times import MtpTimes


class MtpDrafts:
    def __init__(self, times: MtpTimes, rounds: MeasuredRounds) -> None:
        self._times = times
        self._rounds = rounds

    def length(self, sequences: Items[Sequence], speed: float, groups: int, most: int) -> int:
        """Returns how many tokens the MTP head should draft. `speed` is the tokens per nanosecond without the head."""
        drafted = [sequence for sequence in sequences if may_order(sequence)]
        if not drafted or not most or self._rounds.plain_ns(len(sequences), groups) == inf:
            return 0
        rates = [sequence.drafting.rate(MTP) for sequence in drafted]
        count = self._best(rates, len(sequences), speed, groups, most)
        if not count and any(map(_is_due, drafted)):
            hopeful = [max(rate, HOPEFUL_RATE) for rate in rates]
            return min(1, self._best(hopeful, len(sequences), speed, groups, most))
        return count

    def _best(self, rates: Items[float], together: int, speed: float, groups: int, most: int) -> int:
        best, best_speed = 0, (1 + MARGIN) * speed
        for count in counts_to_try(most):
            draft_ns = self._times.draft_ns(len(rates), count)
            if draft_ns is None:
                return 1  # No time is known yet, so one token is drafted to measure it.
            tokens = together + sum(expected(rate, count) for rate in rates)
            ns = self._rounds.window_ns(together + count * len(rates), groups) + draft_ns
            if tokens / ns > best_speed:
                best, best_speed = count, tokens / ns
        return best


def order_drafts(sequences: Iterable[Sequence], count: int) -> None:
    for sequence in sequences if count else ():
        if may_order(sequence):
            sequence.drafting.mtp.order(len(sequence.tokens), count)


def may_order(sequence: Sequence) -> bool:
    drafting = sequence.drafting
    return drafting.has_mtp and sequence.may_draft and sequence.left > 2 and drafting.drafts is not None


def _is_due(sequence: Sequence) -> bool:
    return sequence.drafting.mtp.is_due(len(sequence.tokens))

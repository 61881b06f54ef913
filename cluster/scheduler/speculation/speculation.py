"""Which sequences of a scheduler compute drafted tokens in the next microbatch, and how many."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from llamaclust.cluster.scheduler.drafting.drafter import CLASSES
from llamaclust.cluster.scheduler.kv_allocator import KvMemory
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.acceptance import Acceptance
from llamaclust.cluster.scheduler.speculation.costs import MeasuredRounds
from llamaclust.cluster.scheduler.speculation.drafts import SequenceDrafts
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.cluster.scheduler.speculation.windows import Candidate, best_windows
from llamaclust.cluster.scheduler.stage_times import StageTimes

_MOST_REPEATED = 4
"""Known rows behind a state that refused windows did not change. With more of them a step without drafts comes first:
else each further refused window would add to the rows of all later ones."""


class Speculation:
    """Of one pipeline."""

    def __init__(self, settings: SchedulerSettings, own: SpeculationSettings, times: StageTimes) -> None:
        self._most = settings.max_drafted
        self._vocabulary = settings.vocabulary
        self._drafters = own.drafters
        self._times = MeasuredRounds(times)
        self._acceptance = [Acceptance() for _ in range(CLASSES)]

    def draft(self, sequences: Items[Sequence], memory: KvMemory, groups: int, most_rows: int, reserve: int) -> None:
        """Has sequences that have grown for a microbatch compute drafted rows in it: `most_rows` in all, if `reserve`
        KV blocks are left. There are so many microbatches that are alike."""
        candidates = [self._next(sequence) for sequence in sequences]
        windows = self._windows(candidates, groups, most_rows)
        for sequence, candidate, window in zip(sequences, candidates, windows, strict=True):
            if window:
                memory.draft(sequence, candidate.tokens[:window], reserve)

    def waits(self, sequences: Iterable[Sequence], most_rows: int) -> bool:
        """Whether one of these should rather wait for its next token than be computed behind it, since drafted ones
        will follow."""
        return any(self._windows([self._next(sequence) for sequence in sequences], 1, most_rows))

    def ended(self, sequence: Sequence) -> None:
        """It has its whole answer."""
        if sequence.generated:
            self._drafters.ended(sequence.block_keys.salt, sequence.tokens[sequence.prompt_length :])

    def _next(self, sequence: Sequence) -> Candidate:
        if not sequence.may_draft or (sequence.states.is_begun and sequence.remaining > _MOST_REPEATED):
            return Candidate()
        if sequence.drafts is None:
            drafter = self._drafters.of(sequence.block_keys.salt)
            sequence.drafts = SequenceDrafts(drafter, self._vocabulary, self._acceptance)
        most = self._most if sequence.request.max_drafted is None else min(self._most, sequence.request.max_drafted)
        return sequence.drafts.next(sequence.tokens, min(most, sequence.left - 1))

    def _windows(self, candidates: Items[Candidate], groups: int, most_rows: int) -> list[int]:
        self._times.refresh()
        return best_windows(candidates, self._times, groups, most_rows)

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from math import inf
from typing import Self

from llamaclust.cluster.scheduler.drafting.drafter import CLASSES
from llamaclust.cluster.scheduler.kv.memory import RESERVE_BLOCKS, KvMemory
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.acceptance import Acceptance
from llamaclust.cluster.scheduler.speculation.candidates import Candidate
from llamaclust.cluster.scheduler.speculation.costs import MeasuredRounds
from llamaclust.cluster.scheduler.speculation.drafts import SequenceDrafts
from llamaclust.cluster.scheduler.speculation.model_drafts import ModelDrafts
from llamaclust.cluster.scheduler.speculation.mtp_drafts import MtpDrafts, order_drafts
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.cluster.scheduler.speculation.windows import best_chain, best_windows, speed_of
from llamaclust.cluster.scheduler.stage_times import StageTimes

_MOST_REPEATED = 4
"""Maximum number of known tokens that a step with drafts computes again, to restore recurrent states."""


_OTHER_RATE = 0.02


class Speculation:
    def __init__(self, settings: SchedulerSettings, own: SpeculationSettings, times: StageTimes) -> None:
        self._most = settings.max_drafted
        self._may_chain = settings.may_repeat_rows
        self._most_rows = min(settings.max_outputs, settings.max_batch_tokens)
        self._vocabulary = settings.vocabulary
        self._drafters = own.drafters
        self._times = MeasuredRounds(times)
        self._model_drafts = None if own.draft_model is None else ModelDrafts(own.draft_model, self._times)
        self._mtp = MtpDrafts(times.mtp, self._times) if own.mtp else None
        self._acceptance = [Acceptance() for _ in range(CLASSES)]

    @classmethod
    def of(cls, settings: SchedulerSettings, times: StageTimes) -> Self | None:
        own = settings.speculation
        return None if own is None or not settings.max_drafted else cls(settings, own, times)

    def draft(self, sequences: Items[Sequence], memory: KvMemory, groups: int, most_rows: int, running: int) -> None:
        """Chooses drafted tokens for a microbatch's sequences, at most `most_rows` in total."""
        candidates = [self._next(sequence) if most_rows > 0 else Candidate() for sequence in sequences]
        windows = self._windows(candidates, groups, most_rows)
        for sequence in sequences:
            if sequence.drafting.drafts is not None:
                sequence.drafting.drafts.chain = None
        if self._mtp is not None:
            order_drafts(sequences, self._mtp_length(sequences, candidates, windows, groups))
        if sequences and groups == running == 1:
            windows = [self._chained(sequences[0], candidates[0], windows[0], most_rows)]
        for sequence, candidate, window in zip(sequences, candidates, windows, strict=True):
            if window:
                memory.draft(sequence, candidate.tokens[:window], RESERVE_BLOCKS * running)

    def further(self, sequence: Sequence, under_way: int) -> tuple[int, ...]:
        """Returns the tokens to draft next for a sequence that runs alone, or () if there are none."""
        drafts = sequence.drafting.drafts
        if drafts is None or (chain := drafts.chain) is None or under_way >= chain.depth:
            return ()
        window, most = chain.window, min(self._most_rows, self._most_of(sequence))
        if abs((rate := drafts.current_rate) - chain.rate) > _OTHER_RATE:
            again = best_chain(rate, drafts.length, self._times, most)
            window = window if again is None else again.window
        most = min(window, most, sequence.left - 1 - len(sequence.drafting.ahead))
        return drafts.further(sequence.tokens, sequence.drafting.ahead, most) if most > 0 else ()

    def _chained(self, sequence: Sequence, candidate: Candidate, window: int, most_rows: int) -> int:
        drafting = sequence.drafting
        if (drafts := drafting.drafts) is None:
            return window
        if window and self._may_chain and sequence.samples_alone and not (drafts.is_of_mtp or drafting.mtp.ordered):
            chain = best_chain(candidate.rate, drafts.length, self._times, min(most_rows, len(candidate.tokens)))
            if chain is not None and chain.speed > speed_of([candidate], [window], self._times, 1):
                drafts.chain = chain
        return window if drafts.chain is None else drafts.chain.window

    def waits(self, sequences: Items[Sequence], most_outputs: int) -> bool:
        """True if a step with drafts will follow, so that no lookahead step should be sent."""
        drafts = self.model_drafts
        if drafts is not None and any(map(drafts.awaits, sequences)):
            return True
        if any(sequence.drafting.mtp.is_awaited for sequence in sequences):
            return True
        if (most_rows := most_outputs - len(sequences)) < 1:
            return False
        candidates = [self._next(sequence) for sequence in sequences]
        windows = self._windows(candidates, 1, most_rows)
        if self._mtp_length(sequences, candidates, windows, 1):
            return True
        return any(windows) or bool(self._model_length(sequences, candidates, windows))

    def ended(self, sequence: Sequence) -> None:
        if sequence.generated:
            self._drafters.ended(sequence.kv.keys.salt, sequence.tokens[sequence.prompt_length :])

    # -- drafts of a draft model -----------------------------------------------------------------------------------

    def ready(self, sequences: list[Sequence], groups: int, most_rows: int) -> list[Sequence]:
        if (drafts := self.model_drafts) is None:
            return sequences
        present = [sequence for sequence in sequences if not drafts.awaits(sequence)]
        if groups > 1 or not present:
            return present
        candidates = [self._next(sequence) for sequence in present]
        length = self._model_length(present, candidates, self._windows(candidates, groups, most_rows))
        return drafts.order(present, self._orderable(present), length) if length else present

    @property
    def model_drafts(self) -> ModelDrafts | None:
        drafts = self._model_drafts
        return None if drafts is None or drafts.model.is_lost else drafts

    def forget(self, sequence: Sequence) -> None:
        if self._model_drafts is not None:
            self._model_drafts.forget(sequence.key)

    def _model_length(self, sequences: Items[Sequence], candidates: Items[Candidate], windows: Items[int]) -> int:
        drafts = self.model_drafts
        if drafts is None or not sequences or self._times.plain_ns(len(sequences), 1) == inf:
            return 0
        speed = speed_of(candidates, windows, self._times, 1)
        return drafts.length(sequences, self._orderable(sequences), speed)

    def _orderable(self, sequences: Iterable[Sequence]) -> dict[int, int]:
        return {
            sequence.key: self._most_of(sequence)
            for sequence in sequences
            if sequence.may_draft
            and sequence.images is None
            and not sequence.drafting.forced
            and sequence.drafting.drafts is not None
            and not sequence.drafting.drafts.has_offer(sequence.tokens)
        }

    # --------------------------------------------------------------------------------------------------------------

    def _mtp_length(
        self, sequences: Items[Sequence], candidates: Items[Candidate], windows: Items[int], groups: int
    ) -> int:
        if self._mtp is None or not sequences:
            return 0
        others = [s.drafting.drafts is None or not s.drafting.drafts.is_of_mtp for s in sequences]
        candidates = [each if other else Candidate() for each, other in zip(candidates, others, strict=True)]
        windows = [window if other else 0 for window, other in zip(windows, others, strict=True)]
        most = min(map(self._most_of, sequences)) - 1
        return self._mtp.length(sequences, speed_of(candidates, windows, self._times, groups), groups, max(most, 0))

    def _most_of(self, sequence: Sequence) -> int:
        most = self._most if sequence.request.max_drafted is None else min(self._most, sequence.request.max_drafted)
        return min(most, sequence.left - 1)

    def _next(self, sequence: Sequence) -> Candidate:
        if not sequence.may_draft or (sequence.kv.states.is_begun and sequence.remaining > _MOST_REPEATED):
            return Candidate()
        if sequence.drafting.drafts is None:
            drafter = self._drafters.of(sequence.kv.keys.salt)
            sequence.drafting.drafts = SequenceDrafts(drafter, self._vocabulary, self._acceptance)
        return sequence.drafting.drafts.next(sequence.tokens, self._most_of(sequence), sequence.drafting.forced)

    def _windows(self, candidates: Items[Candidate], groups: int, most_rows: int) -> list[int]:
        self._times.refresh()
        return best_windows(candidates, self._times, groups, most_rows)

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch, SequenceSlice
from llamaclust.cluster.scheduler.rows.tasks import matcher_start
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.stage_times import StageTimes
from llamaclust.core.epochs import epoch_text
from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.wire.microbatch.messages import Microbatch, Result, SamplingInputs

_DEFERRED_S = 90.0
"""Maximum seconds for which the last stage may defer a row because its matcher is not ready."""


@dataclass(slots=True)
class _Sent:
    number: int
    slices: tuple[SequenceSlice, ...]
    decoding: int  # Number of decode slices, which are first in `slices`.
    is_lookahead: bool  # True if the input tokens were unknown when the microbatch was sent.
    # True if all other microbatches in flight were lookahead steps, or steps on which this lookahead step depends.
    alone: bool
    sent_ns: int
    # Time when this microbatch was sent. For a lookahead step, the time when the previous result was computed.
    begun_ns: int


def _highest_token(row: RowResult) -> int:
    highest = max(row.token, *row.forced, *row.forced_draft, 0)
    return max(highest, max(row.top_logprobs)[0]) if row.top_logprobs else highest


class InFlight:
    def __init__(self, settings: SchedulerSettings, epoch: int, times: StageTimes) -> None:
        self._model_id = settings.model_id
        self._vocabulary = settings.vocabulary
        self._row_bytes = 4 * settings.embedding_length  # Bytes of one returned hidden state.
        self._may_draft = settings.speculation is not None and settings.max_drafted > 0
        self.epoch = epoch
        self._times = times
        self._next_number = 0
        self._sent: deque[_Sent] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def live(self) -> int:
        return sum(any(not taken.is_stale for taken in sent.slices) for sent in self._sent)

    @property
    def decoding(self) -> int:
        return sum(any(not taken.is_stale for taken in sent.slices[: sent.decoding]) for sent in self._sent)

    @property
    def has_prefill(self) -> bool:
        return any(sent.decoding < len(sent.slices) for sent in self._sent)

    @property
    def oldest_ns(self) -> int | None:
        return self._sent[0].sent_ns if self._sent else None

    @property
    def due(self) -> tuple[int, int] | None:
        return (self.epoch, self._sent[0].number) if self._sent else None

    @property
    def newest(self) -> int | None:
        return self._sent[-1].number if self._sent else None

    def slices(self, number: int | None = None) -> list[SequenceSlice]:
        return [taken for sent in self._sent if number in (None, sent.number) for taken in sent.slices]

    @property
    def adapters(self) -> set[int]:
        return {number for taken in self.slices() for number, _ in taken.chunk.adapters}

    @property
    def most_rows(self) -> int:
        return max((sum(len(taken.chunk.tokens) for taken in sent.slices) for sent in self._sent), default=0)

    def send(
        self, slices: tuple[SequenceSlice, ...], decoding: int, now_ns: int, released: tuple[int, ...] = ()
    ) -> ScheduledMicrobatch:
        number = self._next_number
        self._next_number += 1
        is_lookahead = any(taken.chunk.depends_on for taken in slices)
        if not is_lookahead:
            for other in self._sent:
                other.alone = False
        alone = is_lookahead or not self._sent
        self._sent.append(_Sent(number, slices, decoding, is_lookahead, alone, now_ns, now_ns))
        row = 0
        for taken in slices:
            row += len(taken.tasks)
            if taken.sampled:
                taken.sequence.sampled_at = (number, row - 1)
        chunks = tuple(taken.chunk for taken in slices)
        tasks = tuple(task for taken in slices for task in taken.tasks)
        others = (taken.sequence for taken in slices if not taken.sequence.sampler.is_plain)
        matchers = (matcher_start(sequence, may_draft=self._may_draft) for sequence in others)
        starts = tuple(start for start in matchers if start is not None)
        microbatch = Microbatch(self._model_id, self.epoch, number, chunks)
        return ScheduledMicrobatch(microbatch, SamplingInputs(self.epoch, number, tasks, released, starts))

    def complete(self, result: Result, now_ns: int) -> tuple[SequenceSlice, ...]:
        """Checks a result against the oldest microbatch in flight, and returns the slices of that microbatch. `now_ns`
        is the time when the result was computed, which may be before it arrived. Raises ProtocolError if the result
        does not match."""
        due = self._sent[0] if self._sent else None
        if due is None or (result.epoch, result.number) != (self.epoch, due.number):
            expected = f"microbatch {due.number} of epoch {epoch_text(self.epoch)}" if due else "nothing"
            given = f"microbatch {result.number} of epoch {epoch_text(result.epoch)}"
            raise ProtocolError(f"the pipeline returned a result for {given}, but {expected} is due")
        outputs = sum(len(taken.tasks) for taken in due.slices)
        if (found := len(result.rows)) != outputs:
            raise ProtocolError(f"microbatch {due.number} came back with {found} results instead of {outputs}")
        embedded, found = sum(taken.chunk.embedded_rows for taken in due.slices), len(result.embeddings)
        if found != embedded * self._row_bytes:
            rows = f"{embedded} hidden states of {self._row_bytes} bytes"
            raise ProtocolError(f"microbatch {due.number} came back with {found} bytes instead of {rows}")
        if (token := max(map(_highest_token, result.rows), default=0)) >= self._vocabulary:
            what = f"token id {token}; the vocabulary has {self._vocabulary} tokens"
            raise ProtocolError(f"microbatch {due.number} came back with {what}")
        deferred = any(row.is_deferred for row in result.rows)
        if deferred:
            self._check_deferred(due, result.rows, now_ns)
        self._sent.popleft()
        if self._sent and self._sent[0].is_lookahead:
            self._sent[0].begun_ns = now_ns
        if deferred:
            return due.slices  # The measured time may include waiting for a matcher.
        is_decode = due.decoding == len(due.slices)
        is_scored = any(taken.is_scored for taken in due.slices)
        elapsed_ns = now_ns - due.begun_ns - result.drafting_ns
        if ordered := sum(taken.chunk.drafts > 0 for taken in due.slices):
            self._times.mtp.learn(ordered, max(len(row.drafted) for row in result.rows), result.drafting_ns)
        self._times.learn(
            result, is_decode, due.alone, elapsed_ns, was_lookahead=due.is_lookahead, was_scored=is_scored
        )
        return due.slices

    def _check_deferred(self, due: _Sent, rows: tuple[RowResult, ...], now_ns: int) -> None:
        at = 0
        for taken in due.slices:
            places = range(at, at := at + len(taken.tasks))
            deferred = [taken.tasks[place - places.start] for place in places if rows[place].is_deferred]
            if any(not isinstance(task, SampleTask) or task.matcher is None for task in deferred):
                raise ProtocolError(f"microbatch {due.number} came back with a deferred row that has no matcher")
            if deferred and taken.sequence.matcher.defer(now_ns) > _DEFERRED_S * 1e9:
                raise ProtocolError(f"microbatch {due.number} deferred a row again after {_DEFERRED_S:g} s")

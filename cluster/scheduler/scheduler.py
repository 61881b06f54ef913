"""Decides what the stages compute next: continuous batching, chunked prefill, preemption. Reads no clock."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import accumulate, islice
from operator import attrgetter

from llamaclust.cluster.scheduler.counts import Counts
from llamaclust.cluster.scheduler.in_flight import InFlight
from llamaclust.cluster.scheduler.kv.memory import RESERVE_BLOCKS, KvMemory
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys
from llamaclust.cluster.scheduler.lookahead import Lookahead
from llamaclust.cluster.scheduler.matcher_turns import MatcherTurns
from llamaclust.cluster.scheduler.microbatching import DecodeSplit
from llamaclust.cluster.scheduler.queues import SequenceQueues
from llamaclust.cluster.scheduler.requests import Failed, Finished, GenerationRequest, Update
from llamaclust.cluster.scheduler.rows.answering import answer
from llamaclust.cluster.scheduler.rows.chunking import chunk_rows, embedded_rows, scored_rows
from llamaclust.cluster.scheduler.rows.completed import Completed
from llamaclust.cluster.scheduler.rows.prefill_batch import PrefillBatch
from llamaclust.cluster.scheduler.rows.retries import Retries, Retry, RowFault
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch, SequenceSlice
from llamaclust.cluster.scheduler.rows.slicing import take_token
from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.counts import DraftCounts
from llamaclust.cluster.scheduler.speculation.sequence_drafting import Drafting
from llamaclust.cluster.scheduler.speculation.speculation import Speculation
from llamaclust.cluster.scheduler.stage_times import StageTimes
from llamaclust.cluster.scheduler.strikes import Strikes
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.cluster.scheduler.validation import check_images, validate
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Result

_VISIBLE_WAITING = 8

_SHARED, _SHARED_ROWS = 4, 32
"""Divisor of the prefill time limit, and maximum rows of a chunk, while another pipeline uses the same workers."""

_by_remaining = attrgetter("remaining")
_next_rows = attrgetter("next_rows")


class Scheduler:
    def __init__(self, settings: SchedulerSettings, epoch: int, stages: int) -> None:
        self._use_pipeline(settings, epoch, stages)
        self.queues = SequenceQueues(KvMemory(settings), settings.max_sequences)
        self._sequences: dict[int, Sequence] = {}
        self.strikes = Strikes()
        self.is_shared = False  # True while another pipeline runs on the same workers.
        self._burst_tokens = 0  # Maximum number of pending prompt tokens since the last time there were none.
        self._next_key = 0
        self.drafts = DraftCounts()
        self.retries = Retries()
        self._computed_tokens = 0

    def _use_pipeline(self, settings: SchedulerSettings, epoch: int, stages: int) -> None:
        self.settings = settings
        self.times = StageTimes(stages)
        self.speculation = Speculation.of(settings, self.times)
        self._split = DecodeSplit(self.times)
        self._turns = MatcherTurns(self.times)
        self.lookahead = Lookahead(self.times, has_states=settings.has_states)
        self.in_flight = InFlight(settings, epoch, self.times)

    @property
    def counts(self) -> Counts:
        blocks = self.queues.memory.blocks
        return Counts(
            running=len(self.queues.running),
            waiting=len(self.queues.waiting) + len(self.queues.restoring) + len(self.queues.too_long),
            in_flight=len(self.in_flight),
            kv_blocks=blocks.count,
            kv_blocks_held=blocks.held,
            preemptions=self.queues.preemptions,
            retries=self.retries.count,
            cached_tokens=self.queues.cached_tokens,
            computed_tokens=self._computed_tokens,
        )

    @property
    def sequences(self) -> list[Sequence]:
        return list(self._sequences.values())

    @property
    def by_key(self) -> Mapping[int, Sequence]:
        return self._sequences

    def check_room(self, owner: str, more: int) -> None:
        """Raises QueueFullError if the queue has no room for `more` sequences of an owner."""
        self.queues.check_room(owner, self.settings.max_waiting, more)

    def add(self, request: GenerationRequest, now_ns: int) -> Sequence:
        """Makes a sequence and queues it if it needs computation. Raises QueueFullError or ParameterError."""
        settings = self.settings
        if request.needs_place:
            self.queues.check_room(request.owner, settings.max_waiting)
        other = next((other for other in self._sequences.values() if other.has_prompt_of(request)), None)
        validate(request, settings, is_prompt_valid=other is not None)
        check_images(request, settings)
        self._next_key += 1
        max_new_tokens = min(request.max_new_tokens, settings.max_sequence_tokens - len(request.prompt))
        is_whole, drafting = settings.whole_prompts, Drafting(settings.has_mtp and not request.images)
        sequence = Sequence(self._next_key, request, max_new_tokens, Usage(now_ns), is_whole, drafting=drafting)
        if other is not None:
            sequence.kv.keys = other.kv.keys.shared(other.prompt_length // KV_BLOCK_TOKENS)
        elif request.adapters:
            computed_by = [(settings.adapters[number], scale) for number, scale in sorted(request.adapters)]
            sequence.kv.keys = BlockKeys(request.cache_salt, computed_by, request.images)
        if sequence.known_end is None:
            self.queues.add(sequence, settings.max_waiting)
            self._sequences[sequence.key] = sequence
        return sequence

    def abort(self, key: int) -> Sequence | None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self.queues.remove(sequence)
            self.strikes.forget(sequence)
            if self.speculation is not None:
                self.speculation.forget(sequence)
        return sequence

    def restart(self, settings: SchedulerSettings, epoch: int, stages: int) -> None:
        self._use_pipeline(settings, epoch, stages)
        self.queues.restart(KvMemory(settings), settings.max_sequences, self._sequences.values())

    # -- sequences of other pipelines ------------------------------------------------------------------------------

    def successor(self, settings: SchedulerSettings, epoch: int, stages: int) -> Scheduler:
        successor = Scheduler(settings, epoch, stages)
        successor._next_key = self._next_key
        return successor

    @property
    def movable(self) -> list[Sequence]:
        waiting = (*self.queues.waiting, *self.queues.too_long)
        return [sequence for sequence in waiting if not sequence.in_flight]

    def put_back(self, sequence: Sequence) -> None:
        if sequence.is_running:
            self.queues.put_back(sequence)

    def take_over(self, other: Scheduler, sequences: Items[Sequence]) -> None:
        """Moves sequences from another scheduler to this scheduler. The sequences must be in the other scheduler's
        `movable`, unless its pipeline is lost."""
        for sequence in sequences:
            other.queues.remove(sequence)
            del other._sequences[sequence.key]
            other.strikes.move(sequence, self.strikes)
            if other.speculation is not None:
                other.speculation.forget(sequence)
            self._sequences[sequence.key] = sequence
        self.queues.take(sequences)
        self._sequences = dict(sorted(self._sequences.items()))

    def has_room_for(self, sequence: Sequence) -> bool:
        queues = self.queues
        if queues.waiting or queues.restoring or len(queues.running) >= queues.max_running:
            return False
        is_short = len(sequence.tokens) < self.settings.max_sequence_tokens
        return is_short and queues.memory.has_room_for((sequence,), RESERVE_BLOCKS * (len(queues.running) + 1))

    # -- microbatches ----------------------------------------------------------------------------------------------

    def next_microbatch(self, now_ns: int) -> ScheduledMicrobatch | None:
        self.queues.memory.begin_microbatch()
        isolated = self.strikes.isolated
        if isolated is not None and isolated not in self.queues.too_long:
            is_busy = len(self.in_flight) or self.queues.restoring or self.queues.memory.transfers.are_under_way
            return None if is_busy else self._next_alone(isolated, now_ns)
        # One extra microbatch in flight keeps stages busy after a short chunk, but delays tokens if sequences decode.
        room = self.times.in_flight - self.in_flight.live
        self.queues.held = self._turns.held(self.queues.running)
        has_room = room > 0 or (room == 0 and not self.queues.decoding)
        # While no sequence can start, lookahead may keep the pipeline full, so turns are given without room too.
        if has_room or not self.queues.can_start:
            self.queues.give_turn()
        if not has_room or self.queues.are_settled:
            return self._next_ahead(now_ns)
        for sequence in self.queues.prefilling:
            self.queues.extend(sequence)
        ready = self._ready_to_decode()
        prefill = self._prefill_slices(ready, now_ns)
        if not prefill:
            ready = self._drafted(
                ready[: self._split.rows(self.queues.decoding, self.in_flight.decoding)] if ready else ready
            )
        slices = (*map(take_token, ready), *prefill)
        return self._launch(slices, len(ready), now_ns) if slices else self._next_ahead(now_ns)

    def complete(self, result: Result, now_ns: int, *, suspects_workers: bool = False) -> Completed:
        """Processes a microbatch's result. `suspects_workers` means that another worker can take the last stage after a
        failure. Raises ProtocolError if the result does not belong to the oldest microbatch in flight."""
        completed = Completed()
        row = at = 0  # Offsets in `result.rows` and in `result.embeddings`.
        slices = self.in_flight.complete(result, now_ns)
        row_bytes = len(result.embeddings) // max(1, sum(taken.chunk.embedded_rows for taken in slices))
        for taken in slices:
            row_end, end = row + len(taken.tasks), at + row_bytes * taken.chunk.embedded_rows
            if updates := self._complete_slice(taken, result.rows[row:row_end], result.embeddings[at:end], now_ns):
                self._end(taken.sequence, updates, completed, suspects_workers=suspects_workers)
            row, at = row_end, end
        return completed

    def _complete_slice(
        self, taken: SequenceSlice, rows: tuple[RowResult, ...], embeddings: bytes, now_ns: int
    ) -> list[Update]:
        sequence = taken.sequence
        sequence.in_flight -= 1
        sequence.sampling -= taken.sampled > 0
        if sequence.request.needs_matcher:
            sequence.matcher.learn(rows)
        if taken.is_stale:
            self.drafts += DraftCounts.of_window(taken.draft_kind, taken.drafted, 0)
            return []
        sequence.computed = taken.end
        if not taken.is_answered or not sequence.counts_results:
            self.strikes.computed(sequence, taken.end - taken.drafted)
            return []
        accepted = sequence.drafting.accepted
        updates = answer(sequence, taken, rows, embeddings, now_ns)
        is_deferred = taken.sampled > 0 and rows[len(rows) - taken.sampled].is_deferred
        if not is_deferred and not (updates and isinstance(updates[-1], Failed)):
            self.strikes.computed(sequence, sequence.computed)
        if taken.drafted:
            right = sequence.drafting.accepted - accepted
            self.drafts += DraftCounts.of_window(taken.draft_kind, taken.drafted, right)
            self.queues.memory.settle(sequence, is_whole=sequence.scheduled >= taken.end)
        if is_deferred and not self.settings.may_repeat_rows:
            self.queues.recompute(sequence)
        return updates

    def _end(self, sequence: Sequence, updates: list[Update], completed: Completed, *, suspects_workers: bool) -> None:
        if isinstance(last := updates[-1], Failed):
            retry = self.retries.failed(sequence, last, suspects_workers=suspects_workers)
            if retry is Retry.ELSEWHERE:
                completed.faults.append(RowFault(sequence.key, last.message))
            if retry in (Retry.AGAIN, Retry.ELSEWHERE):
                self.queues.discard(sequence)
                return
            if retry is Retry.FAILED_ELSEWHERE:
                completed.failed_elsewhere.append(sequence.key)
        if isinstance(last, Finished):
            self.queues.memory.finished(sequence)
            if self.speculation is not None:
                self.speculation.ended(sequence)
        if isinstance(last, Finished | Failed):
            self.abort(sequence.key)
        completed.updated.append((sequence.key, updates))

    # -- decode ----------------------------------------------------------------------------------------------------

    def _ready_to_decode(self) -> list[Sequence]:
        awaiting = self.queues.awaiting_decode
        for sequence in awaiting:
            self.queues.grow(sequence)
        return self._fitting([sequence for sequence in awaiting if sequence.phase is Phase.DECODE])

    def _fitting(self, decoding: list[Sequence]) -> list[Sequence]:
        ends = accumulate(map(_next_rows, decoding))
        return [sequence for sequence, end in zip(decoding, ends, strict=True) if end <= self.settings.max_batch_tokens]

    def _drafted(self, ready: list[Sequence]) -> list[Sequence]:
        if self.speculation is None or not ready:
            return ready
        queues, settings = self.queues, self.settings
        rows = min(settings.max_outputs - len(ready), settings.max_batch_tokens - sum(map(_next_rows, ready)))
        groups = self._split.groups(queues.decoding)
        ready = self.speculation.ready(ready, groups, rows)
        self.speculation.draft(ready, queues.memory, groups, rows, len(queues.running))
        return ready

    def _next_ahead(self, now_ns: int) -> ScheduledMicrobatch | None:
        queues = self.queues
        if queues.can_start or queues.prefilling or self._split.groups(queues.decoding) > 1:
            return None
        if (further := self._next_window(now_ns)) is not None:
            return further
        several = queues.decode_plainly and not self.is_shared
        steps = self.lookahead.steps(len(self.in_flight), several=several)
        if not steps or any(sequence.expects_forced for sequence in queues.running):
            return None
        if self.speculation is not None and self.speculation.waits(queues.running, self.settings.max_outputs):
            return None
        known = {*queues.awaiting_decode}
        growing = [sequence for sequence in queues.running if sequence in known or sequence.may_go_ahead(steps)]
        ahead = self._fitting(list(filter(queues.memory.grow, growing)))
        return self._launch(tuple(map(take_token, ahead)), len(ahead), now_ns) if ahead else None

    def _next_window(self, now_ns: int) -> ScheduledMicrobatch | None:
        queues = self.queues
        if self.speculation is None or len(queues.running) != 1:
            return None
        (sequence,) = queues.running
        if sequence.awaits_decode or not sequence.may_draft_further:
            return None
        if tokens := self.speculation.further(sequence, self.in_flight.live):
            queues.memory.draft(sequence, tokens, RESERVE_BLOCKS)
        return self._launch((take_token(sequence),), 1, now_ns) if sequence.drafting.next else None

    def _next_alone(self, sequence: Sequence, now_ns: int) -> ScheduledMicrobatch | None:
        """Returns a microbatch of this sequence only. May preempt others. Requires that no microbatch is in flight."""
        queues = self.queues
        queues.make_room(sequence)
        if sequence.phase is Phase.DECODE:
            return self._launch((take_token(sequence),), 1, now_ns)
        rows = chunk_rows(self.settings, self.times, sequence.remaining, sequence.remaining, 0, alone=True)
        rows = sequence.remaining if sequence.is_whole else min(rows, self.strikes.rows(sequence))
        limits = self.settings
        batch = PrefillBatch(
            queues.memory,
            now_ns,
            rows_left=rows,
            room=limits.max_batch_tokens,
            outputs_left=limits.max_outputs,
            scored_left=limits.max_outputs,
            embedded_left=limits.max_embedded_rows,
            image_bytes_left=limits.max_image_bytes,
        )
        batch.add(sequence)
        slices = tuple(batch.slices.values())
        self._computed_tokens += len(slices[0].chunk.tokens)
        return self._launch(slices, 0, now_ns)

    # -- prefill ---------------------------------------------------------------------------------------------------

    def _prefill_slices(self, ready: list[Sequence], now_ns: int) -> list[SequenceSlice]:
        """Returns the prompt slices of a microbatch. Half of the rows go to the sequences with the fewest rows left,
        and the rest go by order of arrival."""
        prefilling = self.queues.prefilling
        if not prefilling and not self.queues.can_start:
            return []
        if self.is_shared and self.in_flight.has_prefill:
            return []
        decoding = sum(map(_next_rows, ready))
        rows = max(0, self._prefill_rows(prefilling, decoding))
        outputs = self.settings.max_outputs - len(ready)
        scored = scored_rows(self.settings, self.times, decoding) if self.queues.decoding else outputs
        embedded = embedded_rows(self.settings, is_beside_decode=self.queues.decoding > 0)
        batch = PrefillBatch(
            self.queues.memory,
            now_ns,
            rows_left=rows,
            room=self.settings.max_batch_tokens - decoding,
            outputs_left=outputs,
            scored_left=scored,
            embedded_left=embedded,
            image_bytes_left=self.settings.max_image_bytes,
        )
        in_order = self.settings.whole_prompts or (bool(prefilling) and prefilling[0].begins_with_group)
        kept = batch.rows_left if in_order else batch.rows_left // 2
        while batch.rows_left > kept and (shortest := self.queues.shortest(self.queues.prefilling)) is not None:
            if shortest.key in batch.slices or not batch.add(shortest, share=2):
                break
        for sequence in prefilling:
            batch.add(sequence)
        while batch.rows_left > 0 and (admitted := self.queues.admit()) is not None:
            if not batch.add(admitted):
                break
        slices = list(batch.slices.values())
        self._computed_tokens += sum(len(taken.chunk.tokens) for taken in slices)
        return slices

    def _prefill_rows(self, prefilling: list[Sequence], decoding: int) -> int:
        if self.settings.whole_prompts:
            return self.settings.max_batch_tokens
        waiting = islice(self.queues.waiting, _VISIBLE_WAITING)
        pending = sum(map(_by_remaining, prefilling)) + sum(map(_by_remaining, waiting))
        self._burst_tokens = burst = max(pending, self._burst_tokens if prefilling else 0)
        if self.is_shared:
            short = replace(self.settings, prefill_ms=self.settings.prefill_ms / _SHARED)
            return min(chunk_rows(short, self.times, burst, pending, decoding, alone=False), _SHARED_ROWS)
        return chunk_rows(self.settings, self.times, burst, pending, decoding, alone=not self.queues.decoding)

    def _launch(self, slices: tuple[SequenceSlice, ...], decoding: int, now_ns: int) -> ScheduledMicrobatch:
        if decoding == len(slices):
            self._split.launched()
        self._turns.launched(slices)
        memory = self.queues.memory
        for taken in slices[:decoding]:
            memory.filled(taken.sequence)
        memory.end_microbatch()
        return self.in_flight.send(slices, decoding, now_ns, self.queues.take_released())

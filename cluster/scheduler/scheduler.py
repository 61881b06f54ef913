"""Decides what the stages compute next: continuous batching, chunked prefill, preemption. Pure: times come in.

Blocks are given up at once when a sequence finishes, is aborted or preempted, although microbatches in flight may still
read them: stages run microbatches in number order, and whoever gets the blocks writes them in a later one.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from llamaclust.cluster.scheduler.breakers import SeenBreakers
from llamaclust.cluster.scheduler.chunking import chunk_rows
from llamaclust.cluster.scheduler.in_flight import Flight, ScheduledMicrobatch
from llamaclust.cluster.scheduler.kv_allocator import KvMemory
from llamaclust.cluster.scheduler.microbatching import DecodeSplit
from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest
from llamaclust.cluster.scheduler.sequences import Failed, Part, Sequence, Update
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.stage_times import StageTimes
from llamaclust.cluster.scheduler.validation import validate
from llamaclust.core.errors import QueueFullError
from llamaclust.wire.microbatch.messages import Result


@dataclass(frozen=True, slots=True)
class Counts:
    """A moment of the scheduler, for metrics."""

    running: int
    waiting: int
    in_flight: int
    kv_blocks: int
    kv_blocks_held: int
    preemptions: int
    retries: int  # sequences computed again because a row had no answer
    cached_tokens: int  # prompt tokens found in the prefix cache, in all
    computed_tokens: int  # prompt tokens computed, in all; those computed again after a preemption count again


_RESERVE_BLOCKS = 2
"""Left for each running sequence when another one starts: it must not be preempted again at once."""

_SEEN_AHEAD = 8
"""Waiting sequences that count as work to come."""

_by_arrival = attrgetter("key")
_by_remaining = attrgetter("remaining")


@dataclass(slots=True)
class _Chunks:
    """The chunks of prompts in one microbatch, given out one by one: each sequence gets one at most."""

    memory: KvMemory
    now_ns: int
    rows_left: int
    outputs_left: int
    parts: dict[int, Part] = field(default_factory=dict)  # by the sequence's key

    @property
    def tokens(self) -> int:
        return sum(len(part.chunk.tokens) for part in self.parts.values())

    def give(self, sequence: Sequence, most: int) -> None:
        """A chunk of up to `most` rows, as far as rows and outputs go."""
        rows = sequence.rows_within(min(most, self.rows_left), self.outputs_left)
        if rows > 0 and sequence.key not in self.parts:
            sequence.started_ns = sequence.started_ns or self.now_ns
            self.memory.reach(sequence, rows)
            part = self.parts[sequence.key] = sequence.take(rows)
            self.memory.filled(sequence)
            self.rows_left -= rows
            self.outputs_left -= len(part.tasks)


class Scheduler:
    """All running and waiting sequences of one pipeline."""

    def __init__(self, settings: SchedulerSettings, epoch: int, stages: int) -> None:
        self.settings = settings
        self.times = StageTimes(stages)
        self.memory = KvMemory(settings)
        self._split = DecodeSplit(self.times)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by arrival
        self._flight = Flight(settings.model_id, epoch, self.times)
        self._burst_tokens = 0  # prompt tokens to compute, when there were most since there were none
        self._next_key = 0
        self._preemptions = 0
        self._retries = 0
        self._cached_tokens = 0
        self._computed_tokens = 0

    @property
    def counts(self) -> Counts:
        return Counts(
            running=len(self._running),
            waiting=len(self._waiting),
            in_flight=len(self._flight),
            kv_blocks=self.memory.blocks.count,
            kv_blocks_held=self.memory.blocks.held,
            preemptions=self._preemptions,
            retries=self._retries,
            cached_tokens=self._cached_tokens,
            computed_tokens=self._computed_tokens,
        )

    @property
    def sequences(self) -> list[Sequence]:
        """All that are not finished, by arrival."""
        return list(self._sequences.values())

    def oldest_sent_ns(self) -> int | None:
        """When the microbatch that is in flight for longest was sent."""
        return self._flight.oldest_ns

    def add(self, ask: GenerationRequest, now_ns: int) -> Sequence:
        """Takes a request into the queue, unless it has no work. Raises RequestError or QueueFullError."""
        validate(ask, self.settings.request_limits)
        sequence = self._sequence(ask, now_ns)
        if sequence.has_work:
            starting = self.settings.max_sequences - len(self._running)
            if len(self._waiting) >= self.settings.max_waiting + starting:
                raise QueueFullError(f"{len(self._waiting)} requests wait already, more may not: try again later")
            self._sequences[sequence.key] = sequence
            self._waiting.append(sequence)
        return sequence

    def _sequence(self, ask: GenerationRequest, now_ns: int) -> Sequence:
        room = self.settings.max_sequence_tokens - len(ask.prompt)
        last = len(ask.prompt) - 1
        first_score = last if ask.score_from is None else min(max(ask.score_from, 1) - 1, last)
        self._next_key += 1
        return Sequence(
            key=self._next_key,
            generation=ask,
            max_new_tokens=min(ask.max_new_tokens, room),
            arrived_ns=now_ns,
            tokens=list(ask.prompt),
            breakers=SeenBreakers(ask.breakers, ask.prompt),
            mu=ask.params.chain.first_mu if ask.params.chain is not None else 0.0,
            next_score=first_score,
            scored=first_score,
        )

    def abort(self, key: int) -> Sequence | None:
        """Forgets a sequence and frees its blocks; None where it is finished already."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._drop(sequence)
        return sequence

    def restart(self, settings: SchedulerSettings, epoch: int, stages: int) -> None:
        """On another pipeline, whose stages hold nothing yet: what is in flight is forgotten, and every sequence waits
        to be computed again from its own tokens, in order of arrival."""
        self.settings = settings
        self.times = StageTimes(stages)
        self.memory = KvMemory(settings)
        self._split = DecodeSplit(self.times)
        self._flight = Flight(settings.model_id, epoch, self.times)
        self._running.clear()
        self._waiting = deque(self._sequences.values())
        for sequence in self._waiting:
            sequence.restart()

    def next_microbatch(self, now_ns: int) -> ScheduledMicrobatch | None:
        """The next unit of work; None where there is none or enough of it is in flight."""
        self.memory.begin_microbatch()
        if len(self._flight) >= self.times.in_flight + self._is_prefill_alone:
            return self._next_ahead(now_ns)
        ready = self._ready_to_decode()
        prefill = self._prefill_parts(len(ready), now_ns)
        if not prefill:
            ready = ready[: self._decode_rows(len(ready))]
        parts = (*(sequence.take_token() for sequence in ready), *prefill)
        return self._launch(parts, len(ready), now_ns) if parts else self._next_ahead(now_ns)

    @property
    def _is_prefill_alone(self) -> bool:
        """Then one more microbatch in flight keeps a stage from standing still after a chunk that was quicker than
        expected; beside decode it would make everybody wait longer for a token."""
        return not any(sequence.is_decoding for sequence in self._running)

    def complete(self, result: Result, now_ns: int) -> list[tuple[int, list[Update]]]:
        """Takes in a result without a failure; for each sequence that has news, its key and the news.

        ProtocolError where it is not the answer to the microbatch that is due.
        """
        news: list[tuple[int, list[Update]]] = []
        row = 0
        for part in self._flight.landed(result, now_ns):
            sequence, count = part.sequence, len(part.tasks)
            rows = result.rows[row : row + count]
            row += count
            sequence.in_flight -= 1
            sequence.sampling -= part.is_sampled
            if not count or sequence.is_finished or sequence.is_void:
                continue
            updates = sequence.answered(part, rows, now_ns)
            if isinstance(updates[-1], Failed) and not sequence.is_retried:
                self._retry(sequence)
                continue
            if isinstance(updates[-1], Finished | Failed):
                self._drop(sequence)
            news.append((sequence.key, updates))
        return news

    def _retry(self, sequence: Sequence) -> None:
        """A row had no answer: once more from its own tokens, in blocks that nobody else has written, in case that what
        some stage computed, or keeps, is damaged."""
        sequence.is_retried = sequence.is_void = True
        sequence.next_score = sequence.scored
        self.memory.distrust(sequence)
        if sequence in self._running:
            self._put_back(sequence)
        self._retries += 1

    # -- decode ----------------------------------------------------------------------------------------------------

    def _ready_to_decode(self) -> list[Sequence]:
        """Sequences whose last token is to be computed, oldest first, each with a block for it."""
        awaiting = [sequence for sequence in self._running if sequence.awaits_decode]
        for sequence in awaiting:
            self._grow(sequence)
        return [sequence for sequence in awaiting if sequence.is_decoding]

    def _grow(self, sequence: Sequence) -> None:
        """Gives a sequence the block it needs, at the cost of the youngest; it may be the youngest itself."""
        while sequence.is_decoding and not self.memory.grow(sequence):
            self._preempt(self._running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue: computed again from its tokens, it goes on as if nothing had happened."""
        self._put_back(sequence)
        self._preemptions += 1

    def _put_back(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.memory.release(sequence)
        self._waiting.appendleft(sequence)

    def _decode_rows(self, ready: int) -> int:
        """How many of the ready ones form a microbatch of their own now.

        While as many groups as pay are under way, the ready ones wait for a group to come back and join it.
        """
        if not ready:
            return 0
        decoding = sum(sequence.is_decoding for sequence in self._running)
        groups = self._split.groups(decoding)
        return 0 if self._flight.decoding >= groups else -(-decoding // groups)

    def _next_ahead(self, now_ns: int) -> ScheduledMicrobatch | None:
        """A decode step that follows tokens which are not known yet: the stages go on while results travel and the
        coordinator works. What a sequence that ends with such a token computes after it is thrown away.

        One step ahead, where all decode together: with several groups, stages compute one while another one's results
        travel. And only while nobody's prompt is there to be computed: that would wait behind it.
        """
        if len(self._flight) != 1 or not self.times.ahead_pays or self._has_prompts:
            return None
        if self._split.groups(sum(sequence.is_decoding for sequence in self._running)) > 1:
            return None
        ahead = [s for s in self._running if (s.awaits_decode or s.may_go_ahead) and self.memory.grow(s)]
        return self._launch(tuple(s.take_token() for s in ahead), len(ahead), now_ns) if ahead else None

    @property
    def _has_prompts(self) -> bool:
        if self._waiting and len(self._running) < self.settings.max_sequences:
            return True
        return any(not sequence.is_decoding and sequence.remaining for sequence in self._running)

    # -- prefill ---------------------------------------------------------------------------------------------------

    def _prefill_parts(self, decoding: int, now_ns: int) -> list[Part]:
        """Chunks for one microbatch: half for whoever has least left to do, the rest in order of arrival.

        So a short prompt does not wait for a long one, and the oldest never stands still.
        """
        prefilling = [sequence for sequence in self._running if not sequence.is_decoding and sequence.remaining]
        if not prefilling and (not self._waiting or len(self._running) >= self.settings.max_sequences):
            return []
        rows = self._prefill_rows(prefilling, decoding)
        chunks = _Chunks(self.memory, now_ns, rows, self.settings.max_outputs - decoding)
        shortest = self._shortest(prefilling)
        if shortest is not None:
            chunks.give(shortest, max(1, chunks.rows_left // 2))
        for sequence in prefilling:
            chunks.give(sequence, chunks.rows_left)
        while chunks.rows_left > 0 and (admitted := self._admit()) is not None:
            chunks.give(admitted, chunks.rows_left)
        self._computed_tokens += chunks.tokens
        return list(chunks.parts.values())

    def _prefill_rows(self, prefilling: list[Sequence], decoding: int) -> int:
        pending = sum(map(_by_remaining, prefilling)) + sum(map(_by_remaining, islice(self._waiting, _SEEN_AHEAD)))
        self._burst_tokens = max(pending, self._burst_tokens if prefilling else 0)
        alone = not any(sequence.is_decoding for sequence in self._running)
        return chunk_rows(self.settings, self.times, self._burst_tokens, pending, decoding, alone=alone)

    def _shortest(self, prefilling: list[Sequence]) -> Sequence | None:
        """Who has less left to do than the oldest; None where nobody has."""
        if not prefilling:
            return None
        oldest = prefilling[0]
        if self._waiting and self._waiting[0].remaining < oldest.remaining:
            admitted = self._admit()
            if admitted is not None:
                prefilling = [*prefilling, admitted]
        shortest = min(prefilling, key=_by_remaining)
        return None if shortest is oldest else shortest

    def _admit(self) -> Sequence | None:
        """Starts the first one that waits, with blocks for all of its tokens; None where it has to wait on.

        What is in flight for a preempted one is waited for: its answer may be one more token.
        """
        if not self._waiting or len(self._running) >= self.settings.max_sequences:
            return None
        sequence = self._waiting[0]
        if sequence.in_flight:
            return None
        if not self.memory.admit(sequence, _RESERVE_BLOCKS * len(self._running)):
            return None
        self._waiting.popleft()
        sequence.is_void = False
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.scheduled
            self._cached_tokens += sequence.cached_tokens
        insort(self._running, sequence, key=_by_arrival)
        return sequence

    # -- both ------------------------------------------------------------------------------------------------------

    def _launch(self, parts: tuple[Part, ...], decoding: int, now_ns: int) -> ScheduledMicrobatch:
        if decoding == len(parts):
            self._split.launched()
        for part in parts[:decoding]:
            self.memory.filled(part.sequence)
        self.memory.end_microbatch()
        return self._flight.send(parts, decoding, now_ns)

    def _drop(self, sequence: Sequence) -> None:
        sequence.is_finished = True
        del self._sequences[sequence.key]
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self.memory.release(sequence)

"""One request's state: tokens, block table, progress, times. Tokens and Mirostat's mu are enough to run it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from llamaclust.cluster.scheduler.breakers import SeenBreakers
from llamaclust.cluster.scheduler.kv_blocks import BlockTable
from llamaclust.cluster.scheduler.prefix_cache import BlockKeys
from llamaclust.cluster.scheduler.requests import (
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptEmbedded,
    PromptScored,
    Timings,
    TokenSampled,
    Update,
    rate,
)
from llamaclust.cluster.scheduler.states.sequence_states import SequenceStates
from llamaclust.core.sampling import MatcherRow, MatcherStart, RowResult, RowTask, SampleTask, ScoreTask
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Chunk

_LATELY = 16  # tokens of an answer after a forced one, in which a further one is likely


class Phase(Enum):
    """What is done with a sequence."""

    WAITING = auto()  # for KV memory and a place among those that run; results in flight still count
    DISCARDED = auto()  # waits likewise; results in flight are of a computation that is repeated
    PREFILL = auto()  # rows of known tokens are computed
    DECODE = auto()  # tokens[:-1] are computed and the last one was sampled
    FINISHED = auto()


_PREFILL, _DECODE, _DISCARDED, _FINISHED = Phase.PREFILL, Phase.DECODE, Phase.DISCARDED, Phase.FINISHED


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """Some rows of a sequence in a microbatch, and what its output rows are for."""

    sequence: Sequence
    chunk: Chunk
    tasks: tuple[RowTask, ...]

    @property
    def is_sampled(self) -> bool:
        """Whether its last row chooses a token."""
        return bool(self.tasks) and isinstance(self.tasks[-1], SampleTask)

    @property
    def is_scored(self) -> bool:
        """Whether rows of it are scored."""
        return bool(self.tasks) and isinstance(self.tasks[0], ScoreTask)

    @property
    def is_answered(self) -> bool:
        """Whether its result says something about the sequence."""
        return bool(self.tasks) or self.chunk.embedded_rows > 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens chosen so far, and how far their keys and values are computed."""

    key: int  # ascending with arrival
    request: GenerationRequest
    max_new_tokens: int  # chosen tokens at most, the context considered
    arrived_ns: int
    is_whole: bool = False  # all rows are in one microbatch
    tokens: list[int] = field(init=False)  # prompt, then answer
    breakers: SeenBreakers = field(init=False)  # for DRY
    mu: float = 0.0  # of Mirostat, for the next token
    table: BlockTable = field(default_factory=BlockTable)
    window: BlockTable = field(default_factory=BlockTable)  # of layers with a window
    states: SequenceStates = field(default_factory=SequenceStates)
    block_keys: BlockKeys = field(init=False)  # prefix cache keys of the tokens' full blocks
    registered: int = 0  # blocks of the table that the prefix cache knows
    scheduled: int = 0  # tokens whose keys and values are computed or under way
    computed: int = 0  # tokens whose keys and values are computed
    next_score: int = 0  # first prompt row that is still to be scored
    scored: int = 0  # first prompt row whose score is still to come
    next_embedded: int = 0  # first prompt row whose hidden state is still to be requested
    embedded: int = 0  # first prompt row whose hidden state is still to come
    in_flight: int = 0  # microbatches
    sampling: int = 0  # tokens that microbatches in flight will choose: 2 at most
    sampled_at: tuple[int, int] = (0, 0)  # where the last of them is, or was: microbatch and output row
    phase: Phase = Phase.WAITING
    has_matcher: bool = False  # the last stage has been sent what its matcher starts with
    last_forced: int = -_LATELY  # tokens of the answer with the last forced one
    failures: int = 0  # rows without a result since the last result
    overtaken: int = 0  # sequences that started while it was its turn and it did not fit
    cached_tokens: int | None = None  # found in the prefix cache at first admission
    started_ns: int = 0
    first_ns: int = 0  # first answer
    last_ns: int = 0

    def __post_init__(self) -> None:
        request, last = self.request, self.prompt_length - 1
        self.block_keys = BlockKeys(request.cache_salt, request.adapters)
        self.tokens, self.breakers = list(request.prompt), SeenBreakers(request.breakers, request.prompt)
        self.mu = 0.0 if request.params.chain is None else request.params.chain.first_mu
        self.scored = last if request.score_from is None else min(max(request.score_from, 1) - 1, last)
        self.next_score = self.scored
        self.next_embedded = self.embedded = 0 if request.embedded is None else request.embedded[0]
        for row in request.answered:
            self.append(row)

    @property
    def is_running(self) -> bool:
        return self.phase is _DECODE or self.phase is _PREFILL

    @property
    def is_begun(self) -> bool:
        """Whether it has run before: preempted, or computed again."""
        return self.cached_tokens is not None

    @property
    def counts_results(self) -> bool:
        """Whether results in flight belong to the computation that goes on."""
        return self.phase is not _FINISHED and self.phase is not _DISCARDED

    @property
    def lacks_matcher(self) -> bool:
        """Whether the last stage needs what its matcher starts with."""
        return self.request.needs_matcher and self.max_new_tokens > 0 and not self.has_matcher

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens to choose, at most."""
        return self.max_new_tokens - self.generated

    @property
    def target(self) -> int:
        """Rows to compute: all tokens but a last one after which nothing is chosen; or those to the last embedded."""
        if self.request.embedded is not None:
            return self.prompt_length if self.is_whole else self.request.embedded[1]
        return len(self.tokens) if self.max_new_tokens else len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        return self.target - self.scheduled

    @property
    def awaits_decode(self) -> bool:
        """Whether its last token is chosen and not yet on its way."""
        return self.phase is _DECODE and self.scheduled < len(self.tokens)

    @property
    def may_go_ahead(self) -> bool:
        """Whether the row after its last token can be sent now, before that row's token is known."""
        return (
            self.phase is _DECODE
            and self.sampling == 1
            and self.scheduled == len(self.tokens)
            and self.generated + 1 < self.max_new_tokens
            and not self.request.params.needs_state
        )

    @property
    def expects_forced(self) -> bool:
        """Whether it had forced tokens lately, and may again: a row sent ahead would only repeat them."""
        forces = self.request.needs_matcher and not self.request.with_logprobs
        return forces and self.generated - self.last_forced < _LATELY

    @property
    def _unknown(self) -> int:
        """Tokens before the one that the next row chooses that are not known yet: 1 at most."""
        return max(0, self.scheduled + 1 - len(self.tokens))

    @property
    def first_output(self) -> int:
        """Rows [first_output, target) are scored, sampled or embedded."""
        if self.request.embedded is not None:
            return self.next_embedded
        return self.next_score if self.has_scores_left else len(self.tokens) - 1

    @property
    def has_scores_left(self) -> bool:
        """Whether prompt rows are still to be scored."""
        return self.next_score < self.prompt_length - 1

    @property
    def known_end(self) -> FinishReason | None:
        """Why there is nothing to compute for it: its answer is known, or no token is to be scored or chosen."""
        if self.generated:
            return self._finish_reason(is_sampled=True)
        if self.request.embedded is not None:
            return None
        return None if self.max_new_tokens > 0 or self.has_scores_left else FinishReason.LENGTH

    @property
    def blocks_needed(self) -> int:
        """Blocks that the rows to compute take."""
        return -(-max(self.target, self.scheduled + 1) // KV_BLOCK_TOKENS)

    def rows_within(self, rows: int, outputs: int) -> int:
        """How many of the next rows fit where at most that many rows and output rows do."""
        if self.is_whole:
            embedded = 0 if self.request.embedded is None else self.request.embedded[1] - self.next_embedded
            return self.remaining if self.remaining <= rows and embedded <= outputs else 0
        before_outputs = max(0, self.first_output - self.scheduled)
        return min(rows, self.remaining, before_outputs + outputs)

    def take(self, rows: int) -> SequenceSlice:
        """The next rows of a prompt, or of tokens that are computed again, as a part of a microbatch."""
        start, end = self.scheduled, self.scheduled + rows
        if self.request.embedded is not None:
            return self._take_embedded(start, end, self.request.embedded[1])
        tasks = self._tasks(max(start, self.first_output), end)
        if tasks:
            self.next_score = max(self.next_score, min(end, self.prompt_length - 1))
        return self._slice(tuple(self.tokens[start:end]), tasks)

    def _take_embedded(self, start: int, end: int, embedded_end: int) -> SequenceSlice:
        first, stop = max(start, self.next_embedded), min(end, embedded_end)
        self.next_embedded = max(self.next_embedded, stop)
        embedded = (first - start, stop - start) if first < stop else (0, 0)
        return self._slice(tuple(self.tokens[start:end]), (), embedded=embedded)

    def take_token(self) -> SequenceSlice:
        """The last token of one that awaits decode or may go ahead, as a part of a microbatch."""
        if self._unknown:
            return self._slice((0,), (self._sample_task(),), self.sampled_at)
        return self._slice((self.tokens[-1],), (self._sample_task(),))

    def _slice(
        self,
        tokens: tuple[int, ...],
        tasks: tuple[RowTask, ...],
        follows: tuple[int, int] | None = None,
        embedded: tuple[int, int] = (0, 0),
    ) -> SequenceSlice:
        table, window, rest = self.table.runs, self.window, (embedded, self.request.adapters)
        start, states = window.start if window.blocks else 0, self.states.of_chunk(self.scheduled, len(tokens))
        chunk = Chunk(tokens, self.scheduled, table, len(tasks), follows, window.runs, start, *rest, *states)
        self.scheduled += len(tokens)
        self.in_flight += 1
        taken = SequenceSlice(self, chunk, tasks)
        self.sampling += taken.is_sampled
        return taken

    def rewind(self, cached: int) -> None:
        """Only the keys and values of tokens[:cached] are there."""
        self.scheduled = cached
        self.registered = cached // KV_BLOCK_TOKENS

    def restart(self) -> None:
        """Nothing of it is computed or under way: its tokens are there, and what was told stays told."""
        self.table, self.window, self.states = BlockTable(), BlockTable(), SequenceStates()
        self.rewind(0)
        self.in_flight = self.sampling = 0
        self.has_matcher = False
        self.phase = Phase.WAITING
        self.repeat_outputs()

    def repeat_outputs(self) -> None:
        """What is under way is computed again; what was told stays told."""
        self.next_score, self.next_embedded = self.scored, self.embedded

    def _tasks(self, start: int, end: int) -> tuple[RowTask, ...]:
        score_end = min(end, self.prompt_length - 1)
        top = self.request.top_logprobs
        scores = [ScoreTask(self.tokens[row + 1], top) for row in range(start, score_end)]
        samples = [self._sample_task()] if self.max_new_tokens and start < end == len(self.tokens) else []
        return (*scores, *samples)

    def _sample_task(self) -> SampleTask:
        """For the token after the next row."""
        request, unknown = self.request, self._unknown
        window, with_dry = request.history_window, request.looks_for_repetitions
        known = max(0, len(self.tokens) - window + unknown)
        is_early = self.generated + unknown < request.min_tokens
        return SampleTask(
            request.params,
            request.seed,
            request.choice,
            position=len(self.tokens) + unknown,
            history=tuple(self.tokens[known:]) if window else (),
            suppressed=tuple(sorted(request.stop_token_ids)) if is_early else (),
            top_logprobs=request.top_logprobs,
            history_follows=window > 0 and unknown > 0,
            penalty_window=request.penalty_window if with_dry else None,
            dry_window=request.dry_window if with_dry else None,
            breakers=self.breakers.sequences,
            mu=self.mu,
            matcher=MatcherRow(self.key, self.generated + unknown) if request.needs_matcher else None,
        )

    def start_matcher(self) -> MatcherStart | None:
        """With its first rows: so its matcher is ready when the first token is to be sampled, or soon after."""
        if not self.lacks_matcher:
            return None
        self.has_matcher = True
        request, answer = self.request, tuple(self.tokens[self.prompt_length :])
        return MatcherStart(self.key, request.grammar, answer, request.reasoning, not request.with_logprobs)

    def answered(self, taken: SequenceSlice, rows: tuple[RowResult, ...], now_ns: int) -> list[Update]:
        """Takes in the results of a part's output rows."""
        first_row, is_sampled = taken.chunk.position + len(taken.chunk.tokens) - len(rows), taken.is_sampled
        if is_sampled and rows[-1].is_deferred:
            self._repeat(taken.chunk)
            if not (rows := rows[:-1]):
                return []
            is_sampled = False
        self.first_ns = self.first_ns or now_ns
        self.last_ns = now_ns
        failure = next((row.failure for row in rows if row.failure is not None), None)
        if failure is not None:
            return [Failed(failure)]
        self.failures = 0
        updates: list[Update] = []
        if scored := rows[:-1] if is_sampled else rows:
            self.scored = first_row + len(scored)
            updates.append(PromptScored(first_row + 1, scored))
        if is_sampled:
            updates += map(TokenSampled, self._append_sampled(taken.chunk, rows[-1]))
            if self.phase is _PREFILL or self.phase is _DECODE:
                self.phase = _DECODE if self.scheduled >= len(self.tokens) - 1 else _PREFILL
        if (reason := self._finish_reason(is_sampled)) is not None:
            updates.append(Finished(reason, self.timings()))
        return updates

    def received(self, taken: SequenceSlice, data: bytes, now_ns: int) -> list[Update]:
        """Takes in the hidden states of a part's embedded rows."""
        self.first_ns = self.first_ns or now_ns
        self.last_ns = now_ns
        start, count = taken.chunk.position + taken.chunk.embedded[0], taken.chunk.embedded_rows
        if not np.isfinite(np.frombuffer(data, "<f4")).all():
            return [Failed(f"hidden states of tokens [{start}, {start + count}) are not finite numbers")]
        self.failures = 0
        self.embedded = start + count
        updates: list[Update] = [PromptEmbedded(start, count, data)]
        if self.request.embedded is not None and self.embedded == self.request.embedded[1]:
            updates.append(Finished(FinishReason.LENGTH, self.timings()))
        return updates

    def _repeat(self, chunk: Chunk) -> None:
        """The chunk's last row is computed again, beside others in decode."""
        self.scheduled = min(self.scheduled, chunk.position + len(chunk.tokens) - 1)
        self.computed = min(self.computed, self.scheduled)
        if self.phase is _PREFILL:
            self.phase = _DECODE

    def _append_sampled(self, chunk: Chunk, row: RowResult) -> list[RowResult]:
        """The sampled token and those that must follow it, as far as they are new: a row that was sent before the
        tokens forced by its predecessor were known repeats these."""
        known = len(self.tokens) - chunk.position - len(chunk.tokens)
        added: list[RowResult] = []
        for following in (row, *(RowResult(token, 0.0) for token in row.forced))[known:]:
            self.append(following)
            added.append(following)
            self.last_forced = self.generated if following is not row else self.last_forced
            if self._finish_reason(is_sampled=True) is not None:
                break
        return added

    def append(self, row: RowResult) -> None:
        """The next token of the answer."""
        self.tokens.append(row.token)
        self.breakers.add(row.token)
        self.mu = self.mu if row.mu is None else row.mu

    def _finish_reason(self, is_sampled: bool) -> FinishReason | None:
        if not is_sampled:
            is_scored = not self.has_scores_left and self.in_flight == 0
            return FinishReason.LENGTH if self.max_new_tokens == 0 and is_scored else None
        if self.tokens[-1] in self.request.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.generated >= self.max_new_tokens else None

    def timings(self) -> Timings:
        """In milliseconds from arrival, as far as it came."""
        started = self.started_ns or self.arrived_ns
        first = self.first_ns or started
        return Timings(
            queue_ms=(started - self.arrived_ns) / 1e6,
            ttft_ms=(first - self.arrived_ns) / 1e6,
            prefill_tok_s=rate(self.prompt_length - (self.cached_tokens or 0), first - started),
            decode_tok_s=rate(self.generated - 1, self.last_ns - first),
            prompt_tokens=self.prompt_length,
            cached_tokens=self.cached_tokens or 0,
            generated_tokens=self.generated,
        )

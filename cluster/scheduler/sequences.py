"""One request's state: tokens, block table, progress, times. Tokens and Mirostat's mu are enough to run it again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

import numpy as np

from llamaclust.cluster.scheduler.breakers import SeenBreakers
from llamaclust.cluster.scheduler.kv.blocks import BlockTable
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys
from llamaclust.cluster.scheduler.kv.sequence_states import SequenceStates
from llamaclust.cluster.scheduler.matcher_use import MatcherUse
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
from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.speculation.drafts import SequenceDrafts
from llamaclust.cluster.scheduler.speculation.mtp_use import MtpUse
from llamaclust.core.sampling import RowResult
from llamaclust.model.program import KV_BLOCK_TOKENS

_LATELY = 16  # tokens of an answer after a forced one, in which a further one is likely


class Phase(Enum):
    """What is done with a sequence."""

    WAITING = auto()  # for KV memory and a place among those that run; results in flight still count
    DISCARDED = auto()  # waits likewise; results in flight are of a computation that is repeated
    PREFILL = auto()  # rows of known tokens are computed
    DECODE = auto()  # tokens[:-1] are computed and the last one was sampled
    FINISHED = auto()


_PREFILL, _DECODE, _DISCARDED, _FINISHED = Phase.PREFILL, Phase.DECODE, Phase.DISCARDED, Phase.FINISHED


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens chosen so far, and how far their keys and values are computed."""

    key: int  # ascending with arrival
    request: GenerationRequest
    max_new_tokens: int  # chosen tokens at most, the context considered
    arrived_ns: int
    is_whole: bool = False  # all rows are in one microbatch
    has_mtp: bool = False  # the last stage has an MTP head
    tokens: list[int] = field(init=False)  # prompt, then answer
    breakers: SeenBreakers = field(init=False)  # for DRY
    stop_ids: tuple[int, ...] = field(init=False)  # ascending
    samples_plainly: bool = field(init=False)  # its samplers look at logits alone, and it has no matcher
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
    drafts: SequenceDrafts | None = None  # what may follow its tokens
    forced_draft: tuple[int, ...] = ()  # tokens that must follow the last one, by its grammar
    drafted: tuple[int, ...] = ()  # tokens to compute with its last one, which they may follow
    mtp: MtpUse = field(default_factory=MtpUse)
    ahead: tuple[int, ...] = ()  # drafted tokens under way, behind the known ones
    branch: int = 0  # how many times rows under way were given up
    drafted_rows: int = 0  # in all
    accepted_rows: int = 0  # of these, whose tokens were chosen
    in_flight: int = 0  # microbatches
    sampling: int = 0  # tokens that microbatches in flight will choose
    sampled_at: tuple[int, int] = (0, 0)  # where the last of them is, or was: microbatch and output row
    phase: Phase = Phase.WAITING
    matcher: MatcherUse = field(default_factory=MatcherUse)
    last_forced: int = -_LATELY  # tokens of the answer with the last forced one
    failures: int = 0  # rows without a result since the last result
    is_checked: bool = False  # after a failure, stages say where it comes from
    overtaken: int = 0  # sequences that started while it was its turn and it did not fit
    cached_tokens: int | None = None  # found in the prefix cache at first admission
    started_ns: int = 0
    first_ns: int = 0  # first answer
    last_ns: int = 0

    def __post_init__(self) -> None:
        request, last = self.request, self.prompt_length - 1
        self.block_keys = BlockKeys(request.cache_salt)
        self.tokens, self.breakers = list(request.prompt), SeenBreakers(request.breakers, request.prompt)
        self.stop_ids = tuple(sorted(request.stop_token_ids))
        uses_tokens = request.params.needs_history or request.params.chain is not None or request.breakers
        self.samples_plainly = not (uses_tokens or request.needs_matcher)
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
        return self.request.needs_matcher and self.max_new_tokens > 0 and not self.matcher.is_started

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
    def next_rows(self) -> int:
        """In decode, without drafted ones; several behind a state that refused rows did not change."""
        return max(1, self.remaining)

    @property
    def awaits_decode(self) -> bool:
        """Whether its last token is chosen and not yet on its way."""
        return self.phase is _DECODE and self.scheduled < len(self.tokens)

    def may_go_ahead(self, most: int) -> bool:
        """Whether the row after its last token can be sent now, before that row's token is known, and after `most`
        unknown tokens at most; after several only where samplers look at logits alone."""
        most = 0 if self.matcher.is_slow else most if self.samples_plainly else 1
        if not 0 < self.sampling <= most or self.request.params.needs_state:
            return False
        is_next = self.phase is _DECODE and not self.ahead and self.scheduled == len(self.tokens) + self.sampling - 1
        return is_next and self.generated + self.sampling < self.max_new_tokens

    @property
    def may_draft(self) -> bool:
        """Whether drafted rows may be computed with its last token's: each row's sampling follows from tokens alone."""
        request = self.request
        is_open = self.phase is _DECODE and self.left > 1 and request.max_drafted != 0
        is_early = request.needs_matcher and self.generated < request.min_tokens
        return is_open and not is_early and not request.params.needs_state

    @property
    def may_draft_further(self) -> bool:
        """Whether drafted rows may be sent behind those that are under way: these need no history."""
        return self.samples_alone and bool(self.ahead) and self.may_draft and self.left > len(self.ahead) + 1

    @property
    def samples_alone(self) -> bool:
        """Whether a token is chosen from its row alone, without the tokens before it."""
        return not (self.request.history_window or self.request.needs_matcher)

    @property
    def expects_forced(self) -> bool:
        """Whether it had forced tokens lately, and may again: a row sent ahead would be one of them alone."""
        return self.request.needs_matcher and self.generated - self.last_forced < _LATELY

    @property
    def unknown(self) -> int:
        """Tokens before the one that the next row chooses that are not known yet."""
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
            return self.finish_reason(is_sampled=True)
        if self.request.embedded is not None:
            return None
        return None if self.max_new_tokens > 0 or self.has_scores_left else FinishReason.LENGTH

    @property
    def blocks_needed(self) -> int:
        """Blocks that the rows to compute take."""
        return -(-(max(self.target, self.scheduled + 1) + len(self.drafted)) // KV_BLOCK_TOKENS)

    @property
    def settled(self) -> int:
        """The first row that may still be computed, for the first time or again: drafted rows under way may be refused,
        and behind a state the known ones with them are computed again then."""
        if self.ahead and self.states.is_begun:
            return self.computed
        return self.scheduled - len(self.ahead)

    def rows_within(self, rows: int, outputs: int) -> int:
        """How many of the next rows fit where at most that many rows and output rows do."""
        if self.is_whole:
            embedded = 0 if self.request.embedded is None else self.request.embedded[1] - self.next_embedded
            return self.remaining if self.remaining <= rows and embedded <= outputs else 0
        before_outputs = max(0, self.first_output - self.scheduled)
        return min(rows, self.remaining, before_outputs + outputs)

    def give_up_ahead(self) -> None:
        """Drafted rows under way do not count: they are behind another token, or computed again."""
        self.branch += 1
        self.ahead = ()

    def rewind(self, cached: int) -> None:
        """Only the keys and values of tokens[:cached] are there."""
        self.scheduled, self.drafted = cached, ()
        self.give_up_ahead()
        self.registered = cached // KV_BLOCK_TOKENS

    def restart(self) -> None:
        """Nothing of it is computed or under way: its tokens are there, and updates are not repeated."""
        self.table, self.window, self.states = BlockTable(), BlockTable(), SequenceStates()
        self.rewind(0)
        self.in_flight = self.sampling = 0
        self.mtp = MtpUse()
        self.matcher.restart()
        self.phase = Phase.WAITING
        self.repeat_outputs()

    def repeat_outputs(self) -> None:
        """What is under way is computed again; updates are not repeated."""
        self.next_score, self.next_embedded = self.scored, self.embedded

    def answered(self, taken: SequenceSlice, rows: tuple[RowResult, ...], now_ns: int) -> list[Update]:
        """Takes in the results of a part's output rows."""
        scored, sampled = rows[: len(rows) - taken.sampled], rows[len(rows) - taken.sampled :]
        first_row = taken.end - len(rows)
        if sampled and sampled[0].is_deferred:
            self._repeat(taken.end - len(sampled))
            sampled = ()
            if not scored:
                return []
        self.mtp.is_awaited = False
        self.first_ns = self.first_ns or now_ns
        self.last_ns = now_ns
        failed = next((row for row in (*scored, *sampled[:1]) if row.failure is not None), None)
        if failed is not None and failed.failure is not None:
            self._settle(taken, taken.end - len(sampled), [])
            return [Failed(failed.failure, failed.is_request_fault)]
        self.failures = 0
        updates: list[Update] = []
        if scored:
            self.scored = first_row + len(scored)
            updates.append(PromptScored(first_row + 1, scored))
        if sampled:
            rows = tuple(replace(row, drafted=()) if row.drafted else row for row in sampled)
            updates += map(TokenSampled, self._take_sampled(taken, rows))
            self._take_suggested(taken.end - len(sampled), sampled)
        if (reason := self.finish_reason(bool(sampled))) is not None:
            updates.append(Finished(reason, self.timings()))
        return updates

    def _take_suggested(self, place: int, rows: tuple[RowResult, ...]) -> None:
        """What a head drafted behind the last token. `place`: of the first row's own token."""
        for end, row in enumerate(rows, place + 2):
            if row.drafted and end == len(self.tokens) and self.drafts is not None and not self.forced_draft:
                self.drafts.suggest(self.tokens, row.drafted)

    def _take_sampled(self, taken: SequenceSlice, rows: tuple[RowResult, ...]) -> list[RowResult]:
        """The tokens that sampled rows add. A drafted row counts where its token is the one that is known by then."""
        place = taken.end - len(rows)  # of the row's own token
        added = self._append_sampled(place, rows[0])
        for row, token in zip(rows[1:], taken.chunk.tokens[len(taken.chunk.tokens) - len(rows) + 1 :], strict=True):
            is_over = self.finish_reason(is_sampled=True) is not None or row.is_deferred or row.failure is not None
            if is_over or place + 1 >= len(self.tokens) or self.tokens[place + 1] != token:
                break
            place += 1
            added += self._append_sampled(place, row)
        self._settle(taken, place + 1, [row.token for row in added])
        if self.phase is _PREFILL or self.phase is _DECODE:
            is_forced = bool(added) and all(row is not added[-1] for row in rows)
            is_refused = taken.drafted and self.states.is_begun and not is_forced
            self.phase = _PREFILL if self.scheduled < len(self.tokens) - 1 and not is_refused else _DECODE
        return added

    def _settle(self, taken: SequenceSlice, end: int, added: list[int]) -> None:
        """Of a window of drafted rows, those up to `end` count, and added tokens. Where a state goes with rows, all of
        them or none. Further windows go on where these tokens are what they are behind."""
        if not taken.drafted:
            return
        self.accepted_rows += max(0, taken.drafted - (taken.end - end))
        expected, self.ahead = self.ahead[: len(added)], self.ahead[len(added) :]
        if end == taken.end and list(expected) == added[: len(expected)]:
            return
        if end < taken.end or self.scheduled > taken.end:
            self.scheduled = min(self.scheduled, taken.chunk.position if self.states.is_begun else end)
            self.computed = min(self.computed, self.scheduled)
        self.give_up_ahead()

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

    def _repeat(self, row: int) -> None:
        """The row at this position is computed again, beside others in decode."""
        self.scheduled = min(self.scheduled, row)
        self.give_up_ahead()
        self.computed = min(self.computed, self.scheduled)
        if self.phase is _PREFILL:
            self.phase = _DECODE

    def _append_sampled(self, place: int, row: RowResult) -> list[RowResult]:
        """The token that the row at this position chose and those that must follow it, as far as they are new: a row
        that was sent before the tokens forced by its predecessor were known repeats these."""
        known = len(self.tokens) - place - 1
        added: list[RowResult] = []
        for following in (row, *(RowResult(token, 0.0) for token in row.forced))[known:]:
            self.append(following)
            added.append(following)
            if following is not row or row.forced_draft:
                self.last_forced = self.generated + len(row.forced_draft)
            if self.finish_reason(is_sampled=True) is not None:
                break
        return added

    def append(self, row: RowResult) -> None:
        """The next token of the answer."""
        self.tokens.append(row.token)
        self.breakers.add(row.token)
        self.forced_draft = row.forced_draft
        self.mu = self.mu if row.mu is None else row.mu

    def finish_reason(self, is_sampled: bool) -> FinishReason | None:
        """Why it ends now; None where it goes on."""
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
            drafted_tokens=self.drafted_rows,
            accepted_tokens=self.accepted_rows,
        )

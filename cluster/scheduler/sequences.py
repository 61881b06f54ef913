"""A sequence is one request on a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys
from llamaclust.cluster.scheduler.kv.sequence_kv import SequenceKv
from llamaclust.cluster.scheduler.matcher_use import MatcherUse
from llamaclust.cluster.scheduler.requests import FinishReason, GenerationRequest, Timings
from llamaclust.cluster.scheduler.rows.images import SequenceImages
from llamaclust.cluster.scheduler.rows.prompt_outputs import PromptOutputs
from llamaclust.cluster.scheduler.rows.sampling_state import SamplingState
from llamaclust.cluster.scheduler.speculation.sequence_drafting import Drafting
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.program import KV_BLOCK_TOKENS


class Phase(Enum):
    WAITING = auto()  # Waits for KV memory and a place to run. Results in flight still count.
    DISCARDED = auto()  # Waits, and ignores results in flight, because their rows are computed again.
    PREFILL = auto()
    DECODE = auto()  # tokens[:-1] are computed, and tokens[-1] was sampled.
    FINISHED = auto()


_PREFILL, _DECODE, _DISCARDED, _FINISHED = Phase.PREFILL, Phase.DECODE, Phase.DISCARDED, Phase.FINISHED


@dataclass(slots=True, eq=False)
class Sequence:
    key: int  # Number in order of arrival.
    request: GenerationRequest
    max_new_tokens: int  # Maximum number of answer tokens, also limited by the context length.
    usage: Usage
    is_whole: bool = False  # True if all rows must be in one microbatch.
    tokens: list[int] = field(init=False)  # Tokens of the prompt, then of the answer.
    sampler: SamplingState = field(init=False)
    kv: SequenceKv = field(init=False)
    outputs: PromptOutputs = field(init=False)
    images: SequenceImages | None = field(init=False)
    drafting: Drafting = field(default_factory=Drafting)
    matcher: MatcherUse = field(default_factory=MatcherUse)
    scheduled: int = 0  # Number of tokens whose keys and values are computed or in flight.
    computed: int = 0  # Number of tokens whose keys and values are computed.
    in_flight: int = 0  # Number of this sequence's microbatches in flight.
    sampling: int = 0  # Number of tokens that microbatches in flight will choose.
    sampled_at: tuple[int, int] = (0, 0)  # Microbatch and output row of the newest token, known or not.
    phase: Phase = Phase.WAITING
    failures: int = 0  # Number of rows without a result since the last result.
    is_checked: bool = False  # True if stages must report where a further failure comes from.
    overtaken: int = 0  # Number of sequences that overtook this one when it was next in turn but did not fit.

    def __post_init__(self) -> None:
        request, end = self.request, self.prompt_length - 1
        first = end if request.score_from is None else min(max(request.score_from, 1) - 1, end)
        if request.embedded is not None:
            first, end = request.embedded
        self.outputs = PromptOutputs(first, end, first)
        self.kv = SequenceKv(BlockKeys(request.cache_salt, images=request.images))
        self.images = SequenceImages(request.images) if request.images else None
        self.tokens, self.sampler = list(request.prompt), SamplingState(request)
        for row in request.answered:
            self.append(row)

    @property
    def is_running(self) -> bool:
        return self.phase is _DECODE or self.phase is _PREFILL

    @property
    def is_begun(self) -> bool:
        """True once the sequence has started for the first time, even if it waits again."""
        return self.usage.cached_tokens is not None

    @property
    def counts_results(self) -> bool:
        return self.phase is not _FINISHED and self.phase is not _DISCARDED

    @property
    def lacks_matcher(self) -> bool:
        return self.request.needs_matcher and self.max_new_tokens > 0 and not self.matcher.is_started

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        return self.max_new_tokens - self.generated

    @property
    def target(self) -> int:
        """Number of rows to compute. The last token needs no row if no token is sampled after it."""
        if self.request.embedded is not None:
            return self.prompt_length if self.is_whole else self.outputs.end
        return len(self.tokens) if self.max_new_tokens else len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        return self.target - self.scheduled

    @property
    def next_rows(self) -> int:
        """Number of rows with known tokens in the next decode step. It can exceed 1 after states were reset."""
        return max(1, self.remaining)

    @property
    def awaits_decode(self) -> bool:
        return self.phase is _DECODE and self.scheduled < len(self.tokens)

    def has_prompt_of(self, request: GenerationRequest) -> bool:
        """True if the request is another choice of the same API request, so that both can share KV blocks."""
        own = self.request
        is_same = own.prompt is request.prompt and own.images is request.images
        return is_same and (own.cache_salt, own.adapters) == (request.cache_salt, request.adapters)

    def may_go_ahead(self, most: int) -> bool:
        """True if the next row can be sent before its token is known. At most `most` tokens may be unknown then."""
        most = 0 if self.matcher.is_slow else most if self.sampler.is_plain else 1
        if not 0 < self.sampling <= most or self.request.params.needs_state:
            return False
        is_next = self.phase is _DECODE and self.scheduled == len(self.tokens) + self.sampling - 1
        return is_next and not self.drafting.ahead and self.generated + self.sampling < self.max_new_tokens

    @property
    def may_draft(self) -> bool:
        """True if drafted tokens may be computed in the same step as the last token. Mirostat excludes drafts, because
        each sampled token changes its `mu`."""
        request = self.request
        is_open = self.phase is _DECODE and self.left > 1 and request.max_drafted != 0
        is_early = request.needs_matcher and self.generated < request.min_tokens
        return is_open and not is_early and not request.params.needs_state

    @property
    def may_draft_further(self) -> bool:
        """True if more drafted tokens may be sent before those in flight are verified."""
        ahead = self.drafting.ahead
        return self.samples_alone and bool(ahead) and self.may_draft and self.left > len(ahead) + 1

    @property
    def samples_alone(self) -> bool:
        return not (self.sampler.window or self.request.needs_matcher)

    @property
    def expects_forced(self) -> bool:
        """True if the grammar forced a token recently. The next token may be forced too."""
        return self.request.needs_matcher and self.drafting.expects_forced(self.generated)

    @property
    def unknown_tokens(self) -> int:
        return max(0, self.scheduled + 1 - len(self.tokens))

    @property
    def first_output(self) -> int:
        has_outputs = self.request.embedded is not None or self.has_scores_left
        return self.outputs.next if has_outputs else len(self.tokens) - 1

    @property
    def has_scores_left(self) -> bool:
        return self.request.embedded is None and self.outputs.next < self.outputs.end

    @property
    def known_end(self) -> FinishReason | None:
        if self.generated:
            return self.finish_reason(is_sampled=True)
        if self.request.embedded is not None:
            return None
        return None if self.max_new_tokens > 0 or self.has_scores_left else FinishReason.LENGTH

    @property
    def blocks_needed(self) -> int:
        return -(-(max(self.target, self.scheduled + 1) + len(self.drafting.next)) // KV_BLOCK_TOKENS)

    @property
    def first_unverified(self) -> int:
        """The first position that must be computed again if the drafts in flight are rejected."""
        ahead = self.drafting.ahead
        return self.computed if ahead and self.kv.states.is_begun else self.scheduled - len(ahead)

    @property
    def begins_with_group(self) -> bool:
        return self.images is not None and self.images.begins_with_group(self.scheduled)

    def rows_within(self, rows: int, outputs: int) -> int:
        if self.is_whole:
            embedded = 0 if self.request.embedded is None else self.outputs.end - self.outputs.next
            return self.remaining if self.remaining <= rows and embedded <= outputs else 0
        before_outputs = max(0, self.first_output - self.scheduled)
        return min(rows, self.remaining, before_outputs + outputs)

    def rewind(self, cached: int) -> None:
        """Records that keys and values are stored for tokens[:cached] only."""
        self.scheduled, self.drafting.next = cached, ()
        self.drafting.give_up()
        self.kv.registered = cached // KV_BLOCK_TOKENS

    def go_back(self, position: int) -> None:
        self.scheduled = min(self.scheduled, position)
        self.computed = min(self.computed, self.scheduled)

    def restart(self) -> None:
        """Drops all computed rows and all rows in flight. Keeps the tokens. Does not repeat updates that were sent."""
        self.scheduled = self.in_flight = self.sampling = 0
        self.kv.restart()
        self.drafting.restart()
        self.matcher.restart()
        self.outputs.repeat()
        self.phase = Phase.WAITING

    def append(self, row: RowResult) -> None:
        self.tokens.append(row.token)
        self.sampler.add(row)
        self.drafting.forced = row.forced_draft

    def finish_reason(self, is_sampled: bool) -> FinishReason | None:
        if not is_sampled:
            is_scored = not self.has_scores_left and self.in_flight == 0
            return FinishReason.LENGTH if self.max_new_tokens == 0 and is_scored else None
        if self.tokens[-1] in self.request.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.generated >= self.max_new_tokens else None

    def timings(self) -> Timings:
        drafting = self.drafting
        restored = len(self.request.answered)
        return self.usage.timings(self.prompt_length, self.generated, drafting.rows, drafting.accepted, restored)

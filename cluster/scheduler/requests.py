"""Requests and events of the engine, with token ids. Text, stop strings and HTTP belong to the engine's callers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampler.matchers import Grammar, Reasoning
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult


class FinishReason(StrEnum):
    # The last token is an end-of-generation token or a stop token, or the text contains a stop string.
    STOP = "stop"
    LENGTH = "length"  # The maximum number of tokens is reached, or the context is full.
    ABORT = "abort"


class Operation(StrEnum):
    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"
    EMBEDDINGS = "embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    top_logprobs: int = 0
    # Index of the first prompt token that gets a logprob, though token 0 never gets one. None: no prompt token does.
    score_from: int | None = None
    cache_salt: str = ""  # KV blocks are shared only between requests with the same salt and adapters.
    adapters: AdapterScales = ()
    grammar: Grammar | None = None
    # Set if reasoning has a token limit, or if the grammar begins after the reasoning.
    reasoning: Reasoning | None = None
    # False: tokens that a grammar forces get logprob 0, because they are not computed one by one.
    with_logprobs: bool = False
    # Maximum number of drafted tokens in a step. None: the scheduler's limit.
    max_drafted: int | None = None
    operation: Operation = field(default=Operation.TEXT_COMPLETION, compare=False)
    # Time when the client's request arrived. 0: the time of submission.
    received_ns: int = field(default=0, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(AnswerOptions)}


@dataclass(frozen=True, slots=True)
class GenerationRequest(AnswerOptions):
    request_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int  # 0: only score or embed the prompt.
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    choice: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    late_token_ids: frozenset[int] = frozenset()  # Tokens that do not end the answer. `min_tokens` delays them too.
    min_tokens: int = 0  # Stop tokens are suppressed until this many tokens are generated.
    penalty_window: int = 64  # Number of preceding tokens (prompt and answer) that penalties count.
    dry_window: int = 0  # Number of preceding tokens that DRY searches.
    # DRY sequence breakers, by first token.
    breakers: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    # Prompt tokens [first, end) whose hidden states are returned. If set, no token is sampled.
    embedded: tuple[int, int] | None = None
    images: tuple[ImageSpan, ...] = ()  # Spans in ascending order of position.
    # Equal for all prompts and choices of one API request. Empty: the request is its own group.
    group: str = ""
    owner: str = field(default="", compare=False)  # Client that sent the request. Owners take turns.
    # First tokens of the answer, known from an earlier run. Not used with Mirostat.
    answered: tuple[RowResult, ...] = ()

    @property
    def delayed_ids(self) -> tuple[int, ...]:
        """The tokens that are suppressed until `min_tokens` tokens are generated, in ascending order."""
        return tuple(sorted(self.stop_token_ids | self.late_token_ids))

    @property
    def needs_matcher(self) -> bool:
        return self.grammar is not None or self.reasoning is not None

    @property
    def needs_place(self) -> bool:
        """True if the request certainly needs computation, and therefore a place in the queue."""
        return self.embedded is not None or bool(self.max_new_tokens and not self.answered)

    @property
    def looks_for_repetitions(self) -> bool:
        return self.params.chain is not None and self.params.chain.needs_history

    @property
    def history_window(self) -> int:
        penalties = self.penalty_window if self.params.needs_history else 0
        return max(penalties, self.dry_window) if self.looks_for_repetitions else penalties


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Logprobs of the prompt tokens [start, start + len(rows)). rows[i].token is the token at position start + i."""

    start: int
    rows: tuple[RowResult, ...]


@dataclass(frozen=True, slots=True)
class PromptEmbedded:
    """Normed hidden states of the prompt tokens [start, start + count): little-endian float32 [count, embedding]."""

    start: int
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class TokenSampled:
    row: RowResult


@dataclass(frozen=True, slots=True)
class Timings:
    """Times and token counts of a request. `queue_ms` and `ttft_ms` are measured from the request's arrival."""

    queue_ms: float
    ttft_ms: float
    prefill_tok_s: float
    decode_tok_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int = 0  # Number of drafted tokens that were computed.
    accepted_tokens: int = 0  # Number of drafted tokens that were accepted.


def rate(tokens: int, ns: int) -> float:
    return tokens / ns * 1e9 if tokens > 0 and ns > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PromptProgress:
    total: int
    cached: int  # Number of prompt tokens found in the prefix cache.
    processed: int  # Number of prompt tokens that are computed or cached.
    since_ms: float  # Milliseconds from the start of the computation to the first result, or until now.


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that finished or was aborted. A failed request ends with an exception instead."""

    reason: FinishReason
    timings: Timings


Event = PromptScored | PromptEmbedded | TokenSampled | Finished


@dataclass(frozen=True, slots=True)
class Failed:
    """The last update of a request that failed because one of its rows has no result. Other requests continue."""

    message: str
    is_request_fault: bool = False
    """True if the request caused the failure, so that it would fail again."""


Update = Event | Failed

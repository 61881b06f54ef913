"""The engine's requests and events, in token ids. The engine's callers own text, stop strings and HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampling import Grammar, Reasoning, RowResult, SamplingParams


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-generation or stop token (it is the last event's token), or the caller's stop string
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the caller cancelled it


class Operation(StrEnum):
    """The purpose of a request. The values are OpenTelemetry's operation names."""

    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"
    EMBEDDINGS = "embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    top_logprobs: int = 0
    score_from: int | None = None  # prompt tokens [max(score_from, 1), end) get logprobs; None: none are scored
    cache_salt: str = ""  # KV blocks are shared with requests that have the same, and the same adapters
    adapters: AdapterScales = ()
    grammar: Grammar | None = None  # the answer obeys it
    reasoning: Reasoning | None = None  # set if reasoning has a budget, or delays the grammar
    with_logprobs: bool = False  # False: forced tokens are not computed one by one, and have logprob 0
    max_drafted: int | None = None  # tokens computed in advance with each one, at most; None: as the scheduler may
    operation: Operation = field(default=Operation.TEXT_COMPLETION, compare=False)
    received_ns: int = field(default=0, compare=False)  # time of the client's request; 0: the time of submission

    @property
    def options(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(AnswerOptions)}


@dataclass(frozen=True, slots=True)
class GenerationRequest(AnswerOptions):
    request_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int  # 0: score or embed the prompt only
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    choice: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0  # stop tokens are suppressed until that many are generated
    penalty_window: int = 64  # tokens (prompt and answer) before the one to be chosen that penalties count
    dry_window: int = 0  # tokens before the one to be chosen that DRY looks at
    breakers: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # for DRY, by first token
    embedded: tuple[int, int] | None = None  # hidden states of prompt tokens [first, end) are wanted, none is sampled
    images: tuple[ImageSpan, ...] = ()  # ascending
    group: str = ""  # the same for requests that came as one; empty: a group of its own
    owner: str = field(default="", compare=False)  # whom the request belongs to: owners take turns
    answered: tuple[RowResult, ...] = ()  # the answer's first tokens, known from an earlier run; without Mirostat

    @property
    def needs_matcher(self) -> bool:
        return self.grammar is not None or self.reasoning is not None

    @property
    def needs_place(self) -> bool:
        """False if the request may need no computation."""
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
    """Logprobs of the prompt tokens [start, start + len(rows)). rows[i].token is the prompt's token at start + i."""

    start: int
    rows: tuple[RowResult, ...]


@dataclass(frozen=True, slots=True)
class PromptEmbedded:
    """Normed hidden states of the prompt tokens [start, start + count), as little-endian float32 [count, embedding]."""

    start: int
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class TokenSampled:
    row: RowResult


@dataclass(frozen=True, slots=True)
class Timings:
    """One request's times and token counts. `queue_ms` and `ttft_ms` begin when the request arrives."""

    queue_ms: float
    ttft_ms: float
    prefill_tok_s: float
    decode_tok_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int = 0  # drafted tokens that were computed
    accepted_tokens: int = 0  # drafted tokens that are in the answer


def rate(tokens: int, ns: int) -> float:
    return tokens / ns * 1e9 if tokens > 0 and ns > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PromptProgress:
    total: int
    cached: int  # found in the prefix cache
    processed: int  # tokens computed or cached
    since_ms: float  # time since the request's start


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that finished or was aborted. A failed request ends with an exception instead."""

    reason: FinishReason
    timings: Timings


Event = PromptScored | PromptEmbedded | TokenSampled | Finished


@dataclass(frozen=True, slots=True)
class Failed:
    """The last update of a request that failed, because one of its own rows has no result. Other requests continue."""

    message: str
    is_request_fault: bool = False
    """True if the request itself is the cause, so that it would fail again."""


Update = Event | Failed

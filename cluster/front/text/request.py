"""A completion request as text, and the bounds of the fields that only text has."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from llamaclust.cluster.front.text.chat_format import AnswerReading
from llamaclust.cluster.scheduler.breakers import DEFAULT_BREAKERS, MAX_BREAKER_BYTES, MAX_BREAKERS
from llamaclust.cluster.scheduler.requests import Operation
from llamaclust.cluster.scheduler.validation import MAX_CHOICES, check_count, check_integer, shown
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampling import Grammar, Reasoning, RowResult, SamplingParams
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKENS = 1024
MAX_SALT_CHARACTERS = 256
SEEDS = 1 << 64

_DRAWN_SEED_BITS = 53
"""A drawn seed survives JSON readers that know only doubles."""

Answered = Mapping[int, tuple[RowResult, ...]]
"""First tokens of a request's choices."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A prompt and how to complete it. Texts are tokenized as the model file says."""

    prompt: str | tuple[int, ...]
    max_new_tokens: int | None = None  # None: until the context is full; 0: the prompt is computed, nothing generated
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None  # -2**63 .. 2**64 - 1, negative ones as two's complement; None: drawn at random
    stop: tuple[str, ...] = ()  # the answer ends before the first of them
    stop_token_ids: frozenset[int] = frozenset()  # beside the model's own end-of-generation tokens
    min_tokens: int = 0  # nothing stops the answer before
    ignore_eos: bool = False  # end-of-generation tokens are never sampled
    n: int = 1
    top_logprobs: int = 0
    score_from: int | None = None  # prompt tokens [max(score_from, 1), end) get logprobs; None: none
    penalty_window: int | None = None  # last tokens that penalties count; None: all
    penalize_nl: bool = True  # penalties count line breaks too
    dry_window: int | None = None  # last tokens in which DRY looks for repetitions; None: all
    dry_breakers: tuple[str, ...] = DEFAULT_BREAKERS  # repetitions do not extend beyond these
    add_special: bool = True  # BOS (and EOS) where the model wants them
    parse_special: bool = True  # control words in a prompt's text become their tokens
    request_id: str | None = None  # None: drawn at random
    cache_salt: str = ""  # KV blocks are shared with requests that have the same, and the same adapters
    adapters: AdapterScales = ()
    group: str = ""  # of prompts that came as one request
    grammar: Grammar | None = None  # which each answer obeys
    reasoning: Reasoning | None = None  # of each answer, where it has a budget or delays the grammar
    with_logprobs: bool = False  # of each token; else those that must follow have logprob 0
    max_drafted: int | None = None  # tokens drafted in a step, at most; None: as the scheduler may
    reading: AnswerReading | None = None  # of a chat's answer
    operation: Operation = field(default=Operation.TEXT_COMPLETION, compare=False)
    answered: Answered = field(default_factory=dict)  # first tokens of choices, known from an earlier run
    slot: int | None = None  # that remembers its tokens, where slots are kept
    received_ns: int = field(default=0, compare=False)  # when the client's request came; 0: as it is submitted

    def identified(
        self, request_id: str, group: str, seed: int, answered: Answered, *, received_ns: int = 0
    ) -> CompletionRequest:
        """The same one under a name of its own, with a seed."""
        return replace(self, request_id=request_id, group=group, seed=seed, answered=answered, received_ns=received_ns)

    def check_text(self) -> None:
        """Raises ParameterError for a field that tokens no longer show; `validate` checks the others."""
        if self.max_new_tokens is not None:
            check_integer("max_tokens", self.max_new_tokens, 0, MAX_CONTEXT_TOKENS)
            check_integer("min_tokens", self.min_tokens, 0, MAX_CONTEXT_TOKENS)
            if self.min_tokens > self.max_new_tokens:
                reason = f"{self.min_tokens} is more than max_tokens, which is {self.max_new_tokens}"
                raise ParameterError("min_tokens", reason)
        check_integer("n", self.n, 1, MAX_CHOICES)
        if self.seed is not None:
            check_integer("seed", self.seed, -SEEDS // 2, SEEDS - 1)
        if self.ignore_eos and self.stop_token_ids:
            raise ParameterError("stop_token_ids", "cannot be used together with ignore_eos")
        check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKENS, "token ids")
        _check_stop(self.stop)
        _check_breakers(self.dry_breakers)


def draw_seed() -> int:
    """For a request that has none."""
    return secrets.randbits(_DRAWN_SEED_BITS)


def _check_stop(stop: Sequence[str]) -> None:
    check_count("stop", len(stop), MAX_STOP_STRINGS, "stop strings")
    for text in stop:
        if not text:
            raise ParameterError("stop", "a stop string must not be empty")
        if len(text) > MAX_STOP_CHARACTERS:
            reason = f"a stop string of {len(text)} characters, at most {MAX_STOP_CHARACTERS} are taken"
            raise ParameterError("stop", reason)


def _check_breakers(texts: Sequence[str]) -> None:
    check_count("dry_sequence_breakers", len(texts), MAX_BREAKERS, "texts")
    for text in texts:
        if not 0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_BREAKER_BYTES:
            reason = f"{shown(text)} must have 1 to {MAX_BREAKER_BYTES} bytes of UTF-8"
            raise ParameterError("dry_sequence_breakers", reason)

"""A completion as it is asked for, in text, and the bounds it must keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llamaclust.cluster.scheduler.breakers import DEFAULT_BREAKERS, MAX_BREAKER_BYTES, MAX_BREAKERS
from llamaclust.core.errors import RequestError
from llamaclust.core.limits import MAX_CONTEXT_TOKENS, MAX_TOP_LOGPROBS
from llamaclust.core.sampler_chain import SamplerChain
from llamaclust.core.sampling import SamplingParams
from llamaclust.core.sampling_bounds import CHAIN_BOUNDS, MAX_BIAS, MAX_MIROSTAT, MAX_TOP_K, REAL_BOUNDS

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIASES = 1024
SEEDS = 1 << 64


class ParameterError(RequestError):
    """A request that is refused because of one of its parameters."""

    def __init__(self, param: str, reason: str, code: str = RequestError.code) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A prompt and how to go on from it. Texts are tokenized as the model file says."""

    prompt: str | tuple[int, ...]
    max_new_tokens: int | None = None  # None: until the context is full; 0: the prompt is computed, nothing chosen
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None  # -2**63 .. 2**64 - 1, negative ones as two's complement; None: one is drawn
    stop: tuple[str, ...] = ()  # the answer ends before the first of them
    stop_token_ids: frozenset[int] = frozenset()  # beside the model's own end-of-generation tokens
    min_tokens: int = 0  # nothing stops the answer before
    ignore_eos: bool = False  # end-of-generation tokens are never chosen
    n: int = 1
    top_logprobs: int = 0
    score_from: int | None = None  # prompt tokens [max(score_from, 1), end) get logprobs; None: none
    penalty_window: int | None = None  # last tokens that penalties count; None: all
    penalize_nl: bool = True  # penalties count line breaks too
    dry_window: int | None = None  # last tokens that DRY looks at; None: all
    dry_breakers: tuple[str, ...] = DEFAULT_BREAKERS  # it does not look beyond these
    add_special: bool = True  # BOS (and EOS) where the model wants them
    parse_special: bool = True  # control words in a prompt's text become their tokens


def check_request(request: CompletionRequest, vocabulary: int) -> None:
    """Raises ParameterError for a value that breaks a bound. A prompt's length is checked once its tokens are known."""
    _within("max_tokens", request.max_new_tokens, 0, MAX_CONTEXT_TOKENS)
    _within("min_tokens", request.min_tokens, 0, MAX_CONTEXT_TOKENS)
    most = request.max_new_tokens
    if most is not None and request.min_tokens > most:
        raise ParameterError("min_tokens", f"{request.min_tokens} is more than max_tokens, which is {most}")
    _within("n", request.n, 1, MAX_CHOICES)
    _within("top_logprobs", request.top_logprobs, 0, MAX_TOP_LOGPROBS)
    _within("seed", request.seed, -SEEDS // 2, SEEDS - 1)
    _within("penalty_window", request.penalty_window, 0, MAX_CONTEXT_TOKENS)
    _within("dry_penalty_last_n", request.dry_window, 0, MAX_CONTEXT_TOKENS)
    _check_breakers(request.dry_breakers)
    if request.ignore_eos and request.stop_token_ids:
        raise ParameterError("stop_token_ids", "cannot be used together with ignore_eos")
    _check_stop(request.stop)
    _check_tokens("stop_token_ids", sorted(request.stop_token_ids), MAX_STOP_TOKENS, vocabulary)
    _check_sampling(request.params, vocabulary)
    if not isinstance(request.prompt, str):
        _check_tokens("prompt", request.prompt, MAX_CONTEXT_TOKENS, vocabulary)


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise ParameterError("stop", f"{len(stop)} stop strings, at most {MAX_STOP_STRINGS} are taken")
    for text in stop:
        if not text:
            raise ParameterError("stop", "a stop string must not be empty")
        if len(text) > MAX_STOP_CHARACTERS:
            reason = f"a stop string of {len(text)} characters, at most {MAX_STOP_CHARACTERS} are taken"
            raise ParameterError("stop", reason)


def _check_breakers(texts: Sequence[str]) -> None:
    if len(texts) > MAX_BREAKERS:
        raise ParameterError("dry_sequence_breakers", f"{len(texts)} texts, at most {MAX_BREAKERS} are taken")
    for text in texts:
        if not 0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_BREAKER_BYTES:
            reason = f"{shown(text)} has not 1 to {MAX_BREAKER_BYTES} bytes of UTF-8"
            raise ParameterError("dry_sequence_breakers", reason)


def _check_sampling(params: SamplingParams, vocabulary: int) -> None:
    for name, (low, high) in REAL_BOUNDS.items():
        _finite(name, getattr(params, name), low, high)
    _within("top_k", params.top_k, 0, MAX_TOP_K)
    if params.chain is not None:
        _check_chain(params.chain)
    _check_tokens("logit_bias", [token for token, _ in params.logit_bias], MAX_LOGIT_BIASES, vocabulary)
    for _, bias in params.logit_bias:
        _finite("logit_bias", bias, -MAX_BIAS, MAX_BIAS)


def _check_chain(chain: SamplerChain) -> None:
    for name, (low, high) in CHAIN_BOUNDS.items():
        _finite(name, getattr(chain, name), low, high)
    _within("mirostat", chain.mirostat, 0, MAX_MIROSTAT)
    _within("dry_allowed_length", chain.dry_allowed_length, 1, MAX_CONTEXT_TOKENS)


def _check_tokens(name: str, ids: Sequence[int], most: int, vocabulary: int) -> None:
    if len(ids) > most:
        raise ParameterError(name, f"{len(ids)} token ids, at most {most} are taken")
    wrong = next((i for i in ids if not _is_int(i) or not 0 <= i < vocabulary), None)
    if wrong is not None:
        raise ParameterError(name, f"token id {shown(wrong)} is outside the vocabulary [0, {vocabulary})")


def _within(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if not _is_int(value) or not low <= value <= high:
        raise ParameterError(name, f"must be a whole number within {low}..{high}, is {shown(value)}")


def _finite(name: str, value: float, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ParameterError(name, f"must be a number within {low:g}..{high:g}, is {shown(value)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value that a user gave, short enough for a message."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    return repr(value)[:60]

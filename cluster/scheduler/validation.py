"""Which requests are taken: every field of one within bounds, before anything is spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.errors import RequestError
from llamaclust.core.limits import MAX_CONTEXT_TOKENS, MAX_TOP_LOGPROBS
from llamaclust.core.sampler_chain import SamplerChain
from llamaclust.core.sampling import SamplingParams
from llamaclust.core.sampling_bounds import (
    CHAIN_BOUNDS,
    MAX_BIAS,
    MAX_BREAKERS_TOKENS,
    MAX_MIROSTAT,
    MAX_TOP_K,
    REAL_BOUNDS,
)


def check_generation(ask: GenerationRequest, settings: SchedulerSettings) -> None:
    """Raises RequestError that names the field, its value and the bound."""
    _check_prompt(ask, settings)
    _within("max_tokens", ask.max_new_tokens, 0, inf)
    _within("min_tokens", ask.min_tokens, 0, inf)
    _within("seed", ask.seed, 0, (1 << 64) - 1)
    _within("choice", ask.choice, 0, (1 << 32) - 1)
    _within("top_logprobs", ask.top_logprobs, 0, min(MAX_TOP_LOGPROBS, settings.vocabulary))
    _within("penalty_window", ask.penalty_window, 0, inf)
    _within("dry_window", ask.dry_window, 0, inf)
    _within("score_from", ask.score_from or 0, 0, inf)
    _check_tokens("stop_token_ids", ask.stop_token_ids, settings.vocabulary)
    if ask.min_tokens and len(ask.stop_token_ids) == settings.vocabulary:
        raise RequestError(
            f"min_tokens is {ask.min_tokens}, but stop_token_ids are all {settings.vocabulary} tokens: none is left"
        )
    _check_params(ask.params, settings.vocabulary)
    _check_breakers(ask.breakers)


def _check_prompt(ask: GenerationRequest, settings: SchedulerSettings) -> None:
    length, most = len(ask.prompt), settings.max_sequence_tokens
    if length == 0:
        raise RequestError("the prompt is empty: give at least one token")
    if length > most:
        raise RequestError(f"the prompt has {length} tokens, the context {most}: shorten it or raise context_length")
    if length == most and ask.max_new_tokens > 0:
        raise RequestError(f"the prompt fills the whole context of {most} tokens and leaves no room for an answer")
    _check_tokens("prompt", ask.prompt, settings.vocabulary)


def _check_params(params: SamplingParams, vocabulary: int) -> None:
    for name, (low, high) in REAL_BOUNDS.items():
        _within(name, getattr(params, name), low, high)
    _within("top_k", params.top_k, 0, MAX_TOP_K)
    if params.chain is not None:
        _check_chain(params.chain, vocabulary)
    biased = [token for token, _ in params.logit_bias]
    _check_tokens("logit_bias", biased, vocabulary)
    if biased != sorted(set(biased)):
        raise RequestError("logit_bias: token ids must be ascending, each once")
    for token, bias in params.logit_bias:
        _within(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)


def _check_chain(chain: SamplerChain, vocabulary: int) -> None:
    for name, (low, high) in CHAIN_BOUNDS.items():
        _within(name, getattr(chain, name), low, high)
    _within("mirostat", chain.mirostat, 0, MAX_MIROSTAT)
    _within("dry_allowed_length", chain.dry_allowed_length, 1, MAX_CONTEXT_TOKENS)
    _check_tokens("unpenalized", chain.unpenalized, vocabulary)
    if len(set(chain.order)) < len(chain.order):
        raise RequestError("samplers: one stands there twice")


def _check_breakers(breakers: Mapping[int, tuple[tuple[int, ...], ...]]) -> None:
    tokens = sum(len(one) for sequences in breakers.values() for one in sequences)
    if tokens > MAX_BREAKERS_TOKENS:
        raise RequestError(
            f"dry_sequence_breakers: the vocabulary has them in sequences of {tokens} tokens together, at most "
            f"{MAX_BREAKERS_TOKENS} are taken: give fewer or rarer texts"
        )


def _check_tokens(name: str, tokens: tuple[int, ...] | frozenset[int] | list[int], vocabulary: int) -> None:
    for bad in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= bad < vocabulary:
            raise RequestError(f"{name}: token id {bad} is not one of the model's [0, {vocabulary})")


def _within(name: str, value: float, low: float, high: float) -> None:
    """Not a number is within no bounds."""
    if not low <= value <= high:
        limit = f"at least {low}" if high == inf else f"within {low}..{high}"
        raise RequestError(f"{name} is {value}, must be {limit}")

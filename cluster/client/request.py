"""A call's options as a completion request, refused in the same words as by the HTTP API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from llamaclust.cluster.api.fields import read_biases, read_prompts, read_stop
from llamaclust.cluster.api.sampler_schema import read_texts
from llamaclust.cluster.client.types import Settings
from llamaclust.cluster.scheduler.validation import shown
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.samplers import effective_chain, parse_samplers
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler_chain import SamplerChain
from llamaclust.core.sampling import SamplingParams
from llamaclust.core.sampling_bounds import CHAIN_BOUNDS, REAL_BOUNDS

_Value = TypeVar("_Value")


def completion_request(prompt: Any, settings: Settings, score_from: int | None = None) -> CompletionRequest:
    """Raises ParameterError for an option of the wrong type; the text service checks bounds."""
    _check_flags(settings)
    prompts = _read("prompt", read_prompts, prompt if isinstance(prompt, str) else list(prompt))
    if len(prompts) != 1:
        raise ParameterError("prompt", f"{len(prompts)} prompts in one call; give them one by one")
    return CompletionRequest(
        prompts[0],
        settings.max_tokens,
        _params(settings),
        seed=settings.seed,
        stop=_read("stop", read_stop, settings.stop_strings),
        stop_token_ids=frozenset(settings.stop_token_ids),
        min_tokens=settings.min_tokens,
        ignore_eos=settings.ignore_eos,
        score_from=score_from,
        penalty_window=_window(settings.penalty_window),
        penalize_nl=settings.penalize_nl,
        dry_window=_window(settings.dry_penalty_last_n),
        dry_breakers=_read("dry_sequence_breakers", read_texts, list(settings.dry_sequence_breakers)),
    )


def _params(settings: Settings) -> SamplingParams:
    biases = {str(token): bias for token, bias in settings.logit_bias.items()}
    return SamplingParams(
        top_k=_off_if_negative_one(settings.top_k),
        logit_bias=_read("logit_bias", read_biases, biases),
        chain=_chain(settings),
        **{name: getattr(settings, name) for name in REAL_BOUNDS},
    )


def _chain(settings: Settings) -> SamplerChain | None:
    samplers = _read("samplers", parse_samplers, list(settings.samplers))
    values = {name: getattr(settings, name) for name in CHAIN_BOUNDS}
    return effective_chain(samplers, settings.dry_allowed_length, settings.mirostat, values)


def _window(tokens: int | None) -> int | None:
    return None if tokens == -1 else tokens


def _off_if_negative_one(top_k: int) -> int:
    return 0 if top_k == -1 else top_k


def _check_flags(settings: Settings) -> None:
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if type(field.default) is bool and type(value) is not bool:
            raise ParameterError(field.name, f"must be true or false, is {shown(value)}")


def _read(name: str, read: Callable[[Any], _Value], value: Any) -> _Value:
    try:
        return read(value)
    except ValueError as error:
        raise ParameterError(name, str(error)) from error

"""Checks all fields of a request against their limits before any work is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256

from llamaclust.cluster.scheduler.dry_breakers import check_size
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.core.errors import ContextLengthError, ParameterError
from llamaclust.core.limits import MAX_ADAPTER_SCALE, MAX_TOP_LOGPROBS, AdapterScales
from llamaclust.core.sampler import bounds, fields
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.fields import SamplingField
from llamaclust.core.sampler.params import CHAIN, PARAMS, SamplerChain, SamplingParams

NO_TEXT = "is an encoder or reranker, which generates nothing: use /v1/embeddings or /v1/rerank"
MAX_CHOICES = 128
_UINT64_MAX = (1 << 64) - 1


def validate(request: GenerationRequest, settings: SchedulerSettings, *, is_prompt_valid: bool = False) -> None:
    """Checks a request. Raises ParameterError with the HTTP API's field name, the value and the limit.
    `is_prompt_valid` means that the prompt's token ids were already checked."""
    vocabulary = settings.vocabulary
    if not settings.generates and request.embedded is None:
        raise ParameterError("model", NO_TEXT)
    _check_length(request, settings.max_sequence_tokens)
    if not is_prompt_valid:
        _check_tokens("prompt", request.prompt, vocabulary)
    check_integer("max_tokens", request.max_new_tokens, 0, MAX_CONTEXT_TOKENS)
    check_integer("min_tokens", request.min_tokens, 0, MAX_CONTEXT_TOKENS)
    check_integer("seed", request.seed, 0, _UINT64_MAX)
    check_integer("choice", request.choice, 0, MAX_CHOICES - 1)
    check_integer("top_logprobs", request.top_logprobs, 0, min(MAX_TOP_LOGPROBS, vocabulary))
    check_integer("repeat_last_n", request.penalty_window, 0, MAX_CONTEXT_TOKENS)
    check_integer("dry_penalty_last_n", request.dry_window, 0, MAX_CONTEXT_TOKENS)
    if request.max_drafted is not None:
        check_integer("speculative", request.max_drafted, 0, MAX_WINDOW)
    if request.score_from is not None:
        check_integer("score_from", request.score_from, 0, MAX_CONTEXT_TOKENS)
    check_adapters(request.adapters, settings.adapters)
    if request.embedded is not None:
        first, end = request.embedded
        assert 0 <= first < end <= len(request.prompt) and request.max_new_tokens == 0, request.embedded
    assert len(request.answered) <= request.max_new_tokens, "an earlier run had the same bounds"
    _check_tokens("stop_token_ids", request.stop_token_ids | request.late_token_ids, vocabulary)
    if request.min_tokens and len(request.delayed_ids) == vocabulary:
        reason = f"is {request.min_tokens}, but stop_token_ids has all {vocabulary} tokens: none is left to generate"
        raise ParameterError("min_tokens", reason)
    _check_params(request.params, vocabulary)
    if request.grammar is not None and len(request.grammar.definition) > bounds.MAX_GRAMMAR_BYTES:
        reason = f"has {len(request.grammar.definition)} characters; the limit is {bounds.MAX_GRAMMAR_BYTES} bytes"
        raise ParameterError(request.grammar.origin, reason)
    check_size(sum(len(sequence) for sequences in request.breakers.values() for sequence in sequences))


def check_images(request: GenerationRequest, settings: SchedulerSettings) -> None:
    if not request.images:
        return
    if not settings.image_width:
        raise ParameterError("images", "the model does not take images: remove the images")
    if request.embedded is not None or request.score_from is not None:
        raise ParameterError("images", "embeddings and scores are computed from text only: remove the images")
    end = 0
    for number, span in enumerate(request.images):
        assert end <= span.start < span.end <= len(request.prompt) and span.offset >= 0, (number, span)
        assert not any(request.prompt[span.start : span.end]) and len(span.digest) == sha256().digest_size, number
        end = span.end
        _check_rows_of_image(f"image {number}", span, settings)


def _check_rows_of_image(name: str, span: ImageSpan, settings: SchedulerSettings) -> None:
    count, width = span.end - span.start, settings.image_width
    if span.rows.shape != (count, width):
        shape = " x ".join(map(str, span.rows.shape))
        raise ParameterError("images", f"{name}: expected {count} rows of {width} numbers, found {shape}")
    if span.is_bidirectional and count > settings.max_group_rows:
        limit = f"the limit is {settings.max_group_rows}: set prefill_chunk to {count}"
        raise ParameterError("images", f"{name} needs {count} rows in one microbatch; {limit}")
    if span.is_bidirectional and count * span.row_bytes > settings.max_image_bytes:
        needed, most = count * span.row_bytes, settings.max_image_bytes
        raise ParameterError("images", f"{name}: its rows need {needed} bytes in one microbatch; the limit is {most}")
    positions = span.rope_positions
    if positions is not None:
        assert settings.rope_sections and positions.shape == (settings.rope_sections, count), positions.shape
        assert positions.min() >= 0 and positions.max() < count, "a rope position is outside the image"


def check_chain(chain: SamplerChain) -> None:
    _check_rows(chain, CHAIN)
    if len(set(chain.order)) < len(chain.order):
        raise ParameterError("samplers", "a sampler is listed twice")


def _check_rows(source: object, rows: Mapping[str, SamplingField]) -> None:
    for name, value in fields.numbers_of(source, rows).items():
        row = rows[name]
        if row.is_whole:
            check_integer(name, value, int(row.low), int(row.high))
        else:
            check_number(name, value, row.low, row.high)


def check_integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ParameterError(name, f"must be a whole number within {low}..{high}, is {shown(value)}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    # NaN fails the comparison too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ParameterError(name, f"must be a number within {low:g}..{high:g}, is {shown(value)}")


def check_count(name: str, count: int, most: int, items: str) -> None:
    if count > most:
        raise ParameterError(name, f"found {count} {items}, at most {most} are allowed")


def shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    return repr(value)[:60]


def check_adapters(chosen: AdapterScales, adapters: Collection[int]) -> None:
    for number, scale in chosen:
        if number not in adapters:
            there = ", ".join(map(str, sorted(adapters))) or "none"
            raise ParameterError("lora", f"adapter {number} does not exist; the loaded adapters are {there}")
        check_number("lora", scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)


def _check_length(request: GenerationRequest, most: int) -> None:
    tokens = len(request.prompt)
    if tokens == 0:
        raise ParameterError("prompt", "is empty; give at least one token")
    if tokens + (request.max_new_tokens != 0) > most:
        room = " with no room for an answer" if tokens == most else ""
        raise ContextLengthError(f"has {tokens} tokens{room}", tokens, most)


def _check_params(params: SamplingParams, vocabulary: int) -> None:
    _check_rows(params, PARAMS)
    if params.chain is not None:
        check_chain(params.chain)
        _check_tokens("unpenalized", params.chain.unpenalized, vocabulary)
    check_count("logit_bias", len(params.logit_bias), bounds.MAX_LOGIT_BIASES, "token ids")
    biased = [token for token, _ in params.logit_bias]
    _check_tokens("logit_bias", biased, vocabulary)
    if biased != sorted(set(biased)):
        raise ParameterError("logit_bias", "token ids must be ascending, without duplicates")
    for _, bias in params.logit_bias:
        check_number("logit_bias", bias, -bounds.MAX_BIAS, bounds.MAX_BIAS)


def _check_tokens(name: str, ids: Collection[int], vocabulary: int) -> None:
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocabulary):
        return
    wrong = next(token for token in ids if type(token) is not int or not 0 <= token < vocabulary)
    raise ParameterError(name, f"token id {shown(wrong)} is outside the vocabulary [0, {vocabulary})")

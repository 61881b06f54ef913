"""Microbatches, sampling inputs and results as bytes and back; every field from a peer is checked here or not at all.

What depends on a loaded stage (vocabulary, KV blocks, limits) is checked by the stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain, repeat
from typing import Any, Final, Literal

from llamaclust.core import limits, sampling_bounds
from llamaclust.core.bounds import MAX_ONE_LINE, bounded, finite, line, one_line
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_ADAPTER_SCALE, MAX_ADAPTERS, AdapterScales
from llamaclust.core.sampler_chain import CHAIN, SAMPLERS, SamplerChain
from llamaclust.core.sampling import PARAMS, RowResult, RowTask, SampleTask, SamplingParams, ScoreTask, TopLogprobs
from llamaclust.core.sampling_bounds import (
    MAX_CONTEXT_TOKENS,
    MAX_DRAFTED_TOKENS,
    MAX_FORCED_TOKENS,
    MAX_MATCHER_NS,
    SamplingField,
)
from llamaclust.proto import microbatch_pb2 as microbatch_proto
from llamaclust.proto import sampling_pb2 as sampling_proto
from llamaclust.wire.codec import parse
from llamaclust.wire.microbatch.chunks import chunk_bytes
from llamaclust.wire.microbatch.matchers import matcher_row_in, starts_in, starts_out
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SampledTokens, SamplingInputs, StageTiming
from llamaclust.wire.microbatch.tables import LAST_BLOCK, states_in, table_in
from llamaclust.wire.microbatch.tasks import tasks_bytes

MAX_MICROBATCH_BYTES = 1 << 23
MAX_INPUTS_BYTES = 1 << 27
MAX_INPUTS_TOKENS = 1 << 26
MAX_STAGES = 255
MAX_RELEASED = 4 * limits.MAX_SEQUENCES

_ROW_BYTES = 5 * (2 * MAX_FORCED_TOKENS + MAX_DRAFTED_TOKENS) + 4 * MAX_ONE_LINE + 64
_TOP_LOGPROB_BYTES = 10
_TIMING_BYTES = 64

_PLAIN_PARAMS, _BIASED_PARAMS = 256, 32
"""Kept parameters; those with logit biases may be large."""


def encode_microbatch(microbatch: Microbatch) -> bytes:
    head = microbatch_proto.Microbatch(model_id=microbatch.model_id, epoch=microbatch.epoch, number=microbatch.number)
    return b"".join((head.SerializeToString(), *map(chunk_bytes, microbatch.chunks)))


def decode_microbatch(data: bytes) -> Microbatch:
    """Raises ProtocolError for bytes that are no microbatch or break a bound."""
    message = parse(microbatch_proto.Microbatch, data, MAX_MICROBATCH_BYTES)
    bounded("chunks", len(message.chunks), 1, limits.MAX_SEQUENCES)
    microbatch = Microbatch(
        line("model_id", message.model_id, 128),
        message.epoch,
        message.number,
        tuple(_chunk(chunk, message.number) for chunk in message.chunks),
    )
    bounded("tokens of a microbatch", microbatch.rows, 1, limits.MAX_BATCH_TOKENS)
    return microbatch


def _chunk(message: microbatch_proto.Chunk, number: int) -> Chunk:
    tokens = tuple(message.tokens)
    bounded("tokens of a chunk", len(tokens), 1, limits.MAX_BATCH_TOKENS)
    last_token = limits.MAX_VOCABULARY - 1
    bounded("token", max(tokens), 0, last_token)
    bounded("last position", message.position + len(tokens) - 1, 0, MAX_CONTEXT_TOKENS - 1)
    bounded("outputs", message.outputs, 0, len(tokens))
    depends_on = _depends_on(message.depends_on, tokens, number) if message.HasField("depends_on") else None
    window = table_in(message.window_table) if message.window_table else ()
    start = bounded("window_start", message.window_start, 0, MAX_CONTEXT_TOKENS)
    end = bounded("end of embedded rows", message.embedded_end, 0, len(tokens))
    embedded = (bounded("first embedded row", message.embedded_first, 0, end), end)
    return Chunk(
        tokens,
        message.position,
        table_in(message.table),
        message.outputs,
        depends_on,
        window,
        start,
        embedded,
        _adapters(message.adapters),
        bounded("state_from", message.state_from, 0, LAST_BLOCK) if message.HasField("state_from") else None,
        states_in(message.state_to, len(tokens)) if message.state_to else (),
        bounded("next_token", message.next_token, 0, last_token) if message.HasField("next_token") else None,
        bounded("drafts", message.drafts, 0, MAX_DRAFTED_TOKENS),
        message.checked,
    )


def _adapters(messages: Sequence[microbatch_proto.AdapterScale]) -> AdapterScales:
    before, most = -1, MAX_ADAPTER_SCALE
    for message in messages:
        before = bounded("adapter", message.adapter, before + 1, MAX_ADAPTERS - 1)
    return tuple((message.adapter, finite("scale", message.scale, -most, most)) for message in messages)


def _depends_on(message: microbatch_proto.RowReference, tokens: tuple[int, ...], number: int) -> tuple[int, int]:
    if tokens != (0,):
        raise ProtocolError("a chunk that depends on a row has tokens of its own")
    bounded("number of the microbatch depended on", message.number, 0, number - 1)
    return message.number, bounded("row depended on", message.row, 0, limits.MAX_BATCH_TOKENS - 1)


def encode_sampled_tokens(sampled: SampledTokens) -> bytes:
    return microbatch_proto.SampledTokens(number=sampled.number, tokens=sampled.tokens).SerializeToString()


def decode_sampled_tokens(data: bytes) -> SampledTokens:
    """Raises ProtocolError for bytes that are not sampled tokens or break a bound."""
    message = parse(microbatch_proto.SampledTokens, data, MAX_MICROBATCH_BYTES)
    bounded("sampled tokens", len(message.tokens), 0, limits.MAX_BATCH_TOKENS)
    return SampledTokens(message.number, _tokens(message.tokens))


PREPARE_MATCHERS: Final = b""
"""The message that answers with a matcher are about to come, in place of sampling inputs. It is empty and belongs to no
epoch."""


def encode_inputs(inputs: SamplingInputs) -> bytes:
    head = sampling_proto.SamplingInputs(epoch=inputs.epoch, number=inputs.number)
    rest = sampling_proto.SamplingInputs(released=inputs.released)
    starts_out(inputs.starts, rest)
    return b"".join((head.SerializeToString(), *tasks_bytes(inputs.tasks), rest.SerializeToString()))


def decode_inputs(data: bytes) -> SamplingInputs:
    """Raises ProtocolError for bytes that are no sampling inputs or break a bound."""
    message = parse(sampling_proto.SamplingInputs, data, MAX_INPUTS_BYTES)
    bounded("tasks", len(message.tasks), 0, limits.MAX_BATCH_TOKENS)
    bounded("released", len(message.released), 0, MAX_RELEASED)
    bounded("output rows", sum(1 + task.sample.further_rows for task in message.tasks), 0, limits.MAX_BATCH_TOKENS)
    bounded("tokens that rows look at", sum(map(_looked_at, message.tasks)), 0, MAX_INPUTS_TOKENS)
    tasks = tuple(chain.from_iterable(map(_tasks_in, message.tasks)))
    return SamplingInputs(message.epoch, message.number, tasks, tuple(message.released), starts_in(message))


def _tasks_in(message: sampling_proto.RowTask) -> Iterable[RowTask]:
    """Of an output row and those that are sampled in the same manner."""
    match message.WhichOneof("task"):
        case "sample":
            return accumulate(repeat(_sample_in(message.sample), 1 + message.sample.further_rows), _next)
        case "score":
            return (ScoreTask(_token(message.score.token), _top(message.score.top_logprobs)),)
        case _:
            raise ProtocolError("a row task of a kind that this version does not know")


def _looked_at(message: sampling_proto.RowTask) -> int:
    """Each row has its own copy."""
    sample = message.sample
    tokens = len(sample.history) + len(sample.suppressed) + len(sample.params.logit_bias)
    return (1 + sample.further_rows) * (tokens + sum(len(breaker.tokens) for breaker in sample.breakers))


def _next(task: SampleTask, _: SampleTask) -> SampleTask:
    return task.next()


def _sample_in(message: sampling_proto.SampleTask) -> SampleTask:
    bounded("history", len(message.history), 0, MAX_CONTEXT_TOKENS)
    bounded("suppressed", len(message.suppressed), 0, limits.MAX_VOCABULARY)
    params = message.params
    return SampleTask(
        (_biased_params_in if params.logit_bias else _plain_params_in)(params.SerializeToString()),
        message.seed,
        message.choice,
        bounded("position", message.position + message.further_rows, 0, MAX_CONTEXT_TOKENS) - message.further_rows,
        _tokens(message.history),
        _tokens(message.suppressed),
        _top(message.top_logprobs),
        bounded("history_rows", message.history_rows, 0, limits.MAX_BATCH_TOKENS),
        _window("penalty_window", message),
        _window("dry_window", message),
        _breakers(message.breakers),
        _mu(message.mu),
        matcher_row_in(message.matcher) if message.HasField("matcher") else None,
    )


def _checked_params(data: bytes) -> SamplingParams:
    return _params_in(sampling_proto.SamplingParams.FromString(data))


_plain_params_in, _biased_params_in = (lru_cache(most)(_checked_params) for most in (_PLAIN_PARAMS, _BIASED_PARAMS))
"""Checked once, since a sequence brings the same ones with every token."""


def _params_in(message: sampling_proto.SamplingParams) -> SamplingParams:
    bounded("logit biases", len(message.logit_bias), 0, limits.MAX_VOCABULARY)
    most = -sampling_bounds.MAX_BIAS, sampling_bounds.MAX_BIAS
    return SamplingParams(
        logit_bias=tuple((_token(bias.token), finite("logit_bias", bias.bias, *most)) for bias in message.logit_bias),
        chain=_chain_in(message.chain) if message.HasField("chain") else None,
        **_numbers(message, PARAMS),
    )


def _numbers(message: object, rows: Mapping[str, SamplingField]) -> dict[str, Any]:
    given = sampling_bounds.numbers_of(message, rows)
    for name, row in rows.items():
        if row.is_whole:
            bounded(name, given[name], int(row.low), int(row.high))
        else:
            finite(name, given[name], row.low, row.high)
    return given


def _chain_in(chain: sampling_proto.SamplerChain) -> SamplerChain:
    bounded("steps", len(chain.order), 0, len(SAMPLERS))
    steps = tuple(SAMPLERS[bounded("step", number, 0, len(SAMPLERS) - 1)] for number in chain.order)
    if len(set(steps)) < len(steps):
        raise ProtocolError("a sampler stands twice in one order")
    bounded("unpenalized", len(chain.unpenalized), 0, limits.MAX_VOCABULARY)
    return SamplerChain(
        steps,
        unpenalized=_tokens(chain.unpenalized),
        **_numbers(chain, CHAIN),
    )


def _breakers(messages: Sequence[sampling_proto.TokenSequence]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of DRY."""
    bounded("breakers", len(messages), 0, sampling_bounds.MAX_BREAKERS)
    for message in messages:
        bounded("tokens of a breaker", len(message.tokens), 1, sampling_bounds.MAX_BREAKER_TOKENS)
    return tuple(_tokens(message.tokens) for message in messages)


def _window(name: Literal["penalty_window", "dry_window"], message: sampling_proto.SampleTask) -> int | None:
    return bounded(name, getattr(message, name), 0, MAX_CONTEXT_TOKENS) if message.HasField(name) else None


def _mu(value: float) -> float:
    return finite("mu", value, -sampling_bounds.MAX_MU, sampling_bounds.MAX_MU)


def _token(value: int) -> int:
    return bounded("token", value, 0, limits.MAX_VOCABULARY - 1)


def _tokens(values: Iterable[int]) -> tuple[int, ...]:
    tokens = tuple(values)
    bounded("token", max(tokens, default=0), 0, limits.MAX_VOCABULARY - 1)
    return tokens


def _top(value: int) -> int:
    return bounded("top_logprobs", value, 0, limits.MAX_TOP_LOGPROBS)


def encode_result(result: Result) -> bytes:
    message = sampling_proto.Result(epoch=result.epoch, number=result.number, embeddings=result.embeddings)
    message.drafting_ns = result.drafting_ns
    for row in result.rows:
        _row_out(row, message.rows.add())
    for timing in result.timings:
        message.timings.add(
            queue_ns=timing.queue_ns, compute_ns=timing.compute_ns, wire_ns=timing.wire_ns, rows=timing.rows
        )
    if result.failure is not None:
        message.failure = one_line(result.failure)
    return message.SerializeToString()


def _row_out(row: RowResult, to: sampling_proto.RowResult) -> None:
    if row.failure is not None:
        to.failure, to.is_request_fault = one_line(row.failure), row.is_request_fault
        return
    if row.is_deferred:
        to.is_deferred = True
        return
    to.chosen.token, to.chosen.logprob = row.token, row.logprob
    if row.top_logprobs:
        tokens, logprobs = zip(*row.top_logprobs, strict=True)
        to.top_tokens.extend(tokens)
        to.top_logprobs.extend(logprobs)
    if row.mu is not None:
        to.mu = row.mu
    to.forced.extend(row.forced)
    to.forced_draft.extend(row.forced_draft)
    to.drafted.extend(row.drafted)
    to.matcher_ns = row.matcher_ns


def most_result_bytes(rows: int, top_logprobs: int, *, embeds: bool) -> int:
    """Returns the largest size of a result with `rows` output rows and `top_logprobs` likeliest tokens in all."""
    embedded = limits.MAX_EMBEDDING_BYTES if embeds else 0
    return (rows + 1) * _ROW_BYTES + top_logprobs * _TOP_LOGPROB_BYTES + MAX_STAGES * _TIMING_BYTES + embedded


def decode_result(data: bytes) -> Result:
    """Raises ProtocolError for bytes that are no result or break a bound."""
    message = parse(sampling_proto.Result, data, MAX_INPUTS_BYTES)
    bounded("rows", len(message.rows), 0, limits.MAX_BATCH_TOKENS)
    bounded("timings", len(message.timings), 0, MAX_STAGES)
    return Result(
        message.epoch,
        message.number,
        tuple(_row(row) for row in message.rows),
        tuple(map(_timing_in, message.timings)),
        line("failure", message.failure) if message.HasField("failure") else None,
        _floats("embeddings", message.embeddings),
        message.drafting_ns,
    )


def _timing_in(message: sampling_proto.StageTiming) -> StageTiming:
    rows = bounded("rows of a timing", message.rows, 1, limits.MAX_BATCH_TOKENS)
    return StageTiming(message.queue_ns, message.compute_ns, message.wire_ns, rows)


def _floats(what: str, data: bytes) -> bytes:
    bounded(f"bytes of {what}", len(data), 0, limits.MAX_EMBEDDING_BYTES)
    if len(data) % 4:
        raise ProtocolError(f"{what}: {len(data)} bytes, no whole number of float32")
    return data


def _row(message: sampling_proto.RowResult) -> RowResult:
    chosen_bytes = message.chosen.ByteSize()
    if 0 < chosen_bytes == message.ByteSize() - 2:  # and nothing else, as in most rows
        return RowResult(_token(message.chosen.token), _logprob(message.chosen.logprob))
    if message.HasField("failure"):
        fault = message.is_request_fault
        return RowResult(-1, math.nan, failure=line("failure", message.failure), is_request_fault=fault)
    if message.is_deferred:
        return RowResult(-1, math.nan, is_deferred=True)
    mu = _mu(message.mu) if message.HasField("mu") else None
    forced = _following("forced tokens", message.forced, MAX_FORCED_TOKENS)
    draft = _following("forced tokens of a draft", message.forced_draft, MAX_FORCED_TOKENS)
    drafted = _following("drafted tokens", message.drafted, MAX_DRAFTED_TOKENS)
    token, logprob = _token(message.chosen.token), _logprob(message.chosen.logprob)
    taken_ns = bounded("matcher_ns", message.matcher_ns, 0, MAX_MATCHER_NS)
    top = _top_in(message)
    return RowResult(
        token, logprob, top, mu=mu, forced=forced, forced_draft=draft, drafted=drafted, matcher_ns=taken_ns
    )


def _following(what: str, tokens: Sequence[int], most: int) -> tuple[int, ...]:
    if not tokens:
        return ()
    bounded(what, len(tokens), 0, most)
    return _tokens(tokens)


def _top_in(message: sampling_proto.RowResult) -> Sequence[tuple[int, float]]:
    """Without calls for each of them: a result may have thousands."""
    if not message.top_tokens and not message.top_logprobs:
        return ()
    tokens, logprobs = _tokens(message.top_tokens), tuple(message.top_logprobs)
    bounded("top_logprobs", len(tokens), 0, limits.MAX_TOP_LOGPROBS)
    bounded("logprobs of the top tokens", len(logprobs), len(tokens), len(tokens))
    if not all(map(math.isfinite, logprobs)):
        raise ProtocolError("logprob is no finite number")
    return TopLogprobs.of([*zip(tokens, logprobs, strict=True)])


def _logprob(value: float) -> float:
    if not math.isfinite(value):
        raise ProtocolError("logprob is no finite number")
    return value

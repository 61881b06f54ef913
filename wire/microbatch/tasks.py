"""What is done with output rows, as bytes. A sequence's tasks differ in their positions and histories alone, as a rule:
the rest is encoded once, and no protobuf objects are made, which would take most of the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from llamaclust.core.sampler_chain import CHAIN, SAMPLERS, SamplerChain
from llamaclust.core.sampling import PARAMS, MatcherRow, RowTask, SampleTask, SamplingParams
from llamaclust.core.sampling_bounds import numbers_of
from llamaclust.proto import sampling_pb2 as sampling_proto
from llamaclust.wire.microbatch.fields import packed_words, sized, varint
from llamaclust.wire.microbatch.matchers import matcher_row_out

_CACHED_PARTS = 1024
_MOST_SUPPRESSED = 64
"""Of a task whose encoding is kept."""
_PLAIN_PARAMS, _BIASED_PARAMS = 256, 32
"""Kept parameters; those with logit biases may be large."""


def tasks_bytes(tasks: Sequence[RowTask]) -> Iterator[bytes]:
    """As parts of sampling inputs, with the field's tags: each of an output row and those that are sampled in the same
    manner."""
    first: SampleTask | None = None
    last: SampleTask | None = None
    further_rows = 0
    for task in tasks:
        if not isinstance(task, SampleTask):
            if first is not None:
                yield _sample(first, further_rows)
            first = last = None
            yield _field(
                sampling_proto.RowTask(score=sampling_proto.ScoreTask(token=task.token, top_logprobs=task.top_logprobs))
            )
        elif last is not None and task.is_next_to(last):
            further_rows += 1
            last = task
        else:
            if first is not None:
                yield _sample(first, further_rows)
            first = last = task
            further_rows = 0
    if first is not None:
        yield _sample(first, further_rows)


def _field(message: sampling_proto.RowTask) -> bytes:
    return b"\x1a" + sized(message.SerializeToString())


def _sample(task: SampleTask, further_rows: int) -> bytes:
    windows = task.penalty_window, task.dry_window
    constant = task.params, task.seed, task.choice, task.suppressed, task.top_logprobs, task.history_rows, windows
    if _is_cacheable(task):
        begin, end = _cached_parts(*constant)
    else:
        begin, end = _encoded_parts(*constant, task.breakers, task.mu, task.matcher)
    position = b"\x20" + varint(task.position) if task.position else b""
    history = b"\x2a" + packed_words(task.history) if task.history else b""
    further = b"\x70" + varint(further_rows) if further_rows else b""
    return b"\x1a" + sized(b"\x0a" + sized(b"".join((begin, position, history, end, further))))


def _is_cacheable(task: SampleTask) -> bool:
    """Whether its encoding, but for position and history, is that of its neighbours, and small."""
    if task.breakers or task.matcher is not None or task.mu or task.params.logit_bias:
        return False
    return len(task.suppressed) <= _MOST_SUPPRESSED


def _encoded_parts(
    params: SamplingParams,
    seed: int,
    choice: int,
    suppressed: tuple[int, ...],
    top_logprobs: int,
    history_rows: int,
    windows: tuple[int | None, int | None],
    breakers: tuple[tuple[int, ...], ...] = (),
    mu: float = 0.0,
    matcher: MatcherRow | None = None,
) -> tuple[bytes, bytes]:
    """The encoding before a task's position and behind its history."""
    params_out = (_biased_params_out if params.logit_bias else _plain_params_out)(params)
    begin = sampling_proto.SampleTask(params=params_out, seed=seed, choice=choice)
    end = sampling_proto.SampleTask(
        suppressed=suppressed,
        top_logprobs=top_logprobs,
        history_rows=history_rows,
        penalty_window=windows[0],
        dry_window=windows[1],
        breakers=[sampling_proto.TokenSequence(tokens=tokens) for tokens in breakers],
        mu=mu,
        matcher=None if matcher is None else matcher_row_out(matcher),
    )
    return begin.SerializeToString(), end.SerializeToString()


_cached_parts = lru_cache(_CACHED_PARTS)(_encoded_parts)


def _params_out(params: SamplingParams) -> sampling_proto.SamplingParams:
    return sampling_proto.SamplingParams(
        logit_bias=[sampling_proto.LogitBias(token=token, bias=bias) for token, bias in params.logit_bias],
        chain=None if params.chain is None else _chain_out(params.chain),
        **numbers_of(params, PARAMS),
    )


_plain_params_out, _biased_params_out = lru_cache(_PLAIN_PARAMS)(_params_out), lru_cache(_BIASED_PARAMS)(_params_out)
"""Made once, since a sequence brings the same ones with every token."""


def _chain_out(chain: SamplerChain) -> sampling_proto.SamplerChain:
    return sampling_proto.SamplerChain(
        order=[SAMPLERS.index(step) for step in chain.order],
        unpenalized=chain.unpenalized,
        **numbers_of(chain, CHAIN),
    )

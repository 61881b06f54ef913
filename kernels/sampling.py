"""Samples and scores tokens on the CPU, for the last stage of every backend. docs/internals/numerics.md has the
rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat

from llamaclust.core.bounds import one_line
from llamaclust.core.sampler.fields import numbers_of
from llamaclust.core.sampler.matchers import AllowedTokens
from llamaclust.core.sampler.params import CHAIN, PARAMS, SAMPLERS, SamplerChain
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask, ScoreTask
from llamaclust.kernels import _native
from llamaclust.kernels.backend import Logits, RankedLogits


class Sampler:
    """The sampler of one stage, which runs one call at a time and releases the GIL. It follows llama.cpp's default
    order: logit bias, penalties, top-k, top-p, min-p, temperature. At temperature 0, the largest logit wins. Logprobs
    are the log-softmax of raw logits."""

    def __init__(self, vocabulary_size: int, feature_level: str = "", threads: int = 1) -> None:
        """`threads` is the thread count. `feature_level` "" means the best. Raises ValueError for unknown levels."""
        self._native = _native.Sampler(vocabulary_size, feature_level, threads)

    @property
    def record_words(self) -> int:
        return self._native.record_words

    def run(
        self,
        logits: Logits,
        tasks: tuple[RowTask, ...],
        allowed: Sequence[AllowedTokens | None] | None = None,
    ) -> tuple[RowResult, ...]:
        """Returns one result for each row of logits [tasks, vocabulary]. A result without a token has a `failure`."""
        native = list(map(_native_task, tasks, repeat(None) if allowed is None else allowed))
        if isinstance(logits, RankedLogits):
            return tuple(map(_result, self._native.run_ranked(logits.records, native, logits.rows, logits.totals)))
        return tuple(map(_result, self._native.run(logits, native)))

    def sample(self, logits: Logits, tasks: _native.SamplingTasks) -> _native.RowOutcomes:
        if isinstance(logits, RankedLogits):
            return _native.sample_ranked(self._native, logits.records, tasks, logits.rows, logits.totals)
        return _native.sample(self._native, logits, tasks)


def row_results(outcomes: _native.RowOutcomes) -> tuple[RowResult, ...]:
    return tuple(map(_answer, outcomes.rows))


def set_result(outcomes: _native.RowOutcomes, place: int, row: RowResult) -> None:
    failure = "" if row.failure is None else one_line(row.failure)
    more = list(row.top_logprobs), failure, row.is_request_fault, row.is_deferred
    outcomes.set(place, row.token, row.logprob, *more, row.mu, row.forced, row.forced_draft, row.matcher_ns)


def _native_task(task: RowTask, allowed: AllowedTokens | None) -> _native.RowTask:
    if isinstance(task, ScoreTask):
        return _native.RowTask.score(token=task.token, top_logprobs=task.top_logprobs)
    params = task.params
    return _native.RowTask.sample(
        **numbers_of(params, PARAMS),
        logit_bias=params.logit_bias,
        seed=task.seed,
        choice=task.choice,
        position=task.position,
        history=task.history,
        suppressed=task.suppressed,
        top_logprobs=task.top_logprobs,
        chain=_native_chain(params.chain, task) if params.chain is not None else None,
        allowed=allowed,
    )


def _native_chain(chain: SamplerChain, task: SampleTask) -> _native.Chain:
    return _native.Chain.make(
        order=[SAMPLERS.index(step) for step in chain.order],
        unpenalized=chain.unpenalized,
        penalty_window=-1 if task.penalty_window is None else task.penalty_window,
        dry_window=-1 if task.dry_window is None else task.dry_window,
        breakers=task.breakers,
        mu=task.mu,
        **numbers_of(chain, CHAIN),
    )


def _result(outcome: _native.RowOutcome) -> RowResult:
    mu = None if math.isnan(outcome.mu) else outcome.mu
    return RowResult(outcome.token, outcome.logprob, tuple(outcome.top_logprobs), outcome.failure or None, mu)


def _answer(row: _native.RowAnswer) -> RowResult:
    result = _result(row)
    if not (row.forced or row.forced_draft or row.drafted or row.is_deferred or row.is_request_fault or row.matcher_ns):
        return result
    return replace(
        result,
        forced=tuple(row.forced),
        forced_draft=tuple(row.forced_draft),
        drafted=tuple(row.drafted),
        is_deferred=row.is_deferred,
        is_request_fault=row.is_request_fault,
        matcher_ns=row.matcher_ns,
    )

"""Makes the tasks for output rows. A task scores a given token or samples a token."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import accumulate, repeat
from typing import TYPE_CHECKING

from llamaclust.core.sampler.matchers import MatcherStart
from llamaclust.core.sampler.tasks import MatcherRow, RowTask, SampleTask, ScoreTask

if TYPE_CHECKING:
    from llamaclust.cluster.scheduler.sequences import Sequence

_OWNER_BITS = (1 << 32) - 1
"""Bits of an owner's number, which workers get instead of a key's digest or a client's address."""


def prompt_tasks(sequence: Sequence, start: int, end: int) -> tuple[RowTask, ...]:
    score_end = min(end, sequence.prompt_length - 1)
    top = sequence.request.top_logprobs
    scores = [ScoreTask(sequence.tokens[row + 1], top) for row in range(start, score_end)]
    is_sampled = sequence.max_new_tokens and start < end == len(sequence.tokens)
    return (*scores, sample_task(sequence)) if is_sampled else tuple(scores)


def sample_task(sequence: Sequence, unknown: int = 0) -> SampleTask:
    """Returns the task that samples the next token. The last `unknown` tokens before it are not yet known."""
    sampler = sequence.sampler
    return _task(sequence, sampler.history(sampler.window - unknown) if sampler.window else (), unknown)


def window_tasks(sequence: Sequence, drafted: tuple[int, ...]) -> tuple[SampleTask, ...]:
    sampler = sequence.sampler
    history = sampler.history(sampler.window - 1, newer=1) if sampler.window else ()
    first = _task(sequence, history, 0, drafted, follows=sampler.window > 0)
    tasks = accumulate(repeat(first, 1 + len(drafted)), lambda before, _: before.next())
    if not first.suppressed:
        return tuple(tasks)
    most = sequence.request.min_tokens
    return tuple(
        task if sequence.generated + row < most else replace(task, suppressed=()) for row, task in enumerate(tasks)
    )


def further_tasks(sequence: Sequence, drafted: tuple[int, ...]) -> tuple[SampleTask, ...]:
    unknown, most = len(sequence.drafting.ahead) + 1, sequence.request.min_tokens
    first = _task(sequence, (), unknown, (*sequence.drafting.ahead, *drafted))
    tasks = accumulate(repeat(first, len(drafted)), lambda before, _: before.next())
    return tuple(
        task if sequence.generated + unknown + row < most else replace(task, suppressed=())
        for row, task in enumerate(tasks)
    )


def _task(
    sequence: Sequence, history: Items[int], unknown: int, drafted: tuple[int, ...] = (), *, follows: bool = False
) -> SampleTask:
    request, sampler, end = sequence.request, sequence.sampler, len(sequence.tokens) + unknown
    suppressed = sampler.delayed_ids if end - len(request.prompt) < request.min_tokens else ()
    row = request.params, request.seed, request.choice, end, history, suppressed, request.top_logprobs
    if sampler.is_plain:
        return SampleTask(*row)
    return SampleTask(
        *row,
        history_rows=int(follows or (sampler.window > 0 and unknown > 0)),
        penalty_window=request.penalty_window if request.params.needs_history else None,
        dry_window=request.dry_window if request.looks_for_repetitions else None,
        breakers=sampler.breakers.with_tokens(drafted),
        mu=sampler.mu,
        matcher=MatcherRow(sequence.key, sequence.generated + unknown) if request.needs_matcher else None,
    )


def matcher_start(sequence: Sequence, *, may_draft: bool) -> MatcherStart | None:
    """Returns the data from which the last stage starts a matcher, or None if no matcher must be started."""
    if not sequence.lacks_matcher:
        return None
    sequence.matcher.is_started = True
    request, answer = sequence.request, tuple(sequence.tokens[sequence.prompt_length :])
    return MatcherStart(
        sequence.key,
        request.grammar,
        answer,
        request.reasoning,
        may_force=not request.with_logprobs,
        drafts_forced=may_draft and request.with_logprobs and request.max_drafted != 0,
        owner=hash(request.owner) & _OWNER_BITS,
    )

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llamaclust.cluster.scheduler.requests import (
    Failed,
    Finished,
    FinishReason,
    PromptEmbedded,
    PromptScored,
    TokenSampled,
    Update,
)
from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.core.sampler.results import RowResult

_PREFILL, _DECODE = Phase.PREFILL, Phase.DECODE


def answer(
    sequence: Sequence, taken: SequenceSlice, rows: tuple[RowResult, ...], embeddings: bytes, now_ns: int
) -> list[Update]:
    if embeddings:
        return _answer_embedded(sequence, taken, embeddings, now_ns)
    end, count = taken.end, len(rows) - taken.sampled
    scored, sampled = rows[:count], rows[count:]
    if sampled and sampled[0].is_deferred:
        _repeat(sequence, end - len(sampled))
        sampled = ()
        if not scored:
            return []
    sequence.drafting.mtp.is_awaited = False
    if sampled or not sequence.max_new_tokens:
        sequence.usage.answered(now_ns)
    for row in (*scored, *sampled[:1]):
        if row.failure is not None:
            _settle(sequence, taken, end - len(sampled), [])
            return [Failed(row.failure, row.is_request_fault)]
    sequence.failures = 0
    updates: list[Update] = []
    if scored:
        first = end - len(rows)
        sequence.outputs.answered = first + len(scored)
        updates.append(PromptScored(first + 1, scored))
    if sampled:
        for row in _take_sampled(sequence, taken, sampled):
            updates.append(TokenSampled(replace(row, drafted=()) if row.drafted else row))
        if sequence.drafting.has_mtp:
            _take_suggested(sequence, end - len(sampled), sampled)
    if (reason := sequence.finish_reason(bool(sampled))) is not None:
        updates.append(Finished(reason, sequence.timings()))
    return updates


def _answer_embedded(sequence: Sequence, taken: SequenceSlice, data: bytes, now_ns: int) -> list[Update]:
    sequence.usage.answered(now_ns)
    start, count = taken.chunk.position + taken.chunk.embedded[0], taken.chunk.embedded_rows
    if not np.isfinite(np.frombuffer(data, "<f4")).all():
        return [Failed(f"hidden states of tokens [{start}, {start + count}) are not finite numbers")]
    sequence.failures = 0
    sequence.outputs.answered = start + count
    updates: list[Update] = [PromptEmbedded(start, count, data)]
    if sequence.outputs.answered == sequence.outputs.end:
        updates.append(Finished(FinishReason.LENGTH, sequence.timings()))
    return updates


def _take_sampled(sequence: Sequence, taken: SequenceSlice, rows: tuple[RowResult, ...]) -> list[RowResult]:
    tokens, drafted = sequence.tokens, taken.chunk.tokens[len(taken.chunk.tokens) - len(rows) + 1 :]
    place = taken.end - len(rows)  # The position of the row's input token.
    added = _append(sequence, place, rows[0])
    for row, token in zip(rows[1:], drafted, strict=True):
        is_over = sequence.finish_reason(is_sampled=True) is not None or row.is_deferred or row.failure is not None
        if is_over or place + 1 >= len(tokens) or tokens[place + 1] != token:
            break
        place += 1
        added += _append(sequence, place, row)
    if taken.drafted:
        _settle(sequence, taken, place + 1, [row.token for row in added])
    if sequence.is_running:
        is_whole = sequence.scheduled >= len(tokens) - 1 or (taken.drafted and _is_refused(sequence, rows, added))
        sequence.phase = _DECODE if is_whole else _PREFILL
    return added


def _is_refused(sequence: Sequence, rows: tuple[RowResult, ...], added: list[RowResult]) -> bool:
    return sequence.kv.states.is_begun and (not added or any(row is added[-1] for row in rows))


def _append(sequence: Sequence, place: int, row: RowResult) -> list[RowResult]:
    """Appends the row's sampled and forced tokens, except those that the sequence already has."""
    rows = (row, *(RowResult(token, 0.0) for token in row.forced)) if row.forced else (row,)
    added: list[RowResult] = []
    for following in rows[len(sequence.tokens) - place - 1 :]:
        if added and sequence.finish_reason(is_sampled=True) is not None:
            break
        sequence.append(following)
        added.append(following)
        if following is not row or row.forced_draft:
            sequence.drafting.was_forced(sequence.generated + len(row.forced_draft))
    return added


def _settle(sequence: Sequence, taken: SequenceSlice, end: int, added: list[int]) -> None:
    """Counts drafted rows before position `end` as accepted, and schedules rejected rows again."""
    if not taken.drafted:
        return
    sequence.drafting.accepted += max(0, taken.drafted - (taken.end - end))
    if sequence.drafting.settle(added) and end == taken.end:
        return
    if end < taken.end or sequence.scheduled > taken.end:
        sequence.go_back(taken.chunk.position if sequence.kv.states.is_begun else end)
    sequence.drafting.give_up()


def _repeat(sequence: Sequence, row: int) -> None:
    sequence.go_back(row)
    sequence.drafting.give_up()
    if sequence.phase is _PREFILL:
        sequence.phase = _DECODE


def _take_suggested(sequence: Sequence, place: int, rows: tuple[RowResult, ...]) -> None:
    drafting = sequence.drafting
    for end, row in enumerate(rows, place + 2):
        if row.drafted and end == len(sequence.tokens) and drafting.drafts is not None and not drafting.forced:
            drafting.drafts.suggest(sequence.tokens, row.drafted)

"""Takes rows from a sequence and makes slices of them. Taken rows count as in flight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.rows.tasks import further_tasks, prompt_tasks, sample_task, window_tasks
from llamaclust.core.sampler.tasks import RowTask, SampleTask
from llamaclust.wire.microbatch.messages import Chunk

if TYPE_CHECKING:
    from llamaclust.cluster.scheduler.sequences import Sequence


def take_rows(sequence: Sequence, rows: int) -> SequenceSlice:
    start, end = sequence.scheduled, sequence.scheduled + rows
    tokens, first = tuple(sequence.tokens[start:end]), max(start, sequence.first_output)
    sequence.outputs.take(end)
    if sequence.request.embedded is not None:
        stop = min(end, sequence.outputs.end)
        return _slice(sequence, tokens, (), embedded=(first - start, stop - start) if first < stop else (0, 0))
    tasks = prompt_tasks(sequence, first, end)
    return _slice(sequence, tokens, tasks, sampled=bool(tasks) and isinstance(tasks[-1], SampleTask))


def take_token(sequence: Sequence) -> SequenceSlice:
    known, drafting = tuple(sequence.tokens[sequence.scheduled :]), sequence.drafting
    drafted = drafting.next
    if not drafted and (unknown := sequence.unknown_tokens):
        return _slice(sequence, (0,), (sample_task(sequence, unknown),), sequence.sampled_at, sampled=1)
    if not drafted:
        return _slice(sequence, known, (sample_task(sequence),), sampled=1)
    tasks = further_tasks(sequence, drafted) if sequence.unknown_tokens else window_tasks(sequence, drafted)
    return _slice(sequence, (*known, *drafting.take()), tasks, sampled=len(tasks), drafted=len(drafted))


def _slice(
    sequence: Sequence,
    tokens: tuple[int, ...],
    tasks: tuple[RowTask, ...],
    follows: tuple[int, int] | None = None,
    *,
    embedded: tuple[int, int] = (0, 0),
    sampled: int = 0,
    drafted: int = 0,
) -> SequenceSlice:
    kv, drafting, end = sequence.kv, sequence.drafting, sequence.scheduled + len(tokens)
    window, rest = kv.window, (embedded, sequence.request.adapters)
    start, states = window.start if window.blocks else 0, kv.states.of_chunk(sequence.scheduled, len(tokens))
    following = sequence.tokens[end] if drafting.has_mtp and end < len(sequence.tokens) else None
    head, checked = (following, drafting.mtp.take()), sequence.is_checked and sequence.failures > 0
    place = tokens, sequence.scheduled, kv.table.runs, len(tasks), follows
    images = None if sequence.images is None else sequence.images.rows_of(sequence.scheduled, len(tokens))
    chunk = Chunk(*place, window.runs, start, *rest, *states, *head, checked, images)
    sequence.scheduled = end
    sequence.in_flight += 1
    sequence.sampling += sampled > 0
    kind = drafting.drafts.kind if drafted and drafting.drafts is not None else ""
    return SequenceSlice(sequence, chunk, tasks, sampled, drafted, drafting.branch, kind)

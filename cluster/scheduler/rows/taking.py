"""The next rows of a sequence become a part of a microbatch: from then on they are under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.rows.tasks import further_tasks, prompt_tasks, sample_task, window_tasks
from llamaclust.core.sampling import RowTask
from llamaclust.wire.microbatch.messages import Chunk

if TYPE_CHECKING:
    from llamaclust.cluster.scheduler.sequences import Sequence


def take_rows(sequence: Sequence, rows: int) -> SequenceSlice:
    """The next rows of a prompt, or of tokens that are computed again, as a part of a microbatch."""
    start, end = sequence.scheduled, sequence.scheduled + rows
    if sequence.request.embedded is not None:
        return _take_embedded(sequence, start, end, sequence.request.embedded[1])
    tasks = prompt_tasks(sequence, max(start, sequence.first_output), end)
    if tasks:
        sequence.next_score = max(sequence.next_score, min(end, sequence.prompt_length - 1))
    return _slice(sequence, tuple(sequence.tokens[start:end]), tasks)


def _take_embedded(sequence: Sequence, start: int, end: int, embedded_end: int) -> SequenceSlice:
    first, stop = max(start, sequence.next_embedded), min(end, embedded_end)
    sequence.next_embedded = max(sequence.next_embedded, stop)
    embedded = (first - start, stop - start) if first < stop else (0, 0)
    return _slice(sequence, tuple(sequence.tokens[start:end]), (), embedded=embedded)


def take_token(sequence: Sequence) -> SequenceSlice:
    """The last token of one that awaits decode or may go ahead, as a part of a microbatch, and its drafted ones: behind
    that token, or behind others that are under way."""
    known, drafted = tuple(sequence.tokens[sequence.scheduled :]), sequence.drafted
    if not drafted and (unknown := sequence.unknown):
        return _slice(sequence, (0,), (sample_task(sequence, unknown),), sequence.sampled_at)
    if not drafted:
        return _slice(sequence, known, (sample_task(sequence),))
    tasks = further_tasks(sequence, drafted) if sequence.unknown else window_tasks(sequence, drafted)
    sequence.drafted_rows += len(drafted)
    sequence.drafted = ()
    sequence.ahead += drafted
    return _slice(sequence, (*known, *drafted), tasks, drafted=len(drafted))


def _slice(
    sequence: Sequence,
    tokens: tuple[int, ...],
    tasks: tuple[RowTask, ...],
    follows: tuple[int, int] | None = None,
    embedded: tuple[int, int] = (0, 0),
    drafted: int = 0,
) -> SequenceSlice:
    table, window, rest = sequence.table.runs, sequence.window, (embedded, sequence.request.adapters)
    start, states = window.start if window.blocks else 0, sequence.states.of_chunk(sequence.scheduled, len(tokens))
    end = sequence.scheduled + len(tokens)
    following = sequence.tokens[end] if sequence.has_mtp and end < len(sequence.tokens) else None
    head, checked = (following, sequence.mtp.take()), sequence.is_checked and sequence.failures > 0
    place = tokens, sequence.scheduled, table, len(tasks), follows
    chunk = Chunk(*place, window.runs, start, *rest, *states, *head, checked=checked)
    sequence.scheduled = end
    sequence.in_flight += 1
    kind = sequence.drafts.kind if drafted and sequence.drafts is not None else ""
    taken = SequenceSlice(sequence, chunk, tasks, drafted, sequence.branch, kind)
    sequence.sampling += taken.is_sampled
    return taken

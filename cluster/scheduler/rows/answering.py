"""Results of a sequence's rows. Most are of one row that chose a token, and these take a short way."""

from __future__ import annotations

from llamaclust.cluster.scheduler.requests import Finished, TokenSampled, Update
from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.core.sampling import RowResult, SampleTask

_PREFILL, _DECODE = Phase.PREFILL, Phase.DECODE


def answer(sequence: Sequence, taken: SequenceSlice, rows: tuple[RowResult, ...], now_ns: int) -> list[Update]:
    """Takes in the results of a part's output rows."""
    if not _is_plain(sequence, taken, rows):
        return sequence.answered(taken, rows, now_ns)
    sequence.first_ns = sequence.first_ns or now_ns
    sequence.last_ns = now_ns
    sequence.failures = 0
    sequence.append(rows[0])
    sequence.phase = _PREFILL if sequence.scheduled < len(sequence.tokens) - 1 else _DECODE
    updates: list[Update] = [TokenSampled(rows[0])]
    if (reason := sequence.finish_reason(is_sampled=True)) is not None:
        updates.append(Finished(reason, sequence.timings()))
    return updates


def _is_plain(sequence: Sequence, taken: SequenceSlice, rows: tuple[RowResult, ...]) -> bool:
    """Whether it is the next token of a sequence that runs, with nothing beside it to take in."""
    if len(rows) != 1 or taken.drafted or taken.end != len(sequence.tokens) or not sequence.is_running:
        return False
    (row,) = rows
    has_more = row.failure is not None or row.is_deferred or row.forced or row.forced_draft or row.drafted
    return not (has_more or sequence.mtp.is_awaited) and isinstance(taken.tasks[0], SampleTask)

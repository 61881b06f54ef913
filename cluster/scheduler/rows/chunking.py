"""How many prompt tokens go into one microbatch."""

from __future__ import annotations

from math import sqrt

from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.stage_times import StageCurves, StageTimes

_FIRST_ROWS = 64
"""Without measurements and decode: small enough for a slow machine, large enough not to matter on a fast one."""
_LEAST_ROWS = 16
_LEAST_ROWS_ALONE = 64
"""Without decode nothing waits for a chunk's end, and a slow machine reads the weights for 64 rows as for 16."""
_EFFICIENT = 4
"""Least ratio of the time for a chunk's rows to the fixed cost of a chunk."""
_SCORED_SHARE = 0.5
"""Of `prefill_ms`, for a microbatch with scored rows. The coordinator takes longer for those as well, and they come in
hundreds, each of which other streams would wait for."""

_EMBEDDED_BYTES = 1 << 20
"""A microbatch with decode rows gives at most so many bytes of hidden states."""


def chunk_rows(
    settings: SchedulerSettings, times: StageTimes, burst: int, left: int, decoding: int, *, alone: bool
) -> int:
    """Prefill rows of the next microbatch, which also has `decoding` rows; `burst` prompt tokens came together, `left`
    of them are still to be computed; `alone`: no sequence decodes, in other microbatches neither.

    A chunk takes the slowest stage `prefill_ms` at most, or 16 rows where they take longer, so that decode does not
    wait longer (`prefill_alone_ms` or 64 rows without decode); and no more than what finishes the burst soonest: k
    chunks on S stages end after (k + S - 1) * (a + b * burst / k), with stage time a + b * rows, which is least at
    burst / k = sqrt(burst * a / ((S - 1) * b)). The last chunks are smaller yet, half of what is left each: while later
    stages compute them, the first ones are idle.
    """
    most = settings.max_batch_tokens - decoding
    if settings.prefill_chunk is not None:
        return min(settings.prefill_chunk, most)
    slowest = _slowest(times.prefill)
    if slowest is None:
        return min(_FIRST_ROWS if alone else _LEAST_ROWS, most)
    fixed_ns, row_ns = slowest
    longest_ms, least = (settings.prefill_alone_ms, _LEAST_ROWS_ALONE) if alone else (settings.prefill_ms, _LEAST_ROWS)
    fit = (longest_ms * 1e6 - fixed_ns) / row_ns - decoding
    rows = min(most, max(fit, least))
    if times.stages > 1:
        soonest = sqrt(burst * max(fixed_ns, row_ns) / ((times.stages - 1) * row_ns))
        last = max(left / 2, _EFFICIENT * fixed_ns / row_ns)
        rows = min(rows, max(min(soonest, last), _LEAST_ROWS))
    return min(most, max(1, int(rows) // _LEAST_ROWS * _LEAST_ROWS))


def scored_rows(settings: SchedulerSettings, times: StageTimes, decoding: int) -> int:
    """Rows that are scored in one microbatch which also has `decoding` rows. On the last stage each of them costs a row
    of logits, which may be more than its layers."""
    slowest = _slowest(times.scoring)
    if slowest is None:
        return _LEAST_ROWS
    fixed_ns, row_ns = slowest
    fit = (_SCORED_SHARE * settings.prefill_ms * 1e6 - fixed_ns) / row_ns - decoding
    return max(int(fit) // _LEAST_ROWS, 1) * _LEAST_ROWS


def embedded_rows(settings: SchedulerSettings, *, is_beside_decode: bool) -> int:
    """Rows of one microbatch whose hidden states come back. Tokens of others wait on the link for these."""
    if not is_beside_decode or not settings.embedding_length:
        return settings.max_embedded_rows
    return min(settings.max_embedded_rows, max(1, _EMBEDDED_BYTES // (4 * settings.embedding_length)))


def _slowest(curves: StageCurves) -> tuple[float, float] | None:
    """(ns of a microbatch, ns of a row): a line through the slowest stage's times of small and large chunks."""
    small, large = curves.predict(_LEAST_ROWS), curves.predict(8 * _LEAST_ROWS)
    if small is None or large is None:
        return None
    stage = large.index(max(large))
    row_ns = max((large[stage] - small[stage]) / (7 * _LEAST_ROWS), 1.0)
    return max(small[stage] - row_ns * _LEAST_ROWS, 0.0), row_ns

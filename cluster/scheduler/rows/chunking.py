from __future__ import annotations

from math import sqrt

from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.stage_times import StageCurves, StageTimes

_FIRST_ROWS = 64
_LEAST_ROWS = 16
_LEAST_ROWS_ALONE = 64
"""Minimum number of rows in a chunk if no sequence decodes."""
_EFFICIENT = 4
_SCORED_SHARE = 0.5
"""Maximum share of `prefill_ms` for rows with prompt logprobs, which also take time in the coordinator."""

_EMBEDDED_BYTES = 1 << 20
"""Maximum bytes of hidden states in the result of a microbatch that has decode rows."""


def chunk_rows(
    settings: SchedulerSettings, times: StageTimes, burst: int, left: int, decoding: int, *, alone: bool
) -> int:
    """Returns the number of prefill rows in a microbatch with `decoding` other rows. `burst` is the number of prompt
    tokens that arrived together, and `left` is the number still to be computed. `alone` means that no sequence
    decodes."""
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
        # If a stage takes a + b * rows, k chunks on S stages take (k + S - 1) * (a + b * burst / k).
        soonest = sqrt(burst * max(fixed_ns, row_ns) / ((times.stages - 1) * row_ns))
        last = max(left / 2, _EFFICIENT * fixed_ns / row_ns)
        rows = min(rows, max(min(soonest, last), _LEAST_ROWS))
    return min(most, max(1, int(rows) // _LEAST_ROWS * _LEAST_ROWS))


def scored_rows(settings: SchedulerSettings, times: StageTimes, decoding: int) -> int:
    slowest = _slowest(times.scoring)
    if slowest is None:
        return _LEAST_ROWS
    fixed_ns, row_ns = slowest
    fit = (_SCORED_SHARE * settings.prefill_ms * 1e6 - fixed_ns) / row_ns - decoding
    return max(int(fit) // _LEAST_ROWS, 1) * _LEAST_ROWS


def embedded_rows(settings: SchedulerSettings, *, is_beside_decode: bool) -> int:
    if not is_beside_decode or not settings.embedding_length:
        return settings.max_embedded_rows
    return min(settings.max_embedded_rows, max(1, _EMBEDDED_BYTES // (4 * settings.embedding_length)))


def _slowest(curves: StageCurves) -> tuple[float, float] | None:
    """Returns (ns per microbatch, ns per row) for the slowest stage, from the predicted times of two chunk sizes."""
    small, large = curves.predict(_LEAST_ROWS), curves.predict(8 * _LEAST_ROWS)
    if small is None or large is None:
        return None
    stage = large.index(max(large))
    row_ns = max((large[stage] - small[stage]) / (7 * _LEAST_ROWS), 1.0)
    return max(small[stage] - row_ns * _LEAST_ROWS, 0.0), row_ns

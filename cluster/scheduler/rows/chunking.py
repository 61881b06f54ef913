"""Chooses the number of prompt tokens in one microbatch."""

from __future__ import annotations

from math import sqrt

from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.stage_times import StageCurves, StageTimes

_FIRST_ROWS = 64
"""The rows of the first chunk without decode: few enough for a slow machine, and efficient on a fast one."""
_LEAST_ROWS = 16
_LEAST_ROWS_ALONE = 64
"""The fewest rows of a chunk without decode. A slow machine reads the weights once for 64 rows as it does for 16."""
_EFFICIENT = 4
_SCORED_SHARE = 0.5
"""The share of `prefill_ms` that scored rows may take. They cost the coordinator time too, and come in hundreds."""

_EMBEDDED_BYTES = 1 << 20
"""The most bytes of hidden states that a microbatch with decode rows returns."""


def chunk_rows(
    settings: SchedulerSettings, times: StageTimes, burst: int, left: int, decoding: int, *, alone: bool
) -> int:
    """Returns the number of prefill rows in a microbatch with `decoding` other rows. Of `burst` prompt tokens that came
    together, `left` are still to be computed. `alone` means that no sequence decodes.

    A chunk takes the slowest stage at most `prefill_ms`, so that decode does not wait longer, but may have 16 rows in
    any case (without decode `prefill_alone_ms` and 64 rows). It is no larger than what finishes the burst soonest: k
    chunks on S stages end after (k + S - 1) * (a + b * burst / k), with the stage time a + b * rows. This is least at
    burst / k = sqrt(burst * a / ((S - 1) * b)). The last chunks get half of `left` each: the first stages idle while
    later ones compute."""
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
    """Returns the most scored rows of a microbatch. The last stage's logits may take longer than its layers."""
    slowest = _slowest(times.scoring)
    if slowest is None:
        return _LEAST_ROWS
    fixed_ns, row_ns = slowest
    fit = (_SCORED_SHARE * settings.prefill_ms * 1e6 - fixed_ns) / row_ns - decoding
    return max(int(fit) // _LEAST_ROWS, 1) * _LEAST_ROWS


def embedded_rows(settings: SchedulerSettings, *, is_beside_decode: bool) -> int:
    """Returns the most rows whose hidden states may be returned, which delays the tokens of other sequences."""
    if not is_beside_decode or not settings.embedding_length:
        return settings.max_embedded_rows
    return min(settings.max_embedded_rows, max(1, _EMBEDDED_BYTES // (4 * settings.embedding_length)))


def _slowest(curves: StageCurves) -> tuple[float, float] | None:
    """Returns (fixed ns of a microbatch, ns of a row) of the slowest stage, by a line through two chunks' times."""
    small, large = curves.predict(_LEAST_ROWS), curves.predict(8 * _LEAST_ROWS)
    if small is None or large is None:
        return None
    stage = large.index(max(large))
    row_ns = max((large[stage] - small[stage]) / (7 * _LEAST_ROWS), 1.0)
    return max(small[stage] - row_ns * _LEAST_ROWS, 0.0), row_ns

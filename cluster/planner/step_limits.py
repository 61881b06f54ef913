"""How long a worker may compute one step before it counts as hung. Pure."""

from __future__ import annotations

from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.scheduler.scheduler import Scheduler

_LEAST_S = 4.0
"""With the interval of heartbeats, five seconds."""
_TIMES_PREDICTED = 10.0
_UNPREDICTED_S = 30.0
_RULE = f"{_TIMES_PREDICTED:g} times its predicted time, at least {_LEAST_S:g} s"


def hang_text(scheduler: Scheduler, plan: Plan, stage: int | None, computing_s: float) -> str | None:
    """Of a worker whose step takes much longer than predicted, although its heartbeats come; None of others."""
    limit_s = step_limit_s(scheduler, plan, stage)
    if computing_s <= limit_s:
        return None
    return f"it hangs: a step has been computed for {computing_s:.1f} s, longer than {limit_s:.3g} s ({_RULE})"


def step_limit_s(scheduler: Scheduler, plan: Plan, stage: int | None) -> float:
    """Ten times the predicted time of the longest microbatch in flight on a stage of the plan. None: of a worker that
    has no stage."""
    rows = scheduler.in_flight.most_rows
    if stage is None or rows == 0:
        return _UNPREDICTED_S
    predicted_s = [ns[stage] / 1e9 for ns in scheduler.times.predictions(rows)]
    if plan.prediction is not None:
        planned = plan.prediction.stages[stage]
        predicted_s.append(max(planned.decode_s, rows * planned.prefill_s))
    return max(_LEAST_S, _TIMES_PREDICTED * max(predicted_s)) if predicted_s else _UNPREDICTED_S

"""How long a step may take: by what was predicted or measured, for the microbatches in flight."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.cluster.control.pool.membership_watch import stage_limit_s
from llamaclust.cluster.planner.plan import Plan, Prediction, StagePrediction
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampling import RowResult
from llamaclust.wire.microbatch.messages import Result, StageTiming

SETTINGS = SchedulerSettings("m", 100, context_length=200, kv_blocks=40, max_sequences=6, prefill_chunk=50)
UNMEASURED = Plan((), 40, 200, (), None)
STAGES = (StagePrediction(0.001, 0.002), StagePrediction(0.1, 0.04))
MEASURED = replace(UNMEASURED, prediction=Prediction(STAGES, 0, 0, 0, 0, "b"))


def test_a_step_may_take_ten_times_its_prediction_and_not_less_than_four_seconds() -> None:
    scheduler = Scheduler(SETTINGS, 1, 2)
    assert [stage_limit_s(scheduler, plan, 1) for plan in (UNMEASURED, MEASURED)] == [30.0] * 2, "nothing is in flight"
    scheduler.add(GenerationRequest("r", tuple(range(50)), 5), 0)
    assert scheduler.next_microbatch(0) is not None
    assert stage_limit_s(scheduler, UNMEASURED, 1) == 30.0
    assert [stage_limit_s(scheduler, MEASURED, stage) for stage in (0, 1)] == [4.0, 20.0], "50 rows"
    timings = tuple(StageTiming(0, seconds * 10**9, 0, 50) for seconds in (3, 1))
    scheduler.complete(Result(1, 0, (RowResult(5, -1.0),), timings), 10**9)
    assert scheduler.next_microbatch(0) is not None
    measured = [stage_limit_s(scheduler, UNMEASURED, stage) for stage in (0, 1)]
    assert 4.0 < measured[0] < 30.0 and measured[1] == 4.0, "one row"

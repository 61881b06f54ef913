"""Tests how long a step may take, by what was predicted or measured, for the microbatches in flight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control.pool.membership_watch import MembershipWatch, stage_limit_s
from llamaclust.cluster.planner.context import ContextBounds, ContextChoice
from llamaclust.cluster.planner.links import UNKNOWN
from llamaclust.cluster.planner.plan import Plan, Prediction, StagePlan, StagePrediction
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampler.results import RowResult
from llamaclust.wire.control.messages import StageProgress
from llamaclust.wire.microbatch.messages import Result, StageTiming

SETTINGS = SchedulerSettings("m", 100, context_length=200, kv_blocks=40, max_sequences=6, prefill_chunk=50)
SIZES: dict[str, Any] = dict.fromkeys(
    ("weight_bytes", "touched_bytes", "kv_bytes", "workspace_bytes", "memory_bytes"), 1
)
HELD = tuple(StagePlan(worker=name, start=start, end=start + 1, **SIZES) for start, name in enumerate("ab"))
UNMEASURED = Plan(HELD, 40, ContextChoice(200, ContextBounds.fixed(200)), (), None)
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


@dataclass(eq=False)
class Held:
    """A worker that sends heartbeats but no results."""

    name: str
    received: int = 0
    loss: str | None = None
    heartbeat: None = None

    def progress(self, epoch: int) -> StageProgress:
        return StageProgress(epoch, self.received)


def scheduler_of(epoch: int, *, is_busy: bool) -> Scheduler:
    scheduler = Scheduler(SETTINGS, epoch, 2)
    if is_busy:
        scheduler.add(GenerationRequest("r", (5, 6), 5), 0)
        assert scheduler.next_microbatch(0) is not None
    return scheduler


def runner_of(*held: tuple[Scheduler, list[Held]]) -> Any:
    """Returns the parts of a model's runner that the watch reads; they have these epochs."""

    def epoch_of(number: int, workers: list[Held]) -> Any:
        stage_of: Callable[[Held], int | None] = lambda worker: workers.index(worker) if worker in workers else None  # noqa: E731
        return SimpleNamespace(number=number, workers=workers, chain=workers, plan=MEASURED, stage_of=stage_of)

    schedulers = tuple(scheduler for scheduler, _ in held)
    model = SimpleNamespace(hyperparameters=SimpleNamespace(embedding_length=4))
    return SimpleNamespace(
        engine=SimpleNamespace(is_running=True, schedulers=schedulers),
        open_epochs=[epoch_of(scheduler.in_flight.epoch, workers) for scheduler, workers in held],
        planner=SimpleNamespace(links=UNKNOWN, model=model),
    )


A, B, C = Held("a", received=1), Held("b"), Held("c")
BUSY, IDLE, OTHER = ([A, B], True), ([A, B], False), ([C, B], True)


@pytest.mark.parametrize(
    ("models", "looks"),
    [
        ([[BUSY]], 5),
        ([[BUSY, IDLE]], 5),
        ([[BUSY], [IDLE]], 5),
        ([[BUSY, IDLE], [IDLE]], 5),
        ([[BUSY, OTHER]], 5),
        ([[BUSY, BUSY]], 9),
        ([[BUSY], [BUSY]], 9),
        ([[BUSY, IDLE], [BUSY]], 9),
    ],
)
def test_silence_is_a_loss_after_the_steps_that_its_worker_has_to_compute(
    models: list[list[tuple[list[Held], bool]]], looks: int
) -> None:
    """The watch looks once a second; an epoch with nothing in flight has no steps to compute."""
    numbers, lost = count(1), list[Held]()
    runners = [
        runner_of(*((scheduler_of(next(numbers), is_busy=is_busy), workers) for workers, is_busy in epochs))
        for epochs in models
    ]
    registry: Any = SimpleNamespace(mark_lost=lambda worker, reason: lost.append(worker))
    nothing: Any = None
    watch = MembershipWatch(registry, nothing, runners, nothing, nothing, nothing, nothing)
    for look in range(100):
        watch._check_result(runners[0], runners[0].open_epochs[0], 0, 2, float(look))
        if lost:
            break
    assert lost == [A] and look == looks

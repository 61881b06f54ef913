"""Tests which action follows from observations, with a table of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.cluster_state import Expulsion
from llamaclust.cluster.control.observations import Observation, Suspect
from llamaclust.cluster.control.reconcile import (
    Abort,
    Action,
    ClosePipeline,
    Expel,
    FailRequests,
    FreeRetired,
    Interrupt,
    LoadEpoch,
    MakePlan,
    Notify,
    Serve,
    Wait,
)
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import (
    DeadlineError,
    InsufficientMemoryError,
    ModelFileError,
    NetworkPartitionError,
    ProtocolError,
    StalledError,
    WorkerError,
)
from support.plans.observed_cluster import (
    ALL,
    BOTH,
    BROKEN,
    IDLE,
    ONLY_A,
    ONLY_B,
    RECOVERY_S,
    START_S,
    Cluster,
    fault_of,
    plan_of,
)

AB = frozenset("ab")
MEMORY = InsufficientMemoryError("12 MiB are missing")
LOST = WorkerError("worker b is lost")
FAILED = WorkerError("layers do not load")
FILE = ModelFileError("no such file")


STEPS: list[tuple[str, Sequence[Observation], Action | type[Action] | None]] = [
    ("nothing has changed", [], IDLE),
    ("an action runs", [], None),
    ("a worker joins", [observations.WorkerSeen("c", 3)], MakePlan),
    ("a worker is lost", [observations.WorkerLost("b")], MakePlan),
    ("a worker joins again", [observations.WorkerLost("b"), observations.WorkerSeen("b", 4)], MakePlan),
    ("links changed", [observations.Signal.LINKS_CHANGED], MakePlan),
    ("a partition", [observations.PartitionsChanged(frozenset({AB}))], MakePlan),
    ("a drain", [observations.DrainRequested("b")], MakePlan),
    ("a drain taken back", [observations.DrainRequested("b"), observations.UndrainRequested("b")], IDLE),
    ("the pipeline is lost", [observations.PipelineLost(BROKEN)], ClosePipeline()),
    (
        "it is lost and closed",
        [observations.PipelineLost(BROKEN), observations.Signal.PIPELINE_CLOSED],
        LoadEpoch(BOTH, is_exclusive=True),
    ),
]


@pytest.mark.parametrize(("what", "events", "expected"), STEPS, ids=[step[0] for step in STEPS])
def test_each_observation_of_a_serving_cluster(
    what: str, events: Sequence[Observation], expected: Action | type[Action] | None
) -> None:
    cluster = Cluster.serving()
    if what == "an action runs":
        cluster.state = replace(cluster.state, is_acting=True)
    action = cluster.see(*events)
    if expected is MakePlan:
        assert action == MakePlan(cluster.state.inputs)
    else:
        assert action == expected


def test_a_start_plans_loads_and_serves() -> None:
    cluster = Cluster.starting()
    cluster.see(observations.WorkerSeen("a", 1))
    assert cluster.see(observations.WorkerSeen("b", 2)) == MakePlan(cluster.state.inputs)
    assert cluster.plan(BOTH) == LoadEpoch(BOTH, is_exclusive=True)
    assert cluster.see(observations.Signal.EPOCH_LOADED) == Serve()
    assert cluster.see(observations.Signal.EPOCH_SERVING) == IDLE
    assert cluster.state.serving is not None and cluster.state.serving.workers == (("a", 1), ("b", 2))


def test_a_start_ends_with_an_error_that_no_other_worker_can_help() -> None:
    cluster = Cluster.starting()
    cluster.see(observations.WorkerSeen("a", 1), observations.WorkerSeen("b", 2))
    assert cluster.plan(MEMORY) == Abort(MEMORY)
    cluster.plan(BOTH)
    assert cluster.load_failed(FAILED, Suspect("a", FAILED)) == Abort(FAILED)


def test_a_start_waits_for_missing_workers_and_links() -> None:
    for error in (MEMORY, NetworkPartitionError("a and b cannot reach each other")):
        cluster = Cluster.starting()
        cluster.see(observations.WorkerSeen("a", 1))
        if error is not MEMORY:
            cluster.see(observations.WorkerSeen("b", 2))
        action = cluster.plan(error)
        assert isinstance(action, Notify) and f"the start waits 600 s at most: {error}" in action.text
        assert cluster.notified(action) == Wait(START_S)
        assert cluster.at(START_S) == Abort(error)


def test_a_worker_that_joins_while_a_load_fails_may_be_what_was_missing() -> None:
    cluster = Cluster.starting()
    cluster.see(observations.WorkerSeen("a", 1))
    cluster.plan(ONLY_A)
    assert cluster.see(observations.WorkerSeen("b", 2)) == MakePlan(cluster.state.inputs)
    assert cluster.load_failed(FILE, Suspect("a", FILE)) == MakePlan(cluster.state.inputs)
    assert cluster.plan(BOTH) == LoadEpoch(BOTH, is_exclusive=True)


def test_a_change_while_a_plan_is_made_makes_another_one_due() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.WorkerSeen("c", 3))
    made_for = cluster.state.inputs
    cluster.see(observations.WorkerLost("c"))
    assert cluster.see(observations.Planned(made_for, plan_of("a", "b", "c"))) == MakePlan(cluster.state.inputs)
    assert cluster.plan(BOTH) == IDLE


def test_requests_wait_for_workers_until_the_recovery_timeout() -> None:
    cluster = Cluster.serving()
    cluster.at(10.0)
    cluster.see(observations.WorkerLost("b"))
    cluster.lose_pipeline()
    action = cluster.plan(MEMORY)
    assert action == Notify("waiting for worker b; requests wait 120 s at most: 12 MiB are missing")
    assert cluster.notified(action) == Wait(10.0 + RECOVERY_S)
    late = "no worker came back within 120 s (timeouts.recovery): 12 MiB are missing"
    assert cluster.at(10.0 + RECOVERY_S) == FailRequests(late)
    assert cluster.see(observations.RequestsFailed(late)) == Wait(None)
    assert cluster.see(observations.WorkerSeen("b", 2)) == MakePlan(cluster.state.inputs)
    assert cluster.plan(BOTH) == LoadEpoch(BOTH, is_exclusive=True)


def test_all_absent_workers_are_named() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.WorkerLost("b"), observations.WorkerLost("a"))
    cluster.lose_pipeline()
    assert cluster.plan(LOST) == Notify(f"waiting for workers a, b; requests wait 120 s at most: {LOST}")


def test_the_same_reason_is_noticed_once() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.WorkerLost("b"))
    cluster.lose_pipeline()
    assert isinstance(cluster.notified(cluster.plan(MEMORY)), Wait)
    cluster.see(observations.Signal.LINKS_CHANGED)
    assert isinstance(cluster.plan(MEMORY), Wait)


def test_loads_that_fail_are_repeated_after_growing_pauses() -> None:
    cluster, pauses = Cluster.serving(), []
    cluster.lose_pipeline()
    for _ in range(8):
        action = cluster.load_failed(FAILED)
        assert isinstance(action, Wait) and action.until_s is not None
        pauses.append(round(action.until_s - cluster.state.tick.now_s, 3))
        assert cluster.at(action.until_s) == LoadEpoch(BOTH, is_exclusive=True)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    late = "no plan could be loaded within 120 s (timeouts.recovery): layers do not load"
    assert cluster.at(RECOVERY_S) == FailRequests(late)
    assert cluster.see(observations.RequestsFailed(late)) == LoadEpoch(BOTH, is_exclusive=True)


@pytest.mark.parametrize("error", [FAILED, DeadlineError("no answer")], ids=["fails", "does not answer"])
def test_workers_that_do_not_load_are_expelled(error: WorkerError) -> None:
    """A worker without an answer is expelled at once, another after three failures; then plans exclude it for a
    time."""
    cluster = Cluster.serving()
    cluster.lose_pipeline()
    for _ in range(2 if error is FAILED else 0):
        assert isinstance(cluster.load_failed(error, Suspect("b", error)), Wait)
    action = cluster.load_failed(error, Suspect("b", error))
    assert isinstance(action, Expel)
    (expulsion,) = action.expulsions
    assert expulsion.worker == ("b", 2) and expulsion.reason == f"it could not load a new epoch: {error}"
    cluster.see(observations.WorkerLost("b"), observations.Signal.WORKERS_EXPELLED)
    cluster.see(observations.WorkerSeen("b", 2))
    assert cluster.state.inputs.quarantined == {"b"}
    cluster.at(10.0)
    assert cluster.state.inputs.quarantined == frozenset()


@pytest.mark.parametrize("is_start", [True, False])
def test_a_worker_with_less_memory_than_reported_is_planned_anew_and_not_expelled(is_start: bool) -> None:
    cluster = Cluster.starting() if is_start else Cluster.serving()
    if is_start:
        cluster.see(observations.WorkerSeen("a", 1), observations.WorkerSeen("b", 2))
    else:
        cluster.lose_pipeline()
    for _ in range(2):
        cluster.plan(BOTH)
        assert cluster.load_failed(MEMORY, Suspect("b", MEMORY)) == MakePlan(cluster.state.inputs)
    assert isinstance(cluster.plan(BOTH), Wait), "a pause between two loads"
    assert cluster.at(1.0) == LoadEpoch(BOTH, is_exclusive=True)
    cluster.load_failed(MEMORY, Suspect("b", MEMORY))
    assert cluster.state.inputs.quarantined == frozenset() and not cluster.state.expulsions
    assert cluster.plan(BOTH) == Abort(MEMORY) if is_start else isinstance(cluster.plan(BOTH), Wait)


def test_a_worker_whose_loads_always_lack_memory_is_excluded_for_a_time() -> None:
    """Its reports show enough memory, so the same plan is made again. The other worker suffices."""
    cluster = Cluster.serving()
    action = cluster.lose_pipeline()
    for _ in range(5):
        action = cluster.at(action.until_s) if isinstance(action, Wait) and action.until_s else action
        assert action == LoadEpoch(BOTH, is_exclusive=True)
        assert cluster.load_failed(MEMORY, Suspect("b", MEMORY)) == MakePlan(cluster.state.inputs)
        action = cluster.plan(BOTH)
    expected = Expulsion(("b", 2), f"it could not load a new epoch: {MEMORY}", stays=True, pause_s=10.0)
    assert cluster.load_failed(MEMORY, Suspect("b", MEMORY)) == Expel((expected,))
    cluster.see(observations.Signal.WORKERS_EXPELLED)
    assert cluster.state.inputs.quarantined == {"b"}
    cluster.plan(BOTH)
    cluster.load_failed(MEMORY, Suspect("b", MEMORY))
    assert not cluster.state.expulsions, "plans use it as long as the others do not suffice"
    cluster.plan(ONLY_A)
    assert cluster.at(9.0) == LoadEpoch(ONLY_A, is_exclusive=True)


def test_a_worker_that_hangs_is_expelled_and_the_others_load_at_once() -> None:
    hangs = StalledError("worker b made no progress")
    for is_exclusive in (True, False):
        cluster = Cluster.serving()
        if is_exclusive:
            cluster.lose_pipeline()
        action = cluster.load_failed(FAILED, Suspect("b", hangs), is_exclusive=is_exclusive)
        assert isinstance(action, Expel) and action.expulsions[0].reason == "it hangs: worker b made no progress"
        assert isinstance(cluster.see(observations.WorkerLost("b"), observations.Signal.WORKERS_EXPELLED), MakePlan)


def test_workers_without_the_file_wait_for_one_that_has_it() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.WorkerLost("a"))
    cluster.lose_pipeline()
    cluster.plan(ONLY_B)
    action = cluster.see(observations.EpochLoadFailed(FILE, True, (Suspect("b", FILE),), file_is_absent=True))
    assert isinstance(cluster.notified(action), Wait)
    cluster.see(observations.WorkerSeen("a", 1))
    assert cluster.plan(BOTH) == LoadEpoch(BOTH, is_exclusive=True)


def test_the_loss_of_the_last_holder_is_the_reason_to_wait() -> None:
    cluster = Cluster.serving()
    cluster.lose_pipeline()
    cluster.plan(ONLY_B)
    cluster.see(observations.WorkerLost("a"))
    action = cluster.see(observations.EpochLoadFailed(FILE, True, (Suspect("b", FILE),), file_is_absent=True))
    assert action == Notify("waiting for worker a; requests wait 120 s at most: no such file")
    assert isinstance(cluster.notified(action), Wait)


def test_a_worker_that_breaks_the_protocol_is_expelled() -> None:
    cluster = Cluster.serving()
    damaged = fault_of("b", "a damaged result", ProtocolError)
    action = cluster.lose_pipeline(damaged)
    assert action == Expel((Expulsion(("b", 2), "a damaged result"),))
    other = Cluster.serving()
    other.see(observations.WorkerLost("a"))
    assert isinstance(other.lose_pipeline(damaged), MakePlan), "the loss is the cause"
    assert not other.state.pool.quarantine.records


def test_failures_one_after_the_other_end_no_request() -> None:
    cluster = Cluster.serving()
    for _ in range(6):
        assert cluster.lose_pipeline() == LoadEpoch(BOTH, is_exclusive=True)
        cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)


def moving(better: Plan) -> Cluster:
    """Returns a cluster that a third worker joined, and whose better plan serves beside the former one."""
    cluster = Cluster.serving()
    cluster.see(observations.WorkerSeen("c", 3))
    assert cluster.plan(better) == LoadEpoch(better, is_exclusive=False)
    assert cluster.see(observations.Signal.EPOCH_LOADED) == Serve()
    assert cluster.see(observations.Signal.EPOCH_SERVING) == Wait(None), "requests run on the old epoch"
    return cluster


def test_a_better_plan_is_adopted_at_once_and_the_old_epoch_freed_when_it_is_empty() -> None:
    cluster = moving(ALL)
    assert cluster.see(observations.Signal.RETIRING_EMPTY) == FreeRetired()
    assert cluster.see(observations.Signal.RETIRING_FREED) == IDLE


def test_a_second_move_waits_for_the_end_of_the_first() -> None:
    cluster = moving(ALL)
    cluster.see(observations.DrainRequested("b"))
    without_b = plan_of("a", "c")
    assert cluster.plan(without_b) == Wait(None)
    assert cluster.see(observations.Signal.RETIRING_EMPTY) == FreeRetired()
    assert cluster.see(observations.Signal.RETIRING_FREED) == LoadEpoch(without_b, is_exclusive=False)


def test_a_worker_is_freed_when_the_epoch_that_retires_has_no_stage_of_it() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.DrainRequested("b"))
    assert cluster.plan(ONLY_A) == LoadEpoch(ONLY_A, is_exclusive=False)
    assert cluster.see(observations.Signal.EPOCH_LOADED) == Serve()
    assert cluster.see(observations.Signal.EPOCH_SERVING) == Wait(None)
    assert not cluster.state.is_freed("b"), "its requests run"
    cluster.see(observations.Signal.RETIRING_EMPTY, observations.Signal.RETIRING_FREED)
    assert cluster.state.is_freed("b")


def test_a_loss_closes_the_epoch_that_retires_as_well() -> None:
    cluster = moving(ALL)
    assert cluster.see(observations.PipelineLost(BROKEN), observations.Signal.RETIRING_EMPTY) == ClosePipeline()
    assert cluster.see(observations.Signal.PIPELINE_CLOSED) == LoadEpoch(ALL, is_exclusive=True)
    cluster.see(observations.Signal.RETIRING_EMPTY)
    assert cluster.state.retiring is None
    cluster.see(observations.Signal.EPOCH_LOADED)
    assert cluster.see(observations.Signal.EPOCH_SERVING) == IDLE, "after a loss nothing retires"


def test_a_drain_that_does_not_fit_beside_the_old_layers_interrupts_the_pipeline() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.DrainRequested("b"))
    cluster.plan(ONLY_A)
    assert cluster.load_failed(MEMORY, is_exclusive=False) == Interrupt(MEMORY)
    assert cluster.lose_pipeline(WorkerError(str(MEMORY))) == LoadEpoch(ONLY_A, is_exclusive=True)


def test_a_move_that_fails_is_noticed_once_and_not_repeated() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.WorkerSeen("c", 3))
    cluster.plan(plan_of("a", "b", "c"))
    action = cluster.load_failed(FAILED, is_exclusive=False)
    assert action == Notify("layers stay where they are: layers do not load")
    assert cluster.notified(action) == IDLE
    cluster.see(observations.WorkerLost("c"))
    assert cluster.plan(BOTH) == IDLE


def test_a_drain_without_a_plan_is_noticed_and_settled() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.DrainRequested("b"))
    action = cluster.plan(MEMORY)
    assert action == Notify("layers cannot be moved now: 12 MiB are missing")
    assert cluster.notified(action) == IDLE


def test_a_loss_during_a_move_is_recovered_by_the_move() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.WorkerSeen("c", 3))
    cluster.plan(plan_of("a", "b", "c"))
    cluster.see(observations.PipelineLost(LOST))
    assert cluster.see(observations.Signal.EPOCH_LOADED) == Serve()
    assert cluster.see(observations.Signal.EPOCH_SERVING) == IDLE and cluster.state.loss is None


def test_a_plan_with_images_is_worth_a_move_and_one_without_is_none() -> None:
    reading = replace(BOTH, stages=(replace(BOTH.stages[0], encoder_bytes=1), *BOTH.stages[1:]))
    cluster = Cluster.serving()
    cluster.see(observations.Signal.LINKS_CHANGED)
    assert cluster.plan(reading) == LoadEpoch(reading, is_exclusive=False)
    cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING, observations.Signal.RETIRING_FREED)
    assert cluster.state.reads_images
    cluster.see(observations.Signal.LINKS_CHANGED)
    faster = replace(ALL, no_images="no room")
    assert cluster.plan(faster) == IDLE
    cluster.see(observations.DrainRequested("b"))
    assert cluster.plan(replace(ONLY_A, no_images="no room")) != IDLE, "the worker must go"

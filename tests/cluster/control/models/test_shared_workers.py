"""Tests one of several models on the same workers: its actions do not affect the other models."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod

import pytest

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.cluster_state import ClusterState, Expulsion, PipelineLoss, Waits
from llamaclust.cluster.control.epochs import StageLoadError, load_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.observations import Observation, Suspect
from llamaclust.cluster.control.reconcile import Action, Expel, LoadEpoch, MakePlan, Notify, Wait, reconcile
from llamaclust.cluster.control.state_changes import observe
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import DeadlineError, InsufficientMemoryError, LlamaclustError, StalledError, WorkerError
from llamaclust.wire.control.messages import CoordinatorMessage, Loaded, Unload, Unloaded
from llamaclust.wire.control.weights import FindWeights, WeightsFound
from llamaclust.wire.security.credentials import Insecure
from support.plans.plan_inputs import REQUEST, SMALL, worker
from support.wire.control_messages import LOAD, REGISTER
from support.wire.worker_handles import handle_of

FAILED = WorkerError("layers do not load")


def plan_of(*names: str) -> Plan:
    return make_plan(SMALL, [worker(name) for name in names], replace(REQUEST, objective="throughput"))


BOTH, ONLY_A = plan_of("a", "b"), plan_of("a")


def after(state: ClusterState, *events: Observation) -> ClusterState:
    for observation in events:
        state = observe(state, observation)
    return state


def planned(state: ClusterState, plan: Plan) -> ClusterState:
    return after(state, observations.Planned(state.inputs, plan))


def serving() -> ClusterState:
    """Returns the state of one of several models, on the workers a and b."""
    state = ClusterState(Waits(120.0, 600.0), 2, observations.Tick(0.0), PipelineLoss(0.0), is_alone=False)
    state = planned(after(state, observations.WorkerSeen("a", 1), observations.WorkerSeen("b", 2)), BOTH)
    return after(state, observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)


def lost() -> ClusterState:
    return after(
        serving(), observations.PipelineLost(WorkerError("the pipeline broke")), observations.Signal.PIPELINE_CLOSED
    )


def failed(state: ClusterState, error: LlamaclustError, *, is_exclusive: bool = True) -> ClusterState:
    """Returns the state after a load that worker b failed."""
    return after(state, observations.EpochLoadFailed(error, is_exclusive, (Suspect("b", error),)))


def stays(action: Action | None) -> bool:
    """Returns whether worker b is to free this model's layers and remain for other models."""
    assert isinstance(action, Expel)
    (expulsion,) = action.expulsions
    return expulsion.worker == ("b", 2) and expulsion.stays


def test_plans_do_without_a_worker_that_fails_again_and_again_and_it_stays_for_other_models() -> None:
    state = lost()
    for _ in range(2):
        state = failed(state, FAILED)
        assert isinstance(reconcile(state), Wait) and not state.inputs.quarantined
    state = failed(state, FAILED)
    assert stays(reconcile(state))
    state = after(state, observations.Signal.WORKERS_EXPELLED)
    assert state.inputs.quarantined == {"b"} and state.inputs.workers == (("a", 1), ("b", 2))
    assert reconcile(state) == MakePlan(state.inputs)
    state = after(planned(state, ONLY_A), observations.Tick(1.0))
    assert reconcile(state) == LoadEpoch(ONLY_A, is_exclusive=True)


def test_where_the_others_do_not_suffice_such_a_worker_is_noticed_once_in_its_quarantine() -> None:
    state = lost()
    for _ in range(3):
        state = failed(state, FAILED)
    state = failed(planned(after(state, observations.Signal.WORKERS_EXPELLED), BOTH), FAILED)
    assert isinstance(reconcile(state), Wait)
    state = failed(after(state, observations.Tick(10.0)), FAILED)
    assert stays(reconcile(state)), "its quarantine was over"


@pytest.mark.parametrize("is_exclusive", [True, False], ids=["recovery", "move"])
def test_a_worker_that_gave_up_a_load_stays_for_other_models(is_exclusive: bool) -> None:
    late = DeadlineError("worker b made no progress")
    state = failed(lost() if is_exclusive else serving(), late, is_exclusive=is_exclusive)
    assert stays(reconcile(state))
    state = after(state, observations.Signal.WORKERS_EXPELLED)
    assert reconcile(state) == MakePlan(state.inputs) and state.inputs.quarantined == {"b"}


def test_a_worker_that_does_not_even_give_up_is_expelled() -> None:
    hangs = StalledError("worker b made no progress")
    assert reconcile(failed(lost(), hangs)) == Expel((Expulsion(("b", 2), f"it hangs: {hangs}"),))


def test_the_wait_for_the_memory_of_other_models_is_no_part_of_a_recovery() -> None:
    state = after(
        serving(),
        observations.Tick(10.0),
        observations.WorkerLost("b"),
        observations.PipelineLost(WorkerError("b is lost")),
    )
    state = after(state, observations.Signal.PIPELINE_CLOSED)
    short = InsufficientMemoryError("12 MiB are missing")
    state = after(state, observations.Planned(state.inputs, error=short, is_beside=True))
    action = reconcile(state)
    assert isinstance(action, Notify)
    state = after(state, observations.Noticed(action.text))
    assert reconcile(state) == Wait(None)
    state = after(state, observations.Tick(250.0))
    assert reconcile(state) == Wait(None)
    state = planned(after(state, observations.Signal.MEMORY_FREED), ONLY_A)
    assert reconcile(state) == LoadEpoch(ONLY_A, is_exclusive=True)
    retried = reconcile(after(state, observations.EpochLoadFailed(FAILED, True)))
    assert isinstance(retried, Wait) and retried.until_s is not None
    assert retried.until_s == pytest.approx(250.0, abs=1.0)


@pytest.mark.parametrize(("holds_others", "unloads"), [(True, True), (True, False), (False, True)])
async def test_a_load_that_stalls_is_ended_where_the_worker_holds_another_model(
    holds_others: bool, unloads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloaded: list[int] = []

    async def send(message: CoordinatorMessage) -> None:
        match message:
            case FindWeights(request_id=request_id):
                handle.receive(WeightsFound(True, request_id=request_id))
            case Unload(epoch):
                unloaded.append(epoch)
                if unloads:
                    handle.receive(Unloaded(epoch))

    monkeypatch.setattr(WorkerHandle, "unload", partialmethod(WorkerHandle.unload, deadline_s=0.05))
    handle = WorkerHandle(REGISTER, send, lambda: "", Insecure())
    if holds_others:
        handle.stages[1] = (replace(LOAD, epoch=1, model_id="cd" * 32), Loaded(1, 1, 2, 3))
    reference = ModelReference(LOAD.model_path, LOAD.model_id)
    loads = StageLoads(3, [StageInfo("a", 0, 4)], reference, LOAD.limits, is_exclusive=True, progress_timeout_s=0.05)
    with pytest.raises(StageLoadError, match="made no progress") as raised:
        await load_stages(loads, {"a": handle})
    (suspect,) = raised.value.suspects
    assert isinstance(suspect.error, StalledError) is not (holds_others and unloads)
    assert isinstance(suspect.error, DeadlineError) and unloaded == ([3] if holds_others else [])


async def test_a_worker_that_is_lost_before_its_load_begins_is_suspected_where_copies_of_the_file_differ() -> None:
    def worker_with_copy(name: str) -> WorkerHandle:
        async def send(message: CoordinatorMessage) -> None:
            assert isinstance(message, FindWeights), "a load of the other workers is useless"
            workers[name].receive(WeightsFound(True, "ab" * 32, 10, message.request_id, True, ids[name]))

        return handle_of(name, send)

    ids = {name: name * 64 for name in "abc"}
    workers = {name: worker_with_copy(name) for name in "abc"}
    workers["b"].lose("its process was killed")
    stages = [StageInfo(name, place, place + 1) for place, name in enumerate("abc")]
    with pytest.raises(StageLoadError, match="worker b is lost: its process was killed") as raised:
        await load_stages(StageLoads(3, stages, ModelReference("m.gguf", LOAD.model_id), LOAD.limits), workers)
    assert [suspect.name for suspect in raised.value.suspects] == ["b"]

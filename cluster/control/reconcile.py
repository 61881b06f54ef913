"""Contains pure functions that choose the supervisor's next action from the observed state."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.cluster.control.cluster_state import ClusterState, Expulsion
from llamaclust.cluster.control.memory_ledger import ModelLimitError
from llamaclust.cluster.control.observations import PlanInputs
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import DisputeError, InsufficientMemoryError, LlamaclustError, NetworkPartitionError
from llamaclust.core.sizes import mib


@dataclass(frozen=True, slots=True)
class MakePlan:
    inputs: PlanInputs


@dataclass(frozen=True, slots=True)
class LoadEpoch:
    """Loads a plan's stages. If `is_exclusive` is set, workers first free the model's other stages."""

    plan: Plan
    is_exclusive: bool


@dataclass(frozen=True, slots=True)
class Serve:
    """Switches the engine to the newly loaded stages. The requests of an older pipeline then move to the new one."""


@dataclass(frozen=True, slots=True)
class FreeRetired:
    """Frees the stages of the previous pipeline after its last sequence has ended or moved."""


@dataclass(frozen=True, slots=True)
class ClosePipeline:
    """Closes the lost pipeline and any retiring pipeline, and waits until all reports of broken links are checked."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Unloads the model if it has no requests or `is_forced` is set. Open requests wait until the next load."""

    is_forced: bool = False


@dataclass(frozen=True, slots=True)
class Expel:
    """Executes expulsions. Marks each worker as lost, or only reports its quarantine if `stays` is set."""

    expulsions: tuple[Expulsion, ...]


@dataclass(frozen=True, slots=True)
class FailRequests:
    """Fails all requests with an error that gives `reason` and the cause of the loss."""

    reason: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Stops a working pipeline, because its layers and the new plan's layers do not fit into memory together."""

    error: LlamaclustError


@dataclass(frozen=True, slots=True)
class Notify:
    text: str


@dataclass(frozen=True, slots=True)
class Abort:
    error: LlamaclustError


@dataclass(frozen=True, slots=True)
class Wait:
    """Waits for an observation, or until time `until_s`. `is_settled` means that there is nothing to do."""

    until_s: float | None
    is_settled: bool = False


Action = (
    MakePlan
    | LoadEpoch
    | Serve
    | FreeRetired
    | ClosePipeline
    | Sleep
    | Expel
    | FailRequests
    | Interrupt
    | Notify
    | Abort
    | Wait
)


def reconcile(state: ClusterState) -> Action | None:
    if state.is_acting:
        return None
    if state.loading.is_loaded:
        return Serve()
    if (action := _end_pipeline(state)) is not None:
        return action
    if not state.is_wanted:
        return Wait(None, is_settled=True) if state.is_asleep else Sleep(state.is_preempted)
    if state.planning is None or state.planning.inputs != state.inputs:
        return MakePlan(state.inputs)
    return _recover(state) or _improve(state)


def _end_pipeline(state: ClusterState) -> Action | None:
    loss = state.loss
    if loss is not None and loss.error is not None and not loss.is_closed:
        return ClosePipeline()
    if state.expulsions:
        return Expel(state.expulsions)
    if state.retiring is not None and state.retiring.is_empty:
        return FreeRetired()
    return None


def _recover(state: ClusterState) -> Action | None:
    loss, planning, loading = state.loss, state.planning, state.loading
    if loss is None:
        return None
    assert planning is not None
    now_s = state.tick.now_s
    if (missing := planning.error or planning.rejected) is not None:
        return _wait_for_memory(state, missing) if state.lacks_memory else _wait_for_workers(state, missing)
    if loading.error is not None and state.is_start:
        return Abort(loading.error)
    if loading.error is not None and now_s >= state.deadline_s:
        late = f"no plan could be loaded within {state.wait_s:g} s (timeouts.recovery): {loading.error}"
        if late != loss.failed_because:
            return FailRequests(late)
    assert planning.plan is not None
    workers = [stage.worker for stage in planning.plan.stages]
    retry_at_s = max(loading.retry_at_s, state.pool.quarantine.retry_at_s(workers))
    if now_s < retry_at_s:
        return Wait(_earliest(retry_at_s, state.deadline_s if now_s < state.deadline_s else None))
    return LoadEpoch(planning.plan, is_exclusive=True)


def _wait_for_workers(state: ClusterState, why: LlamaclustError) -> Action:
    """Returns the next action if no plan is possible. After a time limit, it aborts the start or fails requests."""
    loss = state.loss
    assert loss is not None and state.planning is not None
    is_link = isinstance(why, NetworkPartitionError)
    if state.is_start and state.planning.error is not None and state.is_whole and not is_link:
        return Abort(why)
    is_dispute = isinstance(why, DisputeError)
    what, waits = (
        "a link" if is_link else "the end of a dispute" if is_dispute else _absent_workers(state),
        "the start waits" if state.is_start else "requests wait",
    )
    if (text := f"waiting for {what}; {waits} {state.wait_s:g} s at most: {why}") != state.waits_for:
        return Notify(text)
    if state.tick.now_s < state.deadline_s:
        return Wait(_earliest(state.deadline_s, _exclusion_end_s(state)))
    if state.is_start:
        return Abort(why)
    awaited = "dispute ended" if is_dispute else "link came back" if is_link else "worker came back"
    late = f"no {awaited} within {state.wait_s:g} s (timeouts.recovery): {why}"
    if late != loss.failed_because:
        return FailRequests(late)
    return Wait(_exclusion_end_s(state))


def _wait_for_memory(state: ClusterState, why: LlamaclustError) -> Action:
    missing_bytes = why.missing_bytes if isinstance(why, InsufficientMemoryError) else None
    missing = "" if missing_bytes is None else f" ({mib(missing_bytes)} MiB)"
    text = f"waiting for memory that other models hold{missing}: they free it at the end of their turns"
    if isinstance(why, ModelLimitError):
        text = f"waiting until another model is unloaded at the end of its turn: {why}"
    return Notify(text) if text != state.waits_for else Wait(_exclusion_end_s(state))


def _absent_workers(state: ClusterState) -> str:
    serving = () if state.serving is None else state.serving.workers
    absent = [name for name, _ in serving if name not in state.pool.present]
    return f"worker{'s' if len(absent) > 1 else ''} {', '.join(absent)}" if absent else "a worker"


def _improve(state: ClusterState) -> Action:
    """Chooses the next action while a pipeline runs: to load a better plan if there is one, or to wait."""
    serving, planning = state.serving, state.planning
    assert serving is not None and planning is not None
    is_whole_again = serving.plan.lacks_kv_memory and planning.plan is not None and not planning.plan.lacks_kv_memory
    must_move = is_whole_again or any(name in state.pool.drained for name, _ in serving.workers)
    if state.retiring is not None:
        return Wait(_exclusion_end_s(state))
    settled = Wait(_exclusion_end_s(state), is_settled=True)
    if planning.plan is None:
        text = f"layers cannot be moved now: {planning.error}"
        return Notify(text) if must_move and not planning.is_noticed else settled
    is_broken = (
        state.has_lost_workers or state.pool.forbids(serving.plan, state.tick.now_s) or state.has_failing_workers
    )
    may_stay = not (must_move or is_broken)
    if may_stay and serving.is_worth_keeping(planning.plan):
        return settled
    if planning.rejected is not None:
        return _move_failed(planning.rejected, must_move=must_move, is_noticed=planning.is_noticed) or settled
    return LoadEpoch(planning.plan, is_exclusive=False)


def _move_failed(error: LlamaclustError, *, must_move: bool, is_noticed: bool) -> Action | None:
    if isinstance(error, InsufficientMemoryError):
        return Interrupt(error) if must_move else None
    return None if is_noticed else Notify(f"layers stay where they are: {error}")


def _exclusion_end_s(state: ClusterState) -> float | None:
    pool, now_s = state.pool, state.tick.now_s
    ends_s = (pool.quarantine.next_end_s(now_s), pool.disputes.next_end_s(now_s))
    return min((end_s for end_s in ends_s if end_s is not None), default=None)


def _earliest(first_s: float, second_s: float | None) -> float:
    return first_s if second_s is None else min(first_s, second_s)

"""Contains pure functions that apply observations to the supervisor's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.cluster_state import (
    ClusterState,
    Expulsion,
    Loading,
    PipelineLoss,
    Planning,
    PoolState,
    Retiring,
    is_useless,
)
from llamaclust.cluster.control.observations import Incarnation, PlanInputs
from llamaclust.cluster.control.serving import Serving
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import (
    DeadlineError,
    DisputeError,
    InsufficientMemoryError,
    LoadCancelledError,
    ModelFileError,
    ProtocolError,
    StalledError,
)

_MAX_LOADS = 3
_MAX_SHORT_LOADS = 6
"""Number of failed loads after which workers that lack memory are excluded, although they report enough memory."""
_LOAD_BACKOFF = Backoff(first_s=0.1, max_s=5.0)


def observe(state: ClusterState, observation: observations.Observation) -> ClusterState:
    pool, planning, loss = state.pool, state.planning, state.loss
    match observation:
        case observations.Tick():
            return replace(state, tick=observation)
        case observations.Signal.ACTION_ENDED:
            return replace(state, is_acting=False)
        case observations.Noticed(text):
            return replace(state, planning=planning and replace(planning, is_noticed=True), waits_for=text)
        case observations.Planned(inputs, plan, error, served, is_beside):
            serving = state.serving and state.serving.predicted(served)
            if loss is not None and plan is not None and planning is not None and planning.lacks_memory:
                # The time of waiting for other models does not count as recovery.
                loss = replace(loss, since_s=state.tick.now_s)
            planning = Planning(inputs, plan, error, is_beside=is_beside)
            return replace(state, planning=planning, serving=serving, loss=loss)
        case observations.EpochLoadFailed():
            return _load_failed(state, observation)
        case observations.Signal.EPOCH_LOADED:
            return replace(state, loading=replace(state.loading, is_loaded=True))
        case observations.Signal.EPOCH_SERVING:
            return _serving(state)
        case observations.PipelineLost(error, requests, causes, is_repeated):
            planning = planning and replace(planning, rejected=None, is_noticed=False)
            loss = PipelineLoss(state.tick.now_s, error, requests, causes, is_repeated)
            if isinstance(error, DisputeError):
                pool = replace(pool, disputes=pool.disputes.add(error.pair, state.tick.now_s))
            return replace(state, loss=loss, planning=planning, pool=pool)
        case observations.RequestsStruckOut(keys):
            return replace(state, pool=replace(pool, quarantine=pool.quarantine.exonerate(keys)))
        case observations.RowsFailed(key):
            quarantine = pool.quarantine.release_by_request(key, state.tick.now_s)
            return replace(state, pool=replace(pool, quarantine=quarantine))
        case observations.Signal.PIPELINE_CLOSED:
            state = replace(state, retiring=None)
            return state if loss is None else _attribute(replace(state, loss=replace(loss, is_closed=True)))
        case observations.Signal.RETIRING_EMPTY:
            return replace(state, retiring=state.retiring and replace(state.retiring, is_empty=True))
        case observations.Signal.RETIRING_FREED:
            return replace(state, retiring=None)
        case observations.RequestsFailed(reason):
            return replace(state, loss=loss and replace(loss, failed_because=reason))
        case observations.Signal.WORKERS_EXPELLED:
            return replace(state, expulsions=())
        case observations.Signal.WAKE_REQUESTED:
            return _awake(state)
        case observations.Signal.SLEEP_REQUESTED:
            return replace(state, is_wanted=False)
        case observations.Signal.TURN_ENDED:
            return replace(state, is_wanted=False, is_preempted=True)
        case observations.Signal.ASLEEP:
            state = replace(state, serving=None, retiring=None, planning=None, loading=Loading(), waits_for="")
            loss = PipelineLoss(state.tick.now_s, is_closed=True)
            return replace(state, loss=loss, is_unloaded=not state.is_wanted)
        case observations.Signal.MEMORY_FREED | observations.Signal.MEMORY_TAKEN:
            return replace(state, pool=replace(pool, memory=pool.memory + 1))
        case observations.Signal.LINKS_CHANGED:
            return replace(state, pool=replace(pool, links=pool.links + 1))
        case _:
            return replace(state, pool=_pool_changed(pool, observation))


def _pool_changed(pool: PoolState, observation: observations.PoolObservation) -> PoolState:
    match observation:
        case observations.WorkerSeen(name, join):
            return replace(pool, present={**pool.present, name: join})
        case observations.WorkerLost(name):
            return replace(pool, present={other: join for other, join in pool.present.items() if other != name})
        case observations.PartitionsChanged(pairs):
            return replace(pool, partitions=pairs)
        case observations.DrainRequested(name):
            return replace(pool, drained=pool.drained | {name})
        case observations.UndrainRequested(name):
            return replace(pool, drained=pool.drained - {name}, quarantine=pool.quarantine.release([name]))


def _awake(state: ClusterState) -> ClusterState:
    if state.is_asleep:
        state = replace(state, loss=PipelineLoss(state.tick.now_s, is_closed=True))
    return replace(state, is_wanted=True, is_preempted=False, is_unloaded=False)


def _attribute(state: ClusterState) -> ClusterState:
    """Records which requests or which worker caused the pipeline's failure."""
    loss, serving = state.loss, state.serving
    assert loss is not None and loss.error is not None and serving is not None
    if loss.causes:
        pool = replace(state.pool, quarantine=state.pool.quarantine.exonerate(loss.causes))
        return replace(state, pool=pool)
    is_broken_protocol = isinstance(loss.error, ProtocolError)
    name = loss.error.worker
    worker = next((worker for worker in serving.workers if worker[0] == name), None)
    if worker is None or (is_broken_protocol and state.has_lost_workers):
        return state
    state = _worker_failed(state, worker, str(loss.error), loss.requests)
    if is_broken_protocol:
        return replace(state, expulsions=(*state.expulsions, Expulsion(worker, str(loss.error))))
    return state


def _worker_failed(state: ClusterState, worker: Incarnation, reason: str, requests: frozenset[int]) -> ClusterState:
    """Records a worker's failure. If this quarantines the worker, adds an expulsion that reports the quarantine."""
    (name, _), now_s, before = worker, state.tick.now_s, state.pool.quarantine
    is_repeated = state.loss is not None and state.loss.is_repeated
    quarantine = before.failed(name, reason, requests, now_s, is_repeated=is_repeated)
    state = replace(state, pool=replace(state.pool, quarantine=quarantine))
    if name not in quarantine.names(now_s) or name in before.names(now_s):
        return state
    record = quarantine.records[name]
    excluded = Expulsion(worker, record.text, stays=True, pause_s=record.pause_s)
    return replace(state, expulsions=(*state.expulsions, excluded))


def _load_failed(state: ClusterState, failed: observations.EpochLoadFailed) -> ClusterState:
    """Decides what follows a failed load: another try, another plan, or the expulsion of workers."""
    planning = state.planning
    assert planning is not None and planning.plan is not None
    stalled = [suspect for suspect in failed.suspects if isinstance(suspect.error, StalledError)]
    hanging = {suspect.name: f"it hangs: {suspect.error}" for suspect in stalled}
    # A lost worker that serves is not counted here, because it is counted when its pipeline is lost.
    serving = () if state.serving is None else state.serving.workers
    for worker in planning.inputs.workers:
        is_lost = worker not in state.pool.usable and worker not in serving
        error = failed.error_of(worker[0])
        if is_lost and error is not None and not isinstance(error, LoadCancelledError):
            state = _worker_failed(state, worker, str(error), frozenset())
    if hanging or _is_outdated(planning.plan, planning.inputs, state.pool, state.tick.now_s):
        return _expel(state, planning.inputs, hanging)
    if not failed.is_exclusive:
        return state if state.loss else _move_failed(state, planning, failed)
    # No worker has the file any longer, so the plan stays rejected until the workers change.
    if failed.file_is_absent and not (state.is_start and state.is_whole):
        return replace(state, planning=replace(planning, inputs=state.inputs, rejected=failed.error))
    if state.is_start and (damaged := _damaged(state, failed)):
        return _expel(state, planning.inputs, damaged, stays=True)
    failures = state.loading.failures + 1
    retry_at_s = state.tick.now_s + _LOAD_BACKOFF.pause_s(failures - 1)
    is_short = any(isinstance(suspect.error, InsufficientMemoryError) for suspect in failed.suspects)
    is_final = not (is_short and state.is_start) or failures >= _MAX_LOADS
    state = replace(state, loading=Loading(failures, failed.error if is_final else None, retry_at_s))
    if is_short:
        state = replace(state, planning=None)
    if state.is_start or (is_short and failures < _MAX_SHORT_LOADS):
        return state
    return _exclude(state, planning.inputs, _unfit(state, failed), stays=is_short)


def _damaged(state: ClusterState, failed: observations.EpochLoadFailed) -> dict[str, str]:
    errors = {each.name: str(each.error) for each in failed.suspects if isinstance(each.error, ModelFileError)}
    excluded = state.inputs.quarantined
    has_others = any(name not in errors and name not in excluded for name, _ in state.pool.usable)
    return {name: error for name, error in errors.items() if name not in excluded} if has_others else {}


def _move_failed(state: ClusterState, planning: Planning, failed: observations.EpochLoadFailed) -> ClusterState:
    state = replace(state, planning=replace(planning, rejected=failed.error))
    return state if state.is_alone else _exclude(state, planning.inputs, _unfit(state, failed))


def _is_outdated(plan: Plan, inputs: PlanInputs, pool: PoolState, now_s: float) -> bool:
    has_changed = inputs.links != pool.links or not set(pool.usable) <= set(inputs.workers)
    return has_changed or is_useless(plan, inputs, pool, now_s)


def _unfit(state: ClusterState, failed: observations.EpochLoadFailed) -> dict[str, str]:
    is_failing = state.loading.failures >= _MAX_LOADS
    reason = f"it could not load a new epoch: {failed.error}"
    return {
        suspect.name: reason for suspect in failed.suspects if is_failing or isinstance(suspect.error, DeadlineError)
    }


def _exclude(
    state: ClusterState, inputs: PlanInputs, reasons: Mapping[str, str], *, stays: bool = False
) -> ClusterState:
    """Expels workers. If `stays` is set or the cluster also serves other models, the workers stay, but get no layers of
    this model."""
    if state.is_alone and not stays:
        return _expel(state, inputs, reasons)
    excluded = state.inputs.quarantined
    new = {name: reason for name, reason in reasons.items() if name not in excluded}
    return _expel(state, inputs, new, stays=True)


def _expel(state: ClusterState, inputs: PlanInputs, reasons: Mapping[str, str], *, stays: bool = False) -> ClusterState:
    quarantine = state.pool.quarantine
    for name, reason in reasons.items():
        quarantine = quarantine.exclude(name, reason, state.tick.now_s)
    workers = dict(inputs.workers)
    expelled = (
        Expulsion((name, workers[name]), reason, stays, quarantine.records[name].pause_s if stays else 0.0)
        for name, reason in reasons.items()
    )
    pool = replace(state.pool, quarantine=quarantine)
    return replace(state, pool=pool, expulsions=(*state.expulsions, *expelled))


def _serving(state: ClusterState) -> ClusterState:
    planning, loss = state.planning, state.loss
    assert planning is not None and planning.plan is not None
    # The pipeline was lost after the new plan was loaded.
    if loss is not None and loss.error is not None and not loss.is_closed:
        state = _attribute(state)
    names = [stage.worker for stage in planning.plan.stages]
    joins = dict(planning.inputs.workers)
    return replace(
        state,
        loading=Loading(),
        serving=Serving(planning.plan, tuple((name, joins[name]) for name in names)),
        retiring=Retiring(state.serving.workers) if state.serving is not None and state.loss is None else None,
        loss=None,
        waits_for="",
        is_start=False,
    )

"""The state that the supervisor decides from, and how each observation changes it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamaclust.cluster.control import observations as seen
from llamaclust.cluster.control.observations import Incarnation, PlanInputs
from llamaclust.cluster.control.quarantine import Quarantine
from llamaclust.cluster.control.serving import Serving
from llamaclust.cluster.planner.adjacency import Pairs, violated_pair
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import (
    DeadlineError,
    InsufficientMemoryError,
    LlamaclustError,
    ProtocolError,
    StalledError,
    WorkerError,
)

_MAX_LOADS = 3
"""That fail before their workers are expelled."""
_LOAD_BACKOFF = Backoff(first_s=0.1, max_s=5.0)


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a plan depends on: the present workers, which of them it may use, and the model's adapters."""

    present: Mapping[str, int] = field(default_factory=dict)  # by name, which join it is, in the order of joining
    drained: frozenset[str] = frozenset()
    partitions: Pairs = frozenset()
    links: int = 0
    memory: int = 0
    model_id: str = ""  # of the model with the adapters that it is to have
    quarantine: Quarantine = field(default_factory=Quarantine)

    @property
    def usable(self) -> tuple[Incarnation, ...]:
        return tuple((name, join) for name, join in self.present.items() if name not in self.drained)

    def inputs(self, now_s: float) -> PlanInputs:
        return PlanInputs(
            self.usable, self.quarantine.names(now_s), self.partitions, self.links, self.memory, self.model_id
        )

    def is_partitioned(self, plan: Plan) -> bool:
        """Whether neighbouring stages cannot reach each other."""
        return violated_pair([stage.worker for stage in plan.stages], self.partitions) is not None


@dataclass(frozen=True, slots=True)
class Planning:
    """The newest plan, or why there is none. `rejected`: a load of this plan failed so that it is not repeated."""

    inputs: PlanInputs
    plan: Plan | None = None
    error: LlamaclustError | None = None
    rejected: LlamaclustError | None = None
    is_noticed: bool = False  # operators were told
    is_beside: bool = False  # other models hold memory of these workers

    @property
    def lacks_memory(self) -> bool:
        """Which other models hold."""
        return self.is_beside and isinstance(self.error, InsufficientMemoryError)


@dataclass(frozen=True, slots=True)
class Expulsion:
    """A worker that is to count as lost, and the notice why. `stays`: it serves other models, and is only to hold
    nothing of this one."""

    worker: Incarnation
    reason: str
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Loading:
    """Loads since an epoch served last."""

    failures: int = 0
    error: LlamaclustError | None = None  # of the last one that was counted
    retry_at_s: float = 0.0
    is_loaded: bool = False  # and ready to serve


@dataclass(frozen=True, slots=True)
class Retiring:
    """The epoch before, after a move: its sequences end or move, then its stages are freed."""

    workers: tuple[Incarnation, ...]
    is_empty: bool = False


@dataclass(frozen=True, slots=True)
class PipelineLoss:
    """A pipeline that is lost, until another one serves. At a start: that none serves yet."""

    since_s: float
    error: LlamaclustError | None = None
    is_closed: bool = False
    failed_because: str | None = None  # requests were failed for this reason


@dataclass(frozen=True, slots=True)
class Waits:
    """How long requests wait for a pipeline, and a start for its first one."""

    recovery_s: float
    start_s: float


@dataclass(frozen=True, slots=True)
class ClusterState:
    waits: Waits
    worker_count: int  # of the cluster file
    tick: seen.Tick
    loss: PipelineLoss | None
    pool: PoolState = field(default_factory=PoolState)
    planning: Planning | None = None
    loading: Loading = field(default_factory=Loading)
    serving: Serving | None = None
    retiring: Retiring | None = None
    expulsions: tuple[Expulsion, ...] = ()
    is_acting: bool = False
    waits_for: str = ""  # the last notice
    is_start: bool = True  # until an epoch has served; not of a model that is loaded on demand
    is_wanted: bool = True  # the model is to be loaded
    has_given_way: bool = False  # where it is not, although it may have requests
    is_unloaded: bool = False  # and was not wanted since
    is_alone: bool = True  # no other model is served by the workers

    @property
    def inputs(self) -> PlanInputs:
        return self.pool.inputs(self.tick.now_s)

    @property
    def is_asleep(self) -> bool:
        """Whether the model is not loaded, nor to be."""
        return not self.is_wanted and self.is_unloaded

    @property
    def lacks_memory(self) -> bool:
        """Whether the model is to be loaded, and its newest plan failed for memory that other models hold."""
        is_waiting = self.is_wanted and self.loss is not None and self.is_planned
        return is_waiting and self.planning is not None and self.planning.lacks_memory

    @property
    def is_planned(self) -> bool:
        """Whether the newest plan, or the reason why there is none, is of what is known now."""
        return self.planning is not None and self.planning.inputs == self.inputs

    @property
    def is_whole(self) -> bool:
        return len(self.pool.present) >= self.worker_count

    @property
    def wait_s(self) -> float:
        return self.waits.start_s if self.is_start else self.waits.recovery_s

    @property
    def deadline_s(self) -> float:
        """Until then requests, or the start, wait for another pipeline."""
        assert self.loss is not None
        return self.loss.since_s + self.wait_s

    def is_freed(self, name: str) -> bool:
        """Whether a drained worker has no layers, and gets none from an action or plan of before the drain."""
        serving, retiring, planning = self.serving, self.retiring, self.planning
        holders = [*(serving.workers if serving else ()), *(retiring.workers if retiring else ())]
        usable = () if planning is None else planning.inputs.workers
        is_held = self.is_acting or any(name == other for other, _ in (*holders, *usable))
        return name in self.pool.drained and not is_held

    @property
    def is_plan_useless(self) -> bool:
        """Whether a load of the newest plan is of no use any more."""
        planning = self.planning
        return (
            planning is not None
            and planning.plan is not None
            and _is_useless(planning.plan, planning.inputs, self.pool)
        )

    @property
    def has_version(self) -> bool:
        """Whether the epoch that serves has the adapters that it is to have."""
        return self.loss is None and self.serving is not None and self.serving.model_id == self.pool.model_id

    @property
    def version_error(self) -> LlamaclustError | None:
        """Why the model cannot be served with the adapters that it is to have."""
        planning = self.planning
        if planning is None or planning.inputs.model_id != self.pool.model_id:
            return None
        if self.loss is not None and self.loss.failed_because is not None:
            return WorkerError(self.loss.failed_because)
        return planning.error or planning.rejected or self.loading.error

    @property
    def has_lost_workers(self) -> bool:
        """Whether a worker of the serving epoch is lost."""
        workers = () if self.serving is None else self.serving.workers
        return any(self.pool.present.get(name) != join for name, join in workers)


def observe(state: ClusterState, observation: seen.Observation) -> ClusterState:
    """The state after an observation."""
    pool, planning, loss = state.pool, state.planning, state.loss
    match observation:
        case seen.Tick():
            return replace(state, tick=observation)
        case seen.Signal.ACTION_ENDED:
            return replace(state, is_acting=False)
        case seen.Noticed(text):
            return replace(state, planning=planning and replace(planning, is_noticed=True), waits_for=text)
        case seen.Planned(inputs, plan, error, served, is_beside):
            serving = state.serving and state.serving.predicted(served)
            if loss is not None and plan is not None and planning is not None and planning.lacks_memory:
                loss = replace(loss, since_s=state.tick.now_s)  # the wait for other models is no recovery
            planning = Planning(inputs, plan, error, is_beside=is_beside)
            return replace(state, planning=planning, serving=serving, loss=loss)
        case seen.EpochLoadFailed():
            return _load_failed(state, observation)
        case seen.Signal.EPOCH_LOADED:
            return replace(state, loading=replace(state.loading, is_loaded=True))
        case seen.Signal.EPOCH_SERVING:
            return _serving(state)
        case seen.PipelineLost(error):
            planning = planning and replace(planning, rejected=None, is_noticed=False)
            return replace(state, loss=PipelineLoss(state.tick.now_s, error), planning=planning)
        case seen.Signal.PIPELINE_CLOSED:
            state = replace(state, retiring=None)
            return state if loss is None else _attribute(replace(state, loss=replace(loss, is_closed=True)))
        case seen.Signal.RETIRING_EMPTY:
            return replace(state, retiring=state.retiring and replace(state.retiring, is_empty=True))
        case seen.Signal.RETIRING_FREED:
            return replace(state, retiring=None)
        case seen.RequestsFailed(reason):
            return replace(state, loss=loss and replace(loss, failed_because=reason))
        case seen.Signal.WORKERS_EXPELLED:
            return replace(state, expulsions=())
        case seen.Signal.WAKE_REQUESTED:
            return _awake(state)
        case seen.Signal.SLEEP_REQUESTED:
            return replace(state, is_wanted=False)
        case seen.Signal.TURN_ENDED:
            return replace(state, is_wanted=False, has_given_way=True)
        case seen.Signal.ASLEEP:
            state = replace(state, serving=None, retiring=None, planning=None, loading=Loading(), waits_for="")
            loss = PipelineLoss(state.tick.now_s, is_closed=True)
            return replace(state, loss=loss, is_unloaded=not state.is_wanted)
        case seen.Signal.MEMORY_FREED | seen.Signal.MEMORY_TAKEN:
            return replace(state, pool=replace(pool, memory=pool.memory + 1))
        case seen.VersionWanted(model_id):
            return replace(state, pool=replace(pool, model_id=model_id))
        case seen.Signal.LINKS_CHANGED:
            return replace(state, pool=replace(pool, links=pool.links + 1))
        case _:
            return replace(state, pool=_pool_changed(pool, observation))


def _pool_changed(pool: PoolState, observation: seen.PoolObservation) -> PoolState:
    match observation:
        case seen.WorkerSeen(name, join):
            return replace(pool, present={**pool.present, name: join})
        case seen.WorkerLost(name):
            return replace(pool, present={other: join for other, join in pool.present.items() if other != name})
        case seen.PartitionsChanged(pairs):
            return replace(pool, partitions=pairs)
        case seen.DrainRequested(name):
            return replace(pool, drained=pool.drained | {name})
        case seen.UndrainRequested(name):
            return replace(pool, drained=pool.drained - {name}, quarantine=pool.quarantine.release([name]))


def _awake(state: ClusterState) -> ClusterState:
    """A model that sleeps is loaded as after a loss, and its requests wait from now on."""
    if state.is_asleep:
        state = replace(state, loss=PipelineLoss(state.tick.now_s, is_closed=True))
    return replace(state, is_wanted=True, has_given_way=False, is_unloaded=False)


def _attribute(state: ClusterState) -> ClusterState:
    """A worker that breaks the protocol is expelled, unless one that is lost is the cause."""
    loss, serving = state.loss, state.serving
    assert loss is not None and serving is not None
    if not isinstance(loss.error, ProtocolError) or state.has_lost_workers:
        return state
    return replace(state, expulsions=(*state.expulsions, Expulsion(serving.workers[-1], str(loss.error))))


def _load_failed(state: ClusterState, failed: seen.EpochLoadFailed) -> ClusterState:
    """Where the plan is outdated, another one may be the remedy. Else the load is repeated after a pause, and
    workers that fail again and again, or do not answer, are expelled. One whose memory was less than it had
    reported is not at fault: another plan is made from what it reports now."""
    planning = state.planning
    assert planning is not None and planning.plan is not None
    stalled = [suspect for suspect in failed.suspects if isinstance(suspect.error, StalledError)]
    hanging = {suspect.name: f"it hangs: {suspect.error}" for suspect in stalled}
    if hanging or _is_outdated(planning.plan, planning.inputs, state.pool):
        return _expel(state, planning.inputs, hanging)
    if not failed.is_exclusive:
        return state if state.loss else _move_failed(state, planning, failed)
    if failed.file_is_absent and not (state.is_start and state.is_whole):  # even if the holder was lost meanwhile
        return replace(state, planning=replace(planning, inputs=state.inputs, rejected=failed.error))
    failures = state.loading.failures + 1
    retry_at_s = state.tick.now_s + _LOAD_BACKOFF.pause_s(failures - 1)
    is_short = any(isinstance(suspect.error, InsufficientMemoryError) for suspect in failed.suspects)
    is_final = not (is_short and state.is_start) or failures >= _MAX_LOADS
    state = replace(state, loading=Loading(failures, failed.error if is_final else None, retry_at_s))
    if is_short:
        return replace(state, planning=None)
    return state if state.is_start else _exclude(state, planning.inputs, _unfit(state, failed))


def _move_failed(state: ClusterState, planning: Planning, failed: seen.EpochLoadFailed) -> ClusterState:
    """The old epoch serves on. A worker that serves other models and did not answer is excluded, for another move."""
    state = replace(state, planning=replace(planning, rejected=failed.error))
    return state if state.is_alone else _exclude(state, planning.inputs, _unfit(state, failed))


def _is_outdated(plan: Plan, inputs: PlanInputs, pool: PoolState) -> bool:
    """Whether the plan is useless, or another worker joined."""
    return _is_useless(plan, inputs, pool) or not set(pool.usable) <= set(inputs.workers)


def _is_useless(plan: Plan, inputs: PlanInputs, pool: PoolState) -> bool:
    """Whether a worker of the plan is lost or cut off, or is to have no layers."""
    planned = {stage.worker for stage in plan.stages}
    lost = any(worker not in pool.usable for worker in inputs.workers if worker[0] in planned)
    return lost or pool.is_partitioned(plan)


def _unfit(state: ClusterState, failed: seen.EpochLoadFailed) -> dict[str, str]:
    """Workers that did not answer, or that fail again and again, and the notice of each."""
    is_failing = state.loading.failures >= _MAX_LOADS
    reason = f"it takes no part in a new epoch: {failed.error}"
    return {
        suspect.name: reason for suspect in failed.suspects if is_failing or isinstance(suspect.error, DeadlineError)
    }


def _exclude(state: ClusterState, inputs: PlanInputs, reasons: Mapping[str, str]) -> ClusterState:
    """Of a model alone, they are expelled. A model that does not load is no reason to take others from a worker."""
    if state.is_alone:
        return _expel(state, inputs, reasons)
    excluded = state.inputs.quarantined
    new = {name: reason for name, reason in reasons.items() if name not in excluded}
    return _expel(state, inputs, new, stays=True)


def _expel(state: ClusterState, inputs: PlanInputs, reasons: Mapping[str, str], *, stays: bool = False) -> ClusterState:
    quarantine = state.pool.quarantine
    for name in reasons:
        quarantine = quarantine.add(name, state.tick.now_s)
    workers = dict(inputs.workers)
    expelled = (Expulsion((name, workers[name]), reason, stays) for name, reason in reasons.items())
    pool = replace(state.pool, quarantine=quarantine)
    return replace(state, pool=pool, expulsions=(*state.expulsions, *expelled))


def _serving(state: ClusterState) -> ClusterState:
    planning = state.planning
    assert planning is not None and planning.plan is not None
    names = [stage.worker for stage in planning.plan.stages]
    joins = dict(planning.inputs.workers)
    return replace(
        state,
        pool=replace(state.pool, quarantine=state.pool.quarantine.release(names)),
        loading=Loading(),
        serving=Serving(planning.plan, tuple((name, joins[name]) for name in names), planning.inputs.model_id),
        retiring=Retiring(state.serving.workers) if state.serving is not None and state.loss is None else None,
        loss=None,
        waits_for="",
        is_start=False,
    )

"""Defines the immutable state that the supervisor's decisions depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.failures.disputes import Disputes
from llamaclust.cluster.control.failures.quarantine import Quarantine
from llamaclust.cluster.control.observations import Incarnation, PlanInputs
from llamaclust.cluster.control.serving import Serving
from llamaclust.cluster.planner.links import Pairs, disputed_pair, violated_pair
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError


@dataclass(frozen=True, slots=True)
class PoolState:
    """The connected workers, and the facts that decide which of them a plan can use."""

    # Unique number of each worker's last join, by worker name. Entries are in the order of the joins.
    present: Mapping[str, int] = field(default_factory=dict)
    drained: frozenset[str] = frozenset()
    partitions: Pairs = frozenset()
    links: int = 0
    memory: int = 0
    quarantine: Quarantine = field(default_factory=Quarantine)
    disputes: Disputes = field(default_factory=Disputes)

    @property
    def usable(self) -> tuple[Incarnation, ...]:
        return tuple((name, join) for name, join in self.present.items() if name not in self.drained)

    def inputs(self, now_s: float) -> PlanInputs:
        return PlanInputs(
            self.usable,
            self.quarantine.names(now_s),
            self.partitions,
            self.disputes.pairs(now_s),
            self.links,
            self.memory,
        )

    def may_exclude_more(self, now_s: float) -> bool:
        excluded = self.quarantine.names(now_s)
        others = [name for name, _ in self.usable if name not in excluded]
        return len(others) > 1 and not self.quarantine.ignores_rows(now_s)

    def forbids(self, plan: Plan, now_s: float) -> bool:
        """Returns True if the plan needs a link that does not work, or a group whose members accuse each other."""
        is_disputed = disputed_pair(plan.chain, self.disputes.pairs(now_s)) is not None
        return is_disputed or violated_pair(plan.chain, self.partitions) is not None


@dataclass(frozen=True, slots=True)
class Planning:
    """The newest plan, or the error if planning failed. `rejected` is the error if loading `plan` failed."""

    inputs: PlanInputs
    plan: Plan | None = None
    error: LlamaclustError | None = None
    rejected: LlamaclustError | None = None
    is_noticed: bool = False  # True if operators were told about the error.
    is_beside: bool = False  # True if other models use memory of the workers in `inputs`.

    @property
    def lacks_memory(self) -> bool:
        """True if planning failed because other models use the workers' memory."""
        return self.is_beside and isinstance(self.error, InsufficientMemoryError)


@dataclass(frozen=True, slots=True)
class Expulsion:
    """A decision to stop using a worker. If `stays` is true, plans of this model exclude the worker for `pause_s`
    seconds. Otherwise, the worker is marked as lost."""

    worker: Incarnation
    reason: str
    stays: bool = False
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loading:
    failures: int = 0
    error: LlamaclustError | None = None  # Error of the last failed load. None if a start will plan again.
    retry_at_s: float = 0.0
    is_loaded: bool = False  # True if a new epoch is loaded but does not serve yet.


@dataclass(frozen=True, slots=True)
class Retiring:
    """Workers of the previous pipeline. Their stages are freed when the pipeline's last sequence has ended or moved."""

    workers: tuple[Incarnation, ...]
    is_empty: bool = False


@dataclass(frozen=True, slots=True)
class PipelineLoss:
    """A period without a pipeline: a start, a recovery after a failure, or the time while the model is unloaded."""

    since_s: float
    error: LlamaclustError | None = None
    requests: frozenset[int] = frozenset()  # Keys of the requests that were in flight.
    causes: frozenset[int] = frozenset()  # Keys of the requests that caused the loss.
    is_repeated: bool = False  # True if the worker failed to compute the same tokens before.
    is_closed: bool = False
    failed_because: str | None = None  # Reason why the waiting requests were failed. None if they still wait.


@dataclass(frozen=True, slots=True)
class Waits:
    recovery_s: float
    start_s: float


@dataclass(frozen=True, slots=True)
class ClusterState:
    waits: Waits
    worker_count: int  # Number of workers in the cluster file.
    tick: observations.Tick
    loss: PipelineLoss | None
    pool: PoolState = field(default_factory=PoolState)
    planning: Planning | None = None
    loading: Loading = field(default_factory=Loading)
    serving: Serving | None = None
    retiring: Retiring | None = None
    expulsions: tuple[Expulsion, ...] = ()
    is_acting: bool = False
    waits_for: str = ""  # Text of the last `Notify` action, so that it is not repeated.
    is_start: bool = True  # True until an epoch has served. False from the beginning if the model is loaded on demand.
    is_wanted: bool = True  # True if the model should be loaded.
    is_preempted: bool = False  # True if the model was unloaded for another model. It may then have waiting requests.
    is_unloaded: bool = False  # True after the stages were freed, until the model is wanted again.
    is_alone: bool = True  # True if the workers serve no other model.

    @property
    def inputs(self) -> PlanInputs:
        return self.pool.inputs(self.tick.now_s)

    @property
    def is_asleep(self) -> bool:
        return not self.is_wanted and self.is_unloaded

    @property
    def is_short(self) -> bool:
        """True if requests wait because no plan fits into the workers' memory."""
        is_waiting = self.is_wanted and self.loss is not None and self.is_planned
        return is_waiting and self.planning is not None and isinstance(self.planning.error, InsufficientMemoryError)

    @property
    def lacks_memory(self) -> bool:
        return self.is_short and self.planning is not None and self.planning.lacks_memory

    @property
    def is_planned(self) -> bool:
        return self.planning is not None and self.planning.inputs == self.inputs

    @property
    def is_whole(self) -> bool:
        return len(self.pool.present) >= self.worker_count

    @property
    def wait_s(self) -> float:
        return self.waits.start_s if self.is_start else self.waits.recovery_s

    @property
    def deadline_s(self) -> float:
        assert self.loss is not None
        return self.loss.since_s + self.wait_s

    def is_freed(self, name: str) -> bool:
        """True if worker `name` is drained, holds no layers, and gets none from a running action or the newest plan."""
        serving, retiring, planning = self.serving, self.retiring, self.planning
        holders = [*(serving.workers if serving else ()), *(retiring.workers if retiring else ())]
        usable = () if planning is None else planning.inputs.workers
        is_held = self.is_acting or any(name == other for other, _ in (*holders, *usable))
        return name in self.pool.drained and not is_held

    def cannot_free(self, name: str) -> bool:
        """True if worker `name` is drained, and requests wait because the other workers cannot hold the model."""
        if self.loss is None or self.planning is None or not self.is_planned or self.lacks_memory:
            return False
        return name in self.pool.drained and (self.planning.error or self.planning.rejected) is not None

    @property
    def is_plan_useless(self) -> bool:
        planning = self.planning
        return (
            planning is not None
            and planning.plan is not None
            and is_useless(planning.plan, planning.inputs, self.pool, self.tick.now_s)
        )

    @property
    def reads_images(self) -> bool:
        return self.serving is not None and self.serving.plan.has_encoder

    @property
    def has_failing_workers(self) -> bool:
        planned = {stage.worker for stage in self.planning.plan.stages} if self.planning and self.planning.plan else {}
        serving = () if self.serving is None else self.serving.workers
        return any(name in self.inputs.quarantined and name not in planned for name, _ in serving)

    @property
    def has_lost_workers(self) -> bool:
        workers = () if self.serving is None else self.serving.workers
        return any(self.pool.present.get(name) != join for name, join in workers)


def is_useless(plan: Plan, inputs: PlanInputs, pool: PoolState, now_s: float) -> bool:
    planned = {stage.worker for stage in plan.stages}
    lost = any(worker not in pool.usable for worker in inputs.workers if worker[0] in planned)
    return lost or pool.forbids(plan, now_s)

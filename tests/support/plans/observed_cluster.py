"""The state of a cluster for tests of `reconcile`, to which observations are applied, and plans of its workers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.cluster_state import ClusterState, PipelineLoss, Waits
from llamaclust.cluster.control.observations import Observation, Suspect
from llamaclust.cluster.control.reconcile import Action, ClosePipeline, Notify, Wait, reconcile
from llamaclust.cluster.control.state_changes import observe
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, ModelFileError, ProtocolError, WorkerError
from support.plans.plan_inputs import REQUEST, SMALL, worker

RECOVERY_S = 120.0
START_S = 600.0
BROKEN = WorkerError("the pipeline broke")
IDLE = Wait(None, is_settled=True)


def plan_of(*names: str) -> Plan:
    return make_plan(SMALL, [worker(name) for name in names], replace(REQUEST, objective="throughput"))


BOTH, ONLY_A, ONLY_B, ALL = plan_of("a", "b"), plan_of("a"), plan_of("b"), plan_of("a", "b", "c")


def fault_of(name: str, text: str = "broken", kind: type[WorkerError | ProtocolError] = WorkerError) -> LlamaclustError:
    """Returns an error that names the worker at fault."""
    return kind(text, worker=name)


@dataclass
class Cluster:
    """Applies observations to the state of a cluster of two workers. Plans are for the current inputs."""

    state: ClusterState
    now_s: float = 0.0

    @classmethod
    def starting(cls) -> Cluster:
        return cls(ClusterState(Waits(RECOVERY_S, START_S), 2, observations.Tick(0.0), PipelineLoss(0.0)))

    @classmethod
    def serving(cls) -> Cluster:
        cluster = cls.starting()
        cluster.see(observations.WorkerSeen("a", 1), observations.WorkerSeen("b", 2))
        cluster.plan(BOTH)
        cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
        return cluster

    def see(self, *events: Observation) -> Action | None:
        for observation in events:
            self.state = observe(self.state, observation)
        return reconcile(self.state)

    def plan(self, outcome: Plan | WorkerError | InsufficientMemoryError) -> Action | None:
        if isinstance(outcome, Plan):
            return self.see(observations.Planned(self.state.inputs, plan=outcome))
        return self.see(observations.Planned(self.state.inputs, error=outcome))

    def at(self, now_s: float) -> Action | None:
        return self.see(observations.Tick(now_s))

    def lose_pipeline(
        self,
        error: LlamaclustError = BROKEN,
        *,
        requests: frozenset[int] = frozenset(),
        causes: frozenset[int] = frozenset(),
    ) -> Action | None:
        assert self.see(observations.PipelineLost(error, requests, causes)) == ClosePipeline()
        return self.see(observations.Signal.PIPELINE_CLOSED)

    def load_failed(
        self,
        error: WorkerError | ModelFileError | InsufficientMemoryError,
        *suspects: Suspect,
        is_exclusive: bool = True,
    ) -> Action | None:
        return self.see(observations.EpochLoadFailed(error, is_exclusive, suspects))

    def notified(self, action: Action | None) -> Action | None:
        """Returns the action that follows a notice."""
        assert isinstance(action, Notify)
        return self.see(observations.Noticed(action.text))

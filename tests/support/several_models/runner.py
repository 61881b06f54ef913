"""The runner of a model's actions, on stubs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.cluster_state import ClusterState, PipelineLoss, PoolState, Waits
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.planner.links import UNKNOWN
from llamaclust.wire.rpc.task_set import TaskSet

ANYTHING: Any = SimpleNamespace()


def new_store() -> StateStore:
    return StateStore(ClusterState(Waits(120.0, 120.0), 2, observations.Tick(0.0), PipelineLoss(0.0), PoolState()))


def action_runner(store: StateStore, open_epoch: Callable[..., Any]) -> ActionRunner:
    """Builds the runner of a cluster that serves."""

    async def settled() -> None: ...

    loading: Any = SimpleNamespace(open=open_epoch, file_is_absent=False, model_id="m", held_layers={})
    own = SimpleNamespace(models=(), model_name="m", mmproj=None)
    planner: Any = SimpleNamespace(links=UNKNOWN, ledger=MemoryLedger(), config=own, unfit={})
    registry: Any = SimpleNamespace(workers={}, present={})
    partitions: Any = SimpleNamespace(settled=settled)
    runner = ActionRunner(store, loading, planner, registry, partitions, lambda event: None, TaskSet())
    runner.engine = ANYTHING
    return runner

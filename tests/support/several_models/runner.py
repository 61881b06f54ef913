"""The runner of a model's actions, on stubs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import observations
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.cluster_state import ClusterState, PipelineLoss, PoolState, Waits
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.pool.worker_pool import SupervisedWorkers, WorkerPool
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.control.supervisor import Supervisor
from llamaclust.cluster.membership.members import Members
from llamaclust.cluster.planner.links import UNKNOWN
from llamaclust.cluster.state.control_record import ControlRecord
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


def supervised(registry: Members) -> tuple[WorkerPool, Supervisor]:
    async def nothing(_: object) -> None: ...

    config = ClusterConfig.model_validate({"model": "m.gguf", "workers": [{"name": "a"}], "state_dir": Path("/none")})
    opener: Any = SimpleNamespace(announce=nothing, model_id="m")
    launcher: Any = SimpleNamespace(end=nothing)
    workers: Any = SupervisedWorkers(registry, launcher, ControlRecord())  # type: ignore[arg-type]
    planner: Any = SimpleNamespace(profiles=SimpleNamespace(of=lambda workers: workers), config=config)
    pool = WorkerPool(config, workers, lambda event: None)
    return pool, Supervisor(config, opener, planner, pool, report=lambda event: None)

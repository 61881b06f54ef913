"""A running cluster: starts workers, measures, plans, loads, opens pipeline and engine; undoes it all at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

from llamaclust.cluster.config import ClusterConfig
from llamaclust.cluster.engine import Engine
from llamaclust.cluster.events import PlanMade, Watch, WorkerLoading
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.launchers.launch import Launch, launching
from llamaclust.cluster.loading import load_stages
from llamaclust.cluster.measuring import measure_workers
from llamaclust.cluster.pipeline import StageInfo
from llamaclust.cluster.plan import Plan
from llamaclust.cluster.plan_inputs import check_plan, plan_cluster, scheduler_settings, stage_limits
from llamaclust.cluster.plan_text import plan_lines
from llamaclust.cluster.registry import Registry
from llamaclust.cluster.remote import RemotePipeline
from llamaclust.cluster.settings import EngineSettings
from llamaclust.cluster.shares import machine_shares, memory_shares, worker_specs
from llamaclust.cluster.state import ClusterDir
from llamaclust.model.loader import Model
from llamaclust.wire.control import Deadlines, LoadProgress
from llamaclust.wire.credentials import Credentials
from llamaclust.wire.time_slices import short_slices

_EPOCH = 1
_HEARTBEAT_S = 1.0
_HEARTBEATS = 5
"""In the time after which a silent worker counts as lost."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What runs while `open_cluster` is entered."""

    config: ClusterConfig
    model: Model
    plan: Plan
    registry: Registry
    launcher: Launcher
    engine: Engine


@asynccontextmanager
async def open_cluster(
    config: ClusterConfig, model_path: Path, folder: ClusterDir, watch: Watch = lambda event: None
) -> AsyncIterator[Cluster]:
    """A cluster that is ready for requests. The caller holds `folder`'s lock. On the way out every worker ends.

    Raises DoesNotFitError, ModelFileError, WorkerError or DeadlineError where a start fails; nothing is left running.
    """
    with short_slices(), launching(config, folder, watch) as launch:
        launcher, registry = launch.launcher, _registry(config, launch)
        model = await asyncio.to_thread(Model.open, model_path)
        with closing(model):
            check_plan(config, model)
            launcher.check(worker_specs(config), model)
            async with _stopping(launcher), registry:
                await launcher.start(worker_specs(config), registry.address, registry.process_exited)
                named = asyncio.to_thread(lambda: model.tokenizer)  # a bad one is named now
                config, _ = await asyncio.gather(launch.joined(registry), named)
                measured = await measure_workers(config, registry.workers, folder.path.parent, watch)
                plan = plan_cluster(config, model, _memory(config, registry, launcher), measured)
                watch(PlanMade(tuple(plan_lines(plan))))
                async with _pipeline(config, model, plan, registry, launch.credentials, watch) as pipeline:
                    settings = scheduler_settings(config, model, plan)
                    async with Engine(pipeline, settings, EngineSettings(request_s=config.timeouts.request)) as engine:
                        yield Cluster(config, model, plan, registry, launcher, engine)


def _registry(config: ClusterConfig, launch: Launch) -> Registry:
    """Workers show so many signs of life that a few may come late."""
    silence_s = config.timeouts.worker
    heartbeat_s = min(_HEARTBEAT_S, silence_s / _HEARTBEATS)
    return Registry(
        launch.listen,
        launch.credentials,
        silence_s=silence_s,
        deadlines=Deadlines(heartbeat_s=heartbeat_s, coordinator_s=launch.coordinator_s),
        last_words=launch.launcher.last_words,
        welcomes=launch.welcomes,
        certify=launch.certify,
    )


@asynccontextmanager
async def _stopping(launcher: Launcher) -> AsyncIterator[None]:
    """Ends the workers last: those that heard the registry's goodbye have gone by then."""
    try:
        yield
    finally:
        await launcher.stop()


def _memory(config: ClusterConfig, registry: Registry, launcher: Launcher) -> dict[str, int]:
    """What each worker may take of its machine, which others may share with it."""
    registrations = {worker.name: registry.workers[worker.name].registration for worker in config.workers}
    here = launcher.free_memory_bytes()
    if here is None:
        return machine_shares(registrations)
    free = {name: one.free_memory_bytes for name, one in registrations.items()}
    return memory_shares({one.name: None if one.memory is None else free[one.name] for one in config.workers}, here)


@asynccontextmanager
async def _pipeline(
    config: ClusterConfig, model: Model, plan: Plan, registry: Registry, credentials: Credentials, watch: Watch
) -> AsyncIterator[RemotePipeline]:
    """The plan's stages, loaded and connected."""

    def tell(worker: str, progress: LoadProgress) -> None:
        stage = next(stage for stage in plan.stages if stage.worker == worker)
        watch(WorkerLoading(worker, stage.start, stage.end, progress.done_bytes, progress.total_bytes))

    workers = await load_stages(
        _EPOCH,
        [StageInfo(stage.worker, stage.start, stage.end) for stage in plan.stages],
        registry.workers,
        model_path=str(model.file.path),
        model_id=model.model_id,
        limits=stage_limits(config, plan),
        on_progress=tell,
    )
    for handle in workers:
        order, loaded = handle.stages[_EPOCH]
        watch(WorkerLoading(handle.name, order.start, order.end, loaded.weight_bytes, loaded.weight_bytes))
    pipeline = await RemotePipeline.open(_EPOCH, workers, credentials)
    try:
        yield pipeline
    finally:
        await pipeline.close()

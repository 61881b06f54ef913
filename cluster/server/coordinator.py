"""A running cluster: starts workers, measures, opens the first epoch and the engine; undoes it all at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.epochs import Epochs, EpochWorkers
from llamaclust.cluster.control.limits import check_plan
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.control.resources.link_profiling import MeasureLinks, hops_matter, measure_links
from llamaclust.cluster.control.resources.profiling import WorkerProfiles
from llamaclust.cluster.control.supervisor import Supervisor
from llamaclust.cluster.control.worker_pool import SupervisedWorkers, WorkerPool
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.launchers.worker_settings import worker_settings
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.scheduler.settings import EngineSettings
from llamaclust.cluster.server.worker_metrics import WorkerMetrics
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Report
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, WorkerError
from llamaclust.core.profile import Profile
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Deadlines
from llamaclust.wire.rpc.sched_slice import short_slices

_HEARTBEAT_S = 1.0
_HEARTBEATS = 5
"""In the heartbeat timeout."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What runs while `open_cluster` is entered."""

    config: ClusterConfig
    model: Model
    registry: Registry
    launcher: Launcher
    pool: WorkerPool
    supervisor: Supervisor
    engine: Engine
    record: ControlRecord

    @property
    def plan(self) -> Plan:
        """Of the epoch that serves, or served last."""
        return self.supervisor.epoch.plan


@asynccontextmanager
async def open_cluster(
    config: ClusterConfig,
    model_path: Path,
    folder: ClusterDir,
    report: Report = lambda event: None,
    make_planner: type[ClusterPlanner] = ClusterPlanner,
) -> AsyncIterator[Cluster]:
    """A cluster that is ready for requests. The caller holds `folder`'s lock. On the way out every worker ends.

    Raises InsufficientMemoryError, ModelFileError, WorkerError or DeadlineError where a start fails; nothing is left
    running."""
    with short_slices(), _launching(config, folder, report) as launcher:
        record = ControlRecord.begin(folder.control)
        registry = _registry(config, launcher, record)
        adapters = [adapter.path for adapter in config.adapters]
        model = await asyncio.to_thread(Model.open, model_path, config.chat_template, adapters)
        with closing(model):
            check_plan(config, model)
            launcher.check(worker_settings(config), model)
            async with launcher, registry:  # workers that got the registry's goodbye have gone when the launcher stops
                await launcher.start(worker_settings(config), registry.address, registry.process_exited)
                named = asyncio.to_thread(lambda: model.tokenizer)  # a bad one is named now
                planner = make_planner(config, model, WorkerProfiles(config, model, folder.path.parent, report))
                shortfall = partial(_shortfall, planner, registry, record.drained)
                await asyncio.gather(launcher.joined(registry, shortfall), named)
                workers = registry.present
                if not (folder.has_requests and planner.profiles.estimate(workers)):
                    await planner.profiles.measure(workers, workers)  # else requests wait for the cluster
                planner.free_bytes = launcher.free_memory_bytes()
                meter = _link_meter(config, planner.profiles.of(workers), launcher, folder, report)
                if meter is not None:
                    planner.update(await meter(registry.present))
                epochs = Epochs(config, model, EpochWorkers(registry, launcher.credentials, record))
                start_s = 0.0 if config.launcher == "local" else config.join.wait
                supervised = SupervisedWorkers(registry, launcher, record, start_s, meter)
                pool = WorkerPool(config, supervised, report)
                supervisor = Supervisor(config, epochs, planner, pool, report)
                async with _supervised(pool), _engine(config, supervisor) as engine:
                    engine.metrics.registry.register(WorkerMetrics(lambda: registry.workers))
                    yield Cluster(config, model, registry, launcher, pool, supervisor, engine, record)


async def _shortfall(planner: ClusterPlanner, registry: Registry, drained: frozenset[str]) -> LlamaclustError | None:
    """Why the present workers that are not drained cannot hold the model, by what they report; None where they can."""
    try:
        await planner.plan({name: worker for name, worker in registry.present.items() if name not in drained})
    except (InsufficientMemoryError, WorkerError) as error:
        return error
    return None


@contextmanager
def _launching(config: ClusterConfig, folder: ClusterDir, report: Report) -> Iterator[Launcher]:
    """The launcher of a cluster file; what it needs on disk is there meanwhile. The caller holds `folder`'s lock."""
    match config.launcher:
        case "local":
            with run_directory(folder.path) as run:
                yield LocalLauncher(run, folder.logs)
        case "static":
            from llamaclust.cluster.launchers.static import StaticLauncher

            yield StaticLauncher(config, folder, report)
        case "ray":
            from llamaclust.cluster.launchers.ray import RayLauncher

            yield RayLauncher(config, folder, report)
        case "mpi":
            from llamaclust.cluster.launchers.mpi import MpiLauncher

            yield MpiLauncher(config, folder, report)


def _registry(config: ClusterConfig, launcher: Launcher, record: ControlRecord) -> Registry:
    """Workers send so many heartbeats that a few may be late."""
    timeout_s = config.timeouts.worker
    heartbeat_s = min(_HEARTBEAT_S, timeout_s / _HEARTBEATS)
    settings = JoinSettings(
        heartbeat_timeout_s=timeout_s,
        deadlines=Deadlines(heartbeat_s=heartbeat_s, coordinator_s=launcher.coordinator_s, peer_s=timeout_s),
        cluster=config.name,
        refusal=launcher.refusal,
        certify=launcher.certify,
        record=record,
    )
    return Registry(launcher.listen, launcher.credentials, launcher.last_error, settings)


def _link_meter(
    config: ClusterConfig, measured: Mapping[str, Profile], launcher: Launcher, folder: ClusterDir, report: Report
) -> MeasureLinks | None:
    """None where links are taken to be the usual ones."""
    if config.launcher == "local" and not hops_matter(measured):
        return None
    return partial(measure_links, credentials=launcher.credentials, state_dir=folder.path.parent, report=report)


@asynccontextmanager
async def _supervised(pool: WorkerPool) -> AsyncIterator[None]:
    """Lost workers are restarted where the launcher does that, and each is observed by the models' supervisors."""
    with pool.workers.launcher.restarting(pool.not_restarted), pool.partitions:
        async with aclosing(pool):
            pool.start()
            yield


@asynccontextmanager
async def _engine(config: ClusterConfig, supervisor: Supervisor) -> AsyncIterator[Engine]:
    """An engine whose pipeline the supervisor replaces when it is lost."""
    deadlines = EngineSettings(request_s=config.timeouts.request)
    async with aclosing(supervisor):
        first = await supervisor.start()
        try:
            async with Engine(first.pipeline, first.settings, deadlines, supervisor.pipeline_lost) as engine:
                supervising = asyncio.create_task(supervisor.run(engine))
                supervising.add_done_callback(partial(_broke, engine))
                try:
                    yield engine
                finally:
                    supervising.cancel()
                    await asyncio.gather(supervising, return_exceptions=True)
        finally:
            await supervisor.close_pipelines()


def _broke(engine: Engine, supervising: asyncio.Task[None]) -> None:
    error = None if supervising.cancelled() else supervising.exception()
    if error is not None:
        engine.break_down(error)

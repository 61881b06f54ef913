"""Opens a cluster: starts and measures the workers, loads the first model, and starts the engines. Closing the cluster
ends all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from prometheus_client import CollectorRegistry

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.sections import ModelEntry
from llamaclust.cluster.control.epochs import Epochs, EpochWorkers
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.model_lifecycle import ModelLifecycle, ModelRotation
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.control.pool.worker_pool import SupervisedWorkers, WorkerPool
from llamaclust.cluster.control.resources.link_profiling import MeasureLinks
from llamaclust.cluster.control.resources.profiling import WorkerProfiles, report_losses
from llamaclust.cluster.control.supervisor import Supervisor
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.pipeline import NoPipeline
from llamaclust.cluster.front.text.image_rows import RowLimits
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.launchers.models.row_memory import row_bytes, row_limits
from llamaclust.cluster.launchers.worker_settings import worker_settings
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.cluster.server.adapter_loader import AdapterLoader, OpenedModel, fixed_names
from llamaclust.cluster.server.contexts import choose_contexts, keep_contexts
from llamaclust.cluster.server.drafting import drafting
from llamaclust.cluster.server.start import launching, link_meter, named_errors, open_models, registry_of, weight_cache
from llamaclust.cluster.server.worker_metrics import WorkerMetrics
from llamaclust.cluster.state.adapters import AdapterRecord, ServedAdapters
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.cluster.state.journal_records import has_unanswered
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, WorkerError
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import Projector
from llamaclust.model.weights.file_manifests import FileManifests
from llamaclust.wire.rpc.sched_slice import short_slices


@dataclass(frozen=True, slots=True)
class ServedModel:
    config: ClusterConfig
    model: Model
    supervisor: Supervisor
    engine: Engine
    loader: AdapterLoader

    @property
    def name(self) -> str:
        return self.config.model_name

    @property
    def adapters(self) -> ServedAdapters:
        return self.loader.adapters

    @property
    def plan(self) -> Plan | None:
        return self.supervisor.plan

    @property
    def context_length(self) -> int:
        return self.engine.scheduler.settings.context_length


@dataclass(frozen=True, slots=True)
class Cluster:
    config: ClusterConfig
    registry: Registry
    launcher: Launcher
    pool: WorkerPool
    record: ControlRecord
    models: tuple[ServedModel, ...]
    rotation: ModelRotation
    row_limits: RowLimits
    metrics: CollectorRegistry  # Metrics that belong to no single model.

    @property
    def model(self) -> Model:
        return self.models[0].model

    @property
    def supervisor(self) -> Supervisor:
        return self.models[0].supervisor

    @property
    def engine(self) -> Engine:
        return self.models[0].engine

    @property
    def plan(self) -> Plan:
        assert self.supervisor.plan is not None
        return self.supervisor.plan


@asynccontextmanager
async def open_cluster(
    config: ClusterConfig,
    model_paths: Sequence[Path],
    folder: ClusterDir,
    report: Report = lambda event: None,
    make_planner: type[ClusterPlanner] = ClusterPlanner,
) -> AsyncIterator[Cluster]:
    """Yields a cluster that can compute requests. The caller must hold the lock of `folder`. Workers end when the
    context ends or an error is raised. Raises InsufficientMemoryError, ModelFileError, WorkerError or DeadlineError."""
    async with AsyncExitStack() as stack:
        stack.enter_context(short_slices())
        launcher = stack.enter_context(launching(config, folder, report))
        record = ControlRecord.begin(folder.control)
        registry = registry_of(config, launcher, record)
        owes_answers = await asyncio.to_thread(has_unanswered, folder.journal)
        config, models = await open_models(stack, config, model_paths, launcher, report, needs_all=owes_answers)
        # The draft model is loaded first. Workers on this machine get the memory that it leaves.
        drafts = await drafting(stack, models, report)
        adapter_record = AdapterRecord(folder.adapters)
        names = fixed_names(own for own, _ in models)
        opened = [await OpenedModel.restore(*of, adapter_record, names=names, report=report) for of in models]
        # The registry closes first and tells the workers to end, so they have ended when the launcher stops.
        await stack.enter_async_context(launcher)
        await stack.enter_async_context(registry)
        await launcher.start(worker_settings(config), registry.address, registry.process_exited)
        state_dir = folder.path.parent
        profiles = [WorkerProfiles(own, model, state_dir, report) for own, model in models]
        planners = [make_planner(of.config, of.adapted, own) for of, own in zip(opened, profiles, strict=True)]
        named = (asyncio.to_thread(getattr, model, "tokenizer") for _, model in models)
        # Tokenizers are loaded meanwhile, so that an invalid tokenizer is reported at the start.
        await asyncio.gather(_joined(planners, registry, launcher, record, report), *named)
        limits = row_limits(drafts.unused_bytes)
        of_rows = row_bytes(limits, (of.model for of in opened))
        meter = await _measured(planners, registry, launcher, folder, report, drafts.unused_bytes, of_rows)
        await _choose_images(planners, _undrained(registry, record.drained), report)
        keep_contexts(planners, record.contexts if folder.has_requests else {})
        if config.models:
            await choose_contexts(planners, _undrained(registry, record.drained))
        start_s = 0.0 if config.launcher_facts.is_local else config.join.wait
        supervised = SupervisedWorkers(registry, launcher, record, start_s, meter)
        pool = await stack.enter_async_context(_supervised(config, supervised, report))
        served = await _served(
            stack, opened, planners, drafts.settings, pool=pool, adapter_record=adapter_record, report=report
        )
        await record.keep_contexts({one.model.model_id: one.context_length for one in served})
        metrics = _cluster_metrics(served, registry)
        lifecycles = {one.name: _lifecycle(one, entry) for one, entry in zip_longest(served, config.models)}
        rotation = ModelRotation(lifecycles)
        if config.models:
            await stack.enter_async_context(rotation)
        yield Cluster(config, registry, launcher, pool, record, served, rotation, limits, metrics)


async def _joined(
    planners: Sequence[ClusterPlanner], registry: Registry, launcher: Launcher, record: ControlRecord, report: Report
) -> None:
    def shortfall(with_drained: bool) -> Awaitable[LlamaclustError | None]:
        return _shortfall(planners, registry.present if with_drained else _undrained(registry, record.drained))

    await launcher.joined(registry, shortfall)
    await _undrain_needed(planners, registry, record, report)


async def _undrain_needed(
    planners: Sequence[ClusterPlanner], registry: Registry, record: ControlRecord, report: Report
) -> None:
    """Makes drained workers available again, but only as many as the models need to fit."""
    drained = record.drained & registry.present.keys()
    if not drained or (short := await _shortfall(planners, _undrained(registry, drained))) is None:
        return
    if await _shortfall(planners, registry.present) is not None:
        return
    needed = set(drained)
    for name in sorted(drained, reverse=True):
        if await _shortfall(planners, _undrained(registry, drained - needed | {name})) is None:
            needed.remove(name)
    report(Notice(f"{', '.join(sorted(needed))}: drained, but needed, because the others do not suffice: {short}"))
    await record.drain(record.drained - needed)


async def _measured(
    planners: Sequence[ClusterPlanner],
    registry: Registry,
    launcher: Launcher,
    folder: ClusterDir,
    report: Report,
    unused_bytes: int,
    of_rows: int,
) -> MeasureLinks | None:
    """Measures workers and links, and gives the results to the planners. Returns the function that measures links
    again, or None if links are not measured."""
    workers = registry.present
    for planner in planners:
        if not (folder.has_requests and planner.profiles.estimate(workers)):
            # Requests of the last coordinator do not wait for a measurement if speeds can be estimated.
            await planner.profiles.measure(workers, workers)
    first, free_bytes = planners[0], launcher.free_memory_bytes()
    meter = link_meter(first.config, first.profiles.of(workers), launcher, folder, report)
    links = None if meter is None else await meter(registry.present)
    report_losses(workers.values(), "the start", report)
    for planner in planners:
        # A draft model may take `unused_bytes`, and image embeddings `of_rows` bytes.
        planner.free_bytes = None if free_bytes is None else max(0, free_bytes - unused_bytes - of_rows)
        planner.row_bytes = of_rows
        if links is not None:
            planner.update(links)
    return meter


async def _choose_images(
    planners: Sequence[ClusterPlanner], workers: Mapping[str, WorkerHandle], report: Report
) -> None:
    """Enables a model's image input if its image encoder fits into memory or the user chose its projector."""
    for planner in planners:
        if planner.config.mmproj is not None or not planner.reads_images:
            continue
        with suppress(InsufficientMemoryError, WorkerError):  # The start reports these errors.
            why = (await _planned(planner, workers)).no_images
            planner.encodes = not why
            if why:
                report(Notice(f"{planner.config.model_name}: images are not read: {why}"))
    is_unused = not any(planner.reads_images for planner in planners)
    for planner in planners:
        if planner.free_bytes is not None and is_unused:
            planner.free_bytes += planner.row_bytes
        planner.row_bytes = 0


async def _served(
    stack: AsyncExitStack,
    opened: Sequence[OpenedModel],
    planners: Sequence[ClusterPlanner],
    speculations: Sequence[SpeculationSettings | None],
    *,
    pool: WorkerPool,
    adapter_record: AdapterRecord,
    report: Report,
) -> tuple[ServedModel, ...]:
    """Starts the engines of all models. Loads the first model if `load_on_demand` is true, and otherwise none. Raises
    InsufficientMemoryError if a model does not fit."""
    config, workers = planners[0].config, pool.workers
    ledger = MemoryLedger(config.max_loaded_models)
    manifests = FileManifests(weight_cache())
    epoch_workers = EpochWorkers(workers.registry, workers.launcher.credentials, workers.record, manifests=manifests)
    present = _undrained(workers.registry, workers.record.drained)
    loaded = 1 if config.load_on_demand else 0
    plans = [*[None] * loaded, *[await _planned(planner, present) for planner in planners[loaded:]]]
    supervisors = []
    for planner, plan, speculation in zip(planners, plans, speculations, strict=True):
        planner.ledger = ledger
        planner.kept_context = planner.kept_context if plan is None else plan.context_length
        epochs = Epochs(planner.config, planner.model, epoch_workers, speculation)
        is_asleep = plan is not None
        supervisors.append(Supervisor(planner.config, epochs, planner, pool, report=report, is_asleep=is_asleep))
    pool.start()
    served: list[ServedModel] = []
    loaders: list[AdapterLoader] = []
    turn = asyncio.Lock()
    for model, runner in zip(opened, pool.runners, strict=True):
        loaders.append(AdapterLoader(model, runner, adapter_record, report, loaders, turn))
    for loader, plan, runner, supervisor in zip(loaders, plans, pool.runners, supervisors, strict=True):
        of, settings = loader.opened, None if plan is None else runner.epochs.settings(plan)
        projector = of.model.projector if runner.planner.reads_images else None
        engine = await stack.enter_async_context(_engine(of.config, projector, supervisor, settings))
        served.append(ServedModel(of.config, of.model, supervisor, engine, loader))
    return tuple(served)


def _cluster_metrics(models: Sequence[ServedModel], registry: Registry) -> CollectorRegistry:
    metrics = CollectorRegistry()

    def names() -> dict[str, str]:
        return {served.model.model_id: served.name for served in models}

    metrics.register(WorkerMetrics(lambda: registry.workers, names))
    for served in models:
        served.engine.metrics.cluster = metrics
    return metrics


def _lifecycle(served: ServedModel, entry: ModelEntry | None) -> ModelLifecycle:
    keep_alive_s = None if entry is None else entry.keep_alive
    return ModelLifecycle(served.name, served.supervisor.store, served.engine, keep_alive_s)


async def _shortfall(planners: Sequence[ClusterPlanner], workers: Mapping[str, WorkerHandle]) -> LlamaclustError | None:
    try:
        for planner in planners:
            await _planned(planner, workers)
    except (InsufficientMemoryError, WorkerError) as error:
        return error
    return None


def _undrained(registry: Registry, drained: frozenset[str]) -> dict[str, WorkerHandle]:
    return {name: worker for name, worker in registry.present.items() if name not in drained}


async def _planned(planner: ClusterPlanner, workers: Mapping[str, WorkerHandle]) -> Plan:
    with named_errors(planner.config):
        return await planner.plan(workers, needs_images=planner.config.mmproj is not None)


@asynccontextmanager
async def _supervised(config: ClusterConfig, workers: SupervisedWorkers, report: Report) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(config, workers, report)
    with workers.launcher.restarting(pool.not_restarted), pool.partitions:
        async with aclosing(pool):
            yield pool


@asynccontextmanager
async def _engine(
    config: ClusterConfig, projector: Projector | None, supervisor: Supervisor, sleeping: SchedulerSettings | None
) -> AsyncIterator[Engine]:
    """Yields a model's engine. Loads the model first if `sleeping` is None. Otherwise the model is asleep, and
    `sleeping` has the scheduler's settings until it is loaded."""
    deadlines = EngineSettings(request_s=config.timeouts.request)
    async with aclosing(supervisor):
        with named_errors(config):
            first = await supervisor.start() if sleeping is None else None
        try:
            pipeline, settings = (NoPipeline(), sleeping) if first is None else (first.pipeline, first.settings)
            assert settings is not None
            async with Engine(pipeline, settings, deadlines, supervisor, projector) as engine:
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
        engine.shut_down(error)

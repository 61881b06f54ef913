"""Opens epochs and frees the stages of older epochs. An epoch is the set of loaded, connected stages of one plan."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.failures.failure_attribution import root_cause, stage_of
from llamaclust.cluster.control.limits import plan_limits, scheduler_settings
from llamaclust.cluster.control.load_orders import StageLoads, load_orders
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.notices import refused_images
from llamaclust.cluster.control.observations import Suspect
from llamaclust.cluster.control.remote.model_copies import OwnCopy
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import (
    ModelReference,
    WantedBytes,
    adapter_files,
    announce_source,
    encoder_files,
    is_file_absent,
    weight_sources,
)
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import refresh_memory, set_adapters
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.planner.plan import Plan, StagePlan
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.events import Report, WorkerLoading
from llamaclust.core.epochs import epoch_text
from llamaclust.core.errors import (
    DeadlineError,
    LlamaclustError,
    LoadCancelledError,
    ModelFileError,
    StalledError,
    WorkerError,
)
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.loader import Model
from llamaclust.model.weights.file_manifests import FileManifests
from llamaclust.wire.control.messages import Load, Loaded, LoadProgress
from llamaclust.wire.control.weights import AdapterFile, EncoderFile, FindWeights
from llamaclust.wire.security.credentials import Credentials

_log = logging.getLogger(__name__)

_AdaptersOrder = tuple[WorkerHandle, int, tuple[AdapterFile, ...]]


class StageLoadError(Exception):
    """Loading the stages failed. `suspects` are the workers that may have caused the failure, if any are known."""

    def __init__(self, error: LlamaclustError, suspects: tuple[Suspect, ...]) -> None:
        super().__init__(str(error))
        self.error = error
        self.suspects = suspects


async def load_stages(
    loads: StageLoads,
    workers: Mapping[str, WorkerHandle],
    report: Report | None = None,
    is_useless: Callable[[], bool] | None = None,
) -> tuple[WorkerHandle, ...]:
    """Loads all stages, and returns their workers in the order of the stages. Raises StageLoadError if a load fails, or
    if `is_useless` returns True before a worker begins to load."""
    handles = tuple(workers[stage.worker] for stage in loads.stages)
    timeout_s = loads.progress_timeout_s
    # The keys of KV blocks on disk depend on the model file's content, so the workers' copies must be equal.
    keeps_kv = all(handle.registration.kv_disk_bytes for handle in handles)
    names = [handle.name for handle in handles]
    request = FindWeights(loads.model.path, loads.model.model_id)
    wanted = WantedBytes(request, loads.own, keeps_kv, loads.links, timeout_s)
    for handle in handles:
        handle.channel.end_silence()
    weights = await weight_sources(names, workers, wanted, report)
    _check_present(handles, timeout_s)
    adapters = await adapter_files(loads.adapters, names, workers)
    encoders = await encoder_files(loads.encoder, loads.encoding, workers, report)
    _check_present(handles, timeout_s)

    try:
        orders = load_orders(loads, handles, weights, adapters, encoders)
    except WorkerError as error:
        raise StageLoadError(error, (Suspect(error.worker or "", error),)) from error

    async def load(order: Load, handle: WorkerHandle) -> Loaded:
        def loading(progress: LoadProgress) -> None:
            if report is not None:
                done_bytes, total_bytes = progress.done_bytes, progress.total_bytes
                report(
                    WorkerLoading(handle.name, *order.limits.places(order.start, order.end), done_bytes, total_bytes)
                )

        if is_useless is not None and is_useless():
            raise LoadCancelledError(f"worker {handle.name}: its load is no longer needed")
        try:
            return await handle.load(order, loading, timeout_s)
        except StalledError as stalled:
            if not (handle.holds_others(order.model_id) and await _gives_up(handle, order.epoch)):
                raise
            raise DeadlineError(str(stalled)) from stalled

    answers = await asyncio.gather(*map(load, orders, handles), return_exceptions=True)
    suspects = _suspects(handles, answers)
    if suspects:
        for suspect in suspects:
            if isinstance(suspect.error, ModelFileError):
                workers[suspect.name].forget_files()
        if not loads.is_exclusive:  # The next epoch can use the weights of an exclusive load.
            await _discard(loads.epoch, handles)
        raise StageLoadError(suspects[0].error, suspects)
    return handles


def _check_present(handles: Sequence[WorkerHandle], timeout_s: float) -> None:
    """Raises StageLoadError if workers are lost or silent, because loads of the other workers would be useless."""
    absent: list[Suspect] = []
    for handle in handles:
        if handle.loss is not None:
            absent.append(Suspect(handle.name, handle.error))
        elif handle.channel.is_silent:
            what = f"worker {handle.name} did not say within {timeout_s:g} s (timeouts.load) which weights it has"
            absent.append(Suspect(handle.name, StalledError(what)))
    if absent:
        raise StageLoadError(absent[0].error, tuple(absent))


async def _gives_up(worker: WorkerHandle, epoch: int) -> bool:
    try:
        await worker.unload(epoch)
    except LlamaclustError:
        return False
    return True


def _suspects(handles: Sequence[WorkerHandle], answers: Sequence[Loaded | BaseException]) -> tuple[Suspect, ...]:
    suspects = []
    for handle, answer in zip(handles, answers, strict=True):
        if isinstance(answer, LlamaclustError):
            suspects.append(Suspect(handle.name, answer))
        elif isinstance(answer, BaseException):
            raise answer
    return tuple(suspects)


async def unload_stages(epoch: int, workers: Iterable[WorkerHandle]) -> None:
    present = [worker for worker in workers if epoch in worker.stages and worker.loss is None]
    await _all(_unload(worker, epoch) for worker in present)


async def _all(work: Iterable[Awaitable[None]]) -> None:
    for error in filter(None, await asyncio.gather(*work, return_exceptions=True)):
        raise error


async def _discard(epoch: int, workers: Iterable[WorkerHandle]) -> None:
    try:
        await unload_stages(epoch, workers)
    except LlamaclustError as error:
        _log.warning("layers of epoch %s stay in memory: %s", epoch_text(epoch), error)


async def _unload(worker: WorkerHandle, epoch: int) -> None:
    try:
        await worker.unload(epoch)
    except WorkerError:
        if worker.loss is None:  # The memory of a lost worker is free in any case.
            raise


@dataclass(frozen=True, slots=True)
class Epoch:
    number: int
    plan: Plan
    workers: tuple[WorkerHandle, ...]  # Workers in the order of their stages.
    pipeline: RemotePipeline
    settings: SchedulerSettings  # Settings that the stages were loaded with.

    @property
    def root_cause(self) -> WorkerHandle | None:
        return root_cause(self.number, self.workers)

    @property
    def chain(self) -> tuple[WorkerHandle, ...]:
        held = zip(self.workers, self.plan.stages, strict=True)
        return tuple(worker for worker, stage in held if stage.member == 0)

    def stage_of(self, worker: WorkerHandle) -> int | None:
        """Returns the index of the worker's stage, or None if it has none. Members of a group have the same index."""
        if worker not in self.workers:
            return None
        return sum(stage.member == 0 for stage in self.plan.stages[: self.workers.index(worker) + 1]) - 1

    def holds(self, name: str) -> bool:
        return any(worker.name == name for worker in self.workers)


@dataclass(frozen=True, slots=True)
class EpochWorkers:
    """The workers that all models share. Callers hold the lock `turn` while they load or free stages."""

    registry: Registry
    credentials: Credentials
    record: ControlRecord
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    manifests: FileManifests = field(default_factory=FileManifests)  # Manifests of the coordinator's own model files.


def _stage_info(stage: StagePlan, expert_shards: int) -> StageInfo:
    return StageInfo(
        stage.worker,
        stage.start,
        stage.end,
        stage.device_layers,
        expert_shards,
        stage.shares,
        stage.member,
        stage.encoder_bytes,
    )


async def _refresh(worker: WorkerHandle, ledger: MemoryLedger) -> None:
    with suppress(DeadlineError):
        await refresh_memory(worker, ledger.loaded(worker))


class Epochs:
    """Loads, connects and frees the stages of one model."""

    def __init__(
        self, config: ClusterConfig, model: Model, workers: EpochWorkers, speculation: SpeculationSettings | None
    ) -> None:
        self._config = config
        self._speculation = speculation
        self._model = model
        # All epochs share this mapping, which changes when adapters are loaded or unloaded.
        self.adapters = model.adapter_digests
        self._numbers: set[int] = set()  # Numbers of all epochs of this model.
        self._registry = workers.registry
        self._credentials = workers.credentials
        self._record = workers.record
        self._turn = workers.turn
        self._manifests = workers.manifests

    @property
    def model_id(self) -> str:
        return self._model.model_id

    @property
    def _reference(self) -> ModelReference:
        return ModelReference(str(self._model.plain.path), self._model.model_id)

    def _wanted_adapters(self, model: Model, links: Links = UNKNOWN) -> dict[int, WantedBytes]:
        path, model_id, timeout_s = str(model.plain.path), model.model_id, self._config.timeouts.load
        files = [(number, AdapterFile(number, str(of.path), of.identity), of) for number, of in model.adapters.items()]
        requests = [(number, FindWeights(path, model_id, adapter=file), of) for number, file, of in files]
        return {
            number: WantedBytes(request, self._own_copy(of), links=links, progress_timeout_s=timeout_s)
            for number, request, of in requests
        }

    def _wanted_encoder(self, links: Links = UNKNOWN) -> WantedBytes | None:
        if (projector := self._model.projector) is None:
            return None
        file = EncoderFile(str(projector.plain.path), projector.identity)
        request = FindWeights(str(self._model.plain.path), self._model.model_id, encoder=file)
        timeout_s = self._config.timeouts.load
        return WantedBytes(request, self._own_copy(projector.plain), links=links, progress_timeout_s=timeout_s)

    def settings(self, plan: Plan) -> SchedulerSettings:
        return scheduler_settings(self._config, self._model, plan, self._speculation, self.adapters)

    async def set_adapters(self, model: Model) -> None:
        """Loads the adapters of `model` on all stages. On failure, restores the old adapters and raises the error."""
        async with self._turn:
            try:
                await self._set_adapters(model)
            except BaseException:
                with suppress(LlamaclustError):
                    await self._set_adapters(self._model)
                raise
            self._model = model
            self.adapters.clear()
            self.adapters.update(model.adapter_digests)

    async def _set_adapters(self, model: Model) -> None:
        holders = {name: worker for name, worker in self._registry.present.items() if self._numbers & {*worker.stages}}
        if not holders:
            raise WorkerError(f"model {self._config.model_name} is not loaded now: try again")
        files = await adapter_files(self._wanted_adapters(model), holders, self._registry.workers)
        followers: list[_AdaptersOrder] = []
        others: list[_AdaptersOrder] = []
        for name, worker in holders.items():
            for epoch in self._numbers & {*worker.stages}:
                orders = followers if stage_of(epoch, worker).member else others
                orders.append((worker, epoch, files[name]))
        # A group's leader comes later, because its steps tell the other members which adapters to use.
        for orders in (followers, others):
            await _all(set_adapters(*order) for order in orders)

    @property
    def held_layers(self) -> dict[str, tuple[float, float]]:
        """The half-open range of layers in each worker's newest stage of this model, by worker name."""
        workers = self._registry.present
        newest = {name: max(held) for name, worker in workers.items() if (held := self._numbers & set(worker.stages))}
        return {name: workers[name].layers_of(epoch) for name, epoch in newest.items()}

    def _own_copy(self, file: ModelFile) -> OwnCopy | None:
        return OwnCopy(file, self._manifests, self._registry.giver) if file.is_current else None

    @property
    def file_is_absent(self) -> bool:
        own = self._own_copy(self._model.plain)
        return (own is None or not own.can_give) and is_file_absent(self._registry.present, self._model.model_id)

    async def announce(self, worker: WorkerHandle) -> None:
        path, model_id = str(self._model.plain.path), self._model.model_id
        wanted = (*self._wanted_adapters(self._model).values(), self._wanted_encoder())
        for request in (FindWeights(path, model_id), *(each.request for each in wanted if each is not None)):
            await announce_source(worker, self._registry.present.values(), request)

    async def open(
        self,
        plan: Plan,
        links: Links,
        *,
        is_exclusive: bool,
        is_useless: Callable[[], bool],
        report: Report | None = None,
    ) -> Epoch:
        """Loads and connects the stages of `plan`, and reports progress to `report`. Raises StageLoadError if a stage
        cannot be loaded or connected, or if `is_useless` returns True before a worker begins to load."""
        async with self._turn:
            return await self._open(plan, links, report, is_useless, is_exclusive=is_exclusive)

    async def _open(
        self, plan: Plan, links: Links, report: Report | None, is_useless: Callable[[], bool], *, is_exclusive: bool
    ) -> Epoch:
        number = self._record.next_epoch()
        self._numbers.add(number)
        loads = StageLoads(
            number,
            [_stage_info(stage, plan.expert_shards) for stage in plan.stages],
            self._reference,
            plan_limits(self._config, plan, self._model),
            is_exclusive=is_exclusive,
            links=links,
            progress_timeout_s=self._config.timeouts.load,
            own=self._own_copy(self._model.plain),
            adapters=self._wanted_adapters(self._model, links),
            encoder=self._wanted_encoder(links),
        )
        workers = await load_stages(loads, self._registry.workers, report, is_useless)
        try:
            refused = refused_images(plan.no_images) if plan.no_images else ""
            pipeline = await RemotePipeline.open(number, workers, self._credentials, refused)
        except LlamaclustError as error:
            if not is_exclusive:
                await _discard(number, workers)
            suspects = tuple(Suspect(worker.name, error) for worker in workers if worker.name == error.worker)
            raise StageLoadError(error, suspects) from error
        return Epoch(number, plan, workers, pipeline, self.settings(plan))

    def cancel_loads(self) -> None:
        for worker in self._registry.present.values():
            worker.cancel_load(self._model.model_id)

    async def refresh_memory(self, names: Iterable[str], ledger: MemoryLedger) -> None:
        async with self._turn:
            await asyncio.gather(*(_refresh(self._registry.workers[name], ledger) for name in names))

    async def free_others(self, epoch: Epoch | None) -> None:
        workers, kept = tuple(self._registry.present.values()), set() if epoch is None else {epoch.number}
        numbers = {number for worker in workers for number in worker.stages if number in self._numbers} - kept
        if not numbers:  # Without this check, the method would wait for another model's load.
            return
        async with self._turn:
            await _all(unload_stages(number, workers) for number in numbers)

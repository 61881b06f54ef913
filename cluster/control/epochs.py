"""An epoch: the stages of one plan, loaded on their workers and connected. Opens epochs, frees those of older ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.failure_attribution import root_cause
from llamaclust.cluster.control.limits import scheduler_settings, stage_limits
from llamaclust.cluster.control.observations import Suspect
from llamaclust.cluster.control.remote_pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference, announce_source, is_file_absent, weight_sources
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import PROGRESS_TIMEOUT_S, WorkerHandle
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.errors import LlamaclustError, WorkerError
from llamaclust.core.limits import StageLimits
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import FindWeightsProgress, Load, Loaded, LoadProgress
from llamaclust.wire.security.credentials import Credentials

_log = logging.getLogger(__name__)


class LoadObserver(Protocol):
    """Observes how far workers are."""

    def loading(self, worker: str, progress: LoadProgress) -> None: ...

    def reading(self, worker: str, progress: FindWeightsProgress) -> None:
        """The worker reads its model file for others."""
        ...


class StageLoadError(Exception):
    """Workers that did not load. `error` is the first one's."""

    def __init__(self, error: LlamaclustError, suspects: tuple[Suspect, ...]) -> None:
        super().__init__(str(error))
        self.error = error
        self.suspects = suspects


@dataclass(frozen=True, slots=True)
class StageLoads:
    """The stages of an epoch. `is_exclusive`: the workers' stages of other epochs are freed first, except weights that
    serve again. `links` order the sources of weights."""

    epoch: int
    stages: Sequence[StageInfo]
    model: ModelReference
    limits: StageLimits
    is_exclusive: bool = False
    links: Links = UNKNOWN
    progress_timeout_s: float = PROGRESS_TIMEOUT_S


async def load_stages(
    loads: StageLoads, workers: Mapping[str, WorkerHandle], observer: LoadObserver | None = None
) -> tuple[WorkerHandle, ...]:
    """The workers in the order of their stages, ready to serve the epoch.

    StageLoadError once all have answered, where a worker failed. Then loaded stages are freed, except `is_exclusive`:
    the next epoch may need their weights.
    """
    handles = tuple(workers[stage.worker] for stage in loads.stages)
    names = [handle.name for handle in handles]
    timeout_s = loads.progress_timeout_s
    weights = await weight_sources(
        names, workers, loads.model, links=loads.links, observer=observer, progress_timeout_s=timeout_s
    )
    orders = [
        replace(order, weights=weights.get(name)) for name, order in zip(names, _orders(loads, handles), strict=True)
    ]
    answers = await asyncio.gather(
        *(
            handle.load(order, None if observer is None else partial(observer.loading, handle.name), timeout_s)
            for handle, order in zip(handles, orders, strict=True)
        ),
        return_exceptions=True,
    )
    errors = _errors(handles, answers)
    if errors:
        if not loads.is_exclusive:
            await _discard(loads.epoch, handles)
        raise StageLoadError(errors[0][1], tuple(Suspect(handle.name, error) for handle, error in errors))
    return handles


def _errors(
    handles: Sequence[WorkerHandle], answers: Sequence[Loaded | BaseException]
) -> list[tuple[WorkerHandle, LlamaclustError]]:
    """Any other exception is a bug, and raised."""
    errors = []
    for handle, answer in zip(handles, answers, strict=True):
        if isinstance(answer, LlamaclustError):
            errors.append((handle, answer))
        elif isinstance(answer, BaseException):
            raise answer
    return errors


def _orders(loads: StageLoads, handles: Sequence[WorkerHandle]) -> list[Load]:
    """In the order of the stages."""
    orders = []
    for index, stage in enumerate(loads.stages):
        order = Load(
            loads.epoch,
            loads.model.path,
            loads.model.model_id,
            stage.start,
            stage.end,
            loads.limits,
            None,
            exclusive=loads.is_exclusive,
            devices=stage.devices,
        )
        orders.append(_with_neighbours(order, handles, index))
    return orders


def _with_neighbours(order: Load, handles: Sequence[WorkerHandle], index: int) -> Load:
    """With the stages that the one at `index` calls and is called by."""
    is_first, is_last = index == 0, index + 1 == len(handles)
    following = None if is_last else handles[index + 1]
    first = handles[0] if is_last and not is_first else None
    return replace(
        order,
        next_address=following.registration.address if following else None,
        next_worker=following.name if following else None,
        first_address=first.registration.address if first else None,
        first_worker=first.name if first else None,
        previous_worker=None if is_first else handles[index - 1].name,
        last_worker=handles[-1].name if is_first and not is_last else None,
    )


async def unload_stages(epoch: int, workers: Iterable[WorkerHandle]) -> None:
    """Frees the stages of an epoch on those workers that have it and are present. Raises the first error once all have
    answered."""
    present = [worker for worker in workers if epoch in worker.stages and worker.loss is None]
    answers = await asyncio.gather(*(_unload(worker, epoch) for worker in present), return_exceptions=True)
    for error in filter(None, answers):
        raise error


async def _discard(epoch: int, workers: Iterable[WorkerHandle]) -> None:
    """Frees stages of an epoch that did not load; the failure of the load matters more than one of this."""
    try:
        await unload_stages(epoch, workers)
    except LlamaclustError as error:
        _log.warning("layers of epoch %d stay in memory: %s", epoch, error)


async def _unload(worker: WorkerHandle, epoch: int) -> None:
    try:
        await worker.unload(epoch)
    except WorkerError:
        if worker.loss is None:  # a lost worker holds nothing
            raise


@dataclass(frozen=True, slots=True)
class Epoch:
    """Stages that serve, or did."""

    number: int
    plan: Plan
    workers: tuple[WorkerHandle, ...]  # in the order of their stages
    pipeline: RemotePipeline
    settings: SchedulerSettings  # that its stages were loaded for

    @property
    def root_cause(self) -> WorkerHandle | None:
        """The worker whose loss ended it, if any."""
        return root_cause(self.number, self.workers)

    def holds(self, name: str) -> bool:
        return any(worker.name == name for worker in self.workers)


class Epochs:
    """Opens epochs of one cluster, each with a number of its own."""

    def __init__(self, config: ClusterConfig, model: Model, registry: Registry, credentials: Credentials) -> None:
        self._config = config
        self._model = model
        self._reference = ModelReference(str(model.file.path), model.model_id)
        self._registry = registry
        self._credentials = credentials
        self._last = 0

    @property
    def file_is_absent(self) -> bool:
        return is_file_absent(self._registry.present, self._model.model_id)

    async def announce(self, worker: WorkerHandle) -> None:
        """A worker has joined: those that fetch weights may fetch them there."""
        await announce_source(worker, self._registry.present.values(), self._reference)

    async def open(
        self, plan: Plan, links: Links, *, is_exclusive: bool, observer: LoadObserver | None = None
    ) -> Epoch:
        """The plan's stages, loaded and connected. Raises StageLoadError."""
        self._last += 1
        number = self._last
        loads = StageLoads(
            number,
            [StageInfo(stage.worker, stage.start, stage.end, stage.device_layers) for stage in plan.stages],
            self._reference,
            stage_limits(self._config, plan),
            is_exclusive=is_exclusive,
            links=links,
            progress_timeout_s=self._config.timeouts.load,
        )
        workers = await load_stages(loads, self._registry.workers, observer)
        try:
            pipeline = await RemotePipeline.open(number, workers, self._credentials)
        except LlamaclustError as error:
            if not is_exclusive:
                await _discard(number, workers)
            suspects = tuple(Suspect(worker.name, error) for worker in workers if worker.name == error.worker)
            raise StageLoadError(error, suspects) from error
        return Epoch(number, plan, workers, pipeline, scheduler_settings(self._config, self._model, plan))

    async def free_others(self, epoch: Epoch) -> None:
        """Frees the stages of all epochs but this one. Raises the first error once all have answered."""
        workers = tuple(self._registry.present.values())
        numbers = {number for worker in workers for number in worker.stages} - {epoch.number}
        answers = await asyncio.gather(*(unload_stages(number, workers) for number in numbers), return_exceptions=True)
        for error in filter(None, answers):
            raise error

"""An epoch: the stages of one plan, loaded and connected. Opens epochs, and frees the stages of older ones."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.failure_attribution import root_cause
from llamaclust.cluster.control.limits import scheduler_settings, stage_limits
from llamaclust.cluster.control.loading import LoadObserver, StageLoadError, StageLoads, load_stages, unload_stages
from llamaclust.cluster.control.observations import Suspect
from llamaclust.cluster.control.remote_pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference, announce_source, is_file_absent
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.errors import LlamaclustError
from llamaclust.model.loader import Model
from llamaclust.wire.security.credentials import Credentials


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
                await unload_stages(number, workers)
            suspects = tuple(Suspect(worker.name, error) for worker in workers if worker.name == error.worker)
            raise StageLoadError(error, suspects) from error
        return Epoch(number, plan, workers, pipeline, scheduler_settings(self._config, self._model, plan))

    async def free_others(self, epoch: Epoch) -> None:
        """Frees the stages of all epochs but this one."""
        others = [(number, worker) for worker in self._registry.present.values() for number in worker.stages]
        await asyncio.gather(*(unload_stages(number, [worker]) for number, worker in others if number != epoch.number))

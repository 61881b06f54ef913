"""An epoch: the stages of one plan, loaded and connected. Opens them, and frees what others have left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.failure_attribution import lost_in
from llamaclust.cluster.control.limits import scheduler_settings, stage_limits
from llamaclust.cluster.control.loading import OnError, OnProgress, load_stages, unload_stages
from llamaclust.cluster.control.remote_pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import OnReading, file_is_away, tell_source
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.gpus import DeviceLayers
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
    def lost(self) -> list[WorkerHandle]:
        """The cause first."""
        return lost_in(self.number, self.workers)

    def holds(self, name: str) -> bool:
        return any(worker.name == name for worker in self.workers)

    def is_as(self, plan: Plan) -> bool:
        """Whether a plan gives the same layers to the same workers, all of which are there."""
        return not self.lost and _layers(plan) == _layers(self.plan)


def _layers(plan: Plan) -> list[tuple[str, int, int, tuple[DeviceLayers, ...]]]:
    return [(one.worker, one.start, one.end, one.device_layers) for one in plan.stages]


class Epochs:
    """Opens epochs of one cluster, each with a number of its own."""

    def __init__(self, config: ClusterConfig, model: Model, registry: Registry, credentials: Credentials) -> None:
        self._config = config
        self._model = model
        self._registry = registry
        self._credentials = credentials
        self._last = 0
        self._telling: set[asyncio.Task[None]] = set()

    @property
    def file_is_away(self) -> bool:
        return file_is_away(self._registry.present, self._model.model_id)

    def joined(self, worker: WorkerHandle) -> None:
        """Those who fetch weights hear of one that is here, or back under another address."""
        workers = self._registry.present.values()
        telling = asyncio.create_task(tell_source(worker, workers, str(self._model.file.path), self._model.model_id))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def open(
        self,
        plan: Plan,
        links: Links,
        *,
        alone: bool,
        on_progress: OnProgress,
        on_reading: OnReading,
        on_error: OnError,
    ) -> Epoch:
        """The plan's stages, loaded and connected; `alone`: older stages are freed first. Raises what `load_stages` and
        `RemotePipeline.open` do."""
        self._last += 1
        number = self._last
        workers = await load_stages(
            number,
            [StageInfo(stage.worker, stage.start, stage.end, stage.device_layers) for stage in plan.stages],
            self._registry.workers,
            model_path=str(self._model.file.path),
            model_id=self._model.model_id,
            limits=stage_limits(self._config, plan),
            alone=alone,
            links=links,
            on_progress=on_progress,
            on_reading=on_reading,
            on_error=on_error,
            stall_s=self._config.timeouts.load,
        )
        try:
            pipeline = await RemotePipeline.open(number, workers, self._credentials)
        except LlamaclustError as error:
            for worker in workers:
                if worker.name == error.worker:
                    on_error(worker, error)
            if not alone:
                await unload_stages(number, workers)
            raise
        return Epoch(number, plan, workers, pipeline, scheduler_settings(self._config, self._model, plan))

    async def free_others(self, epoch: Epoch) -> None:
        """Frees the stages of all epochs but this one."""
        others = [(number, worker) for worker in self._registry.present.values() for number in worker.stages]
        await asyncio.gather(*(unload_stages(number, [worker]) for number, worker in others if number != epoch.number))


def missing_layers(plan: Plan, workers: Iterable[WorkerHandle]) -> dict[str, int]:
    """How many layers each of the plan's workers has to load."""
    held = {worker.name: worker.layers or (0, 0) for worker in workers}
    return {
        stage.worker: sum(
            not held[stage.worker][0] <= layer < held[stage.worker][1] for layer in range(stage.start, stage.end)
        )
        for stage in plan.stages
    }

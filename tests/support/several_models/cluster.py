"""A cluster of several models on two worker processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.planning import ClusterPlanner, ClusterResources
from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Event, Notice
from support.clusters.recovering import CONTEXT, Answer, Recovering, answer_of, config
from support.models.tiny_model import build_tiny_model

BUDGET = 36 << 20
"""Bytes of both workers together: one of the models fits, two do not."""
AWAKE, ASLEEP = EngineState.READY, EngineState.ASLEEP


class TightPlanner(ClusterPlanner):
    """A planner of workers with little memory."""

    def resources(self, workers: Mapping[str, WorkerHandle], partitions: Pairs = frozenset()) -> ClusterResources:
        return replace(super().resources(workers, partitions), free_bytes=BUDGET)


@dataclass
class Models:
    """A cluster of the models a and b on two workers."""

    run: Recovering
    largest_bytes: int = 0  # that a worker held, as it reported
    most_models: int = 0  # whose stages workers held at the same time

    @property
    def cluster(self) -> Cluster:
        return self.run.cluster

    @property
    def states(self) -> list[EngineState]:
        return [served.engine.state for served in self.cluster.models]

    async def answer(self, model: int, request: GenerationRequest) -> Answer:
        return await answer_of(self.cluster.models[model].engine.submit(request))

    async def watch(self) -> None:
        while True:
            workers = self.cluster.registry.workers.values()
            self.largest_bytes = max(self.largest_bytes, *(worker.held_bytes for worker in workers))
            held = {order.model_id for worker in workers for order, _ in worker.stages.values()}
            self.most_models = max(self.most_models, len(held))
            await asyncio.sleep(0.002)

    async def until(self, *states: EngineState) -> None:
        """Waits until the models have these states, and those that sleep hold no memory any more."""
        lifecycles = self.cluster.rotation.lifecycles.values()

        def reached() -> bool:
            asleep = [lifecycle.is_asleep for lifecycle in lifecycles]
            return self.states == list(states) and asleep == [state is ASLEEP for state in states]

        await self.run.until(f"models {states}", reached)


@asynccontextmanager
async def models(
    files: list[Path], folder: Path, *, tight: bool, keys: Mapping[str, object] | None = None, **entry: object
) -> AsyncIterator[Models]:
    """Runs a cluster of these models. `keys`: further ones of the cluster file; `entry`: of each model."""
    values = config(files[0], folder, workers=2, max_sequences=4).model_dump(exclude={"model"}, exclude_unset=True)
    entries = [{"model": str(file), **entry} for file in files]
    settings = ClusterConfig.model_validate({**values, "models": entries, **(keys or {})})
    told: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Notice):
            told.append(event.text)

    directory, planner = ClusterDir(folder / settings.name), TightPlanner if tight else ClusterPlanner
    with directory.locked():
        async with (
            asyncio.timeout(120),
            open_cluster(settings, files, directory, report, planner) as cluster,
        ):
            found = Models(Recovering(cluster, told))
            watching = asyncio.create_task(found.watch())
            try:
                yield found
            finally:
                watching.cancel()


def model_files(folder: Path) -> list[Path]:
    """Writes the files of the models a and b."""
    return [
        build_tiny_model(folder / f"{name}.gguf", layers=6, context=CONTEXT, seed=seed)
        for seed, name in enumerate("ab", 1)
    ]

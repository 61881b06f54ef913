"""Workers in this process with their own model files and caches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from llamaclust.cluster.control.epochs import StageLoadError, load_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.remote.model_copies import OwnCopy
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference, WantedBytes
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.launchers.run_directory import RunDirectory, run_directory
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.state.events import Report
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import open_projector
from llamaclust.wire.control.messages import Deadlines
from llamaclust.wire.control.weights import AdapterFile, EncoderFile, FindWeights
from llamaclust.worker.main import _run_started_worker
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.stage_runner import StageRunner
from support.clusters.real_cluster import LIMITS, microbatches, running

NOWHERE = "/nowhere/m.gguf"


@dataclass(frozen=True, slots=True)
class Members:
    """Starts workers in this process. Each worker has its own caches."""

    folder: Path
    run: RunDirectory
    registry: Registry

    def start(
        self, name: str, *, model_dir: Path | None = None, cache: str = "", fetches: bool = True
    ) -> asyncio.Task[str]:
        own = self.folder / (cache or name)
        settings = WorkerSettings(
            name=name,
            join=self.registry.address,
            token=self.run.token.value,
            listen=self.run.worker("abcde".index(name)),
            threads=1,
            packed_cache_dir=own / "packed",
            packed_cache_bytes=1 << 30,
            weights_dir=own / "weights",
            weights_bytes=1 << 30,
            model_dir=model_dir,
        )
        return asyncio.create_task(_run_started_worker(settings))

    async def load(
        self,
        model: Path,
        names: Sequence[str],
        cuts: Sequence[int],
        path: str = NOWHERE,
        adapters: Sequence[Path] = (),
        *,
        own: OwnCopy | None = None,
        report: Report | None = None,
        encoder: WantedBytes | None = None,
        epoch: int = 1,
        is_exclusive: bool = False,
    ) -> tuple[WorkerHandle, ...]:
        """Loads stages on the workers. The last worker also loads the encoder."""
        stages = [StageInfo(name, *layers) for name, layers in zip(names, pairwise(cuts), strict=True)]
        stages[-1] = replace(stages[-1], encoder_bytes=int(encoder is not None))
        opened = Model.open(model, adapters=adapters)
        wanted = {}
        for number, adapter in opened.adapters.items():
            file = AdapterFile(number, f"/nowhere/{adapter.path.name}", adapter.identity)
            copy = None if own is None else OwnCopy(adapter)
            wanted[number] = WantedBytes(FindWeights(path, opened.model_id, adapter=file), copy)
        reference = ModelReference(path, opened.model_id)
        loads = StageLoads(epoch, stages, reference, LIMITS, is_exclusive, own=own, adapters=wanted, encoder=encoder)
        try:
            return await load_stages(loads, self.registry.workers, report)
        except StageLoadError as failed:
            raise failed.error from failed


@asynccontextmanager
async def members(folder: Path) -> AsyncIterator[Members]:
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240
    with run_directory(folder) as run:
        registry = Registry(run.coordinator, run.token, lambda *_: "", JoinSettings(5.0, Deadlines(heartbeat_s=0.05)))
        async with registry:
            yield Members(folder, run, registry)


def projector_at(path: str, projector: Path, model: Path, own: OwnCopy | None = None) -> WantedBytes:
    """Returns a request for a projector that the coordinator has opened. Workers may have a file at `path`."""
    file = EncoderFile(path, open_projector(projector).identity)
    return WantedBytes(FindWeights(NOWHERE, Model.open(model).model_id, encoder=file), own)


async def results(cluster: Members, handles: Sequence[WorkerHandle], model: Path) -> list[object]:
    pipeline = await RemotePipeline.open(1, tuple(handles), cluster.run.token)
    work = microbatches(Model.open(model).model_id, 1, 8)
    async with running(pipeline) as at_work:
        for microbatch, inputs in work:
            pipeline.submit(ScheduledMicrobatch(microbatch, inputs))
        return [(await at_work.next_result()).rows for _ in work]


def alone(model: Path) -> list[object]:
    opened = Model.open(model)
    runner = StageRunner(CpuBackend(1), opened, 0, opened.layer_count, LIMITS)
    work = microbatches(opened.model_id, 1, 8)
    return [runner.finish(runner.run(microbatch, None), inputs) for microbatch, inputs in work]

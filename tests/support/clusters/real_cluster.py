"""A small cluster for tests: worker processes on this machine, a registry and a loaded pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llamaclust.cluster.control.epochs import StageLoadError, load_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import RunDirectory, run_directory
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.members import MemberLost
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask, ScoreTask
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Deadlines
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs
from llamaclust.worker.settings import WorkerSettings

LIMITS = StageLimits(max_batch_tokens=64, max_outputs=64, max_sequences=8, max_context_tokens=256, kv_blocks=64)
NAMES = ("a", "b", "c", "d", "e")


@dataclass(frozen=True, slots=True)
class RealCluster:
    run: RunDirectory
    launcher: LocalLauncher
    registry: Registry

    @property
    def pids(self) -> dict[str, int]:
        return {name: worker.registration.pid for name, worker in self.registry.workers.items()}

    async def load(self, model: Path, cuts: Sequence[int], epoch: int = 1) -> RemotePipeline:
        """Loads a pipeline with layers [cuts[0], cuts[1]) on worker a, [cuts[1], cuts[2]) on b and so on."""
        handles = await self.load_stages(model, cuts, epoch)
        return await RemotePipeline.open(epoch, handles, self.run.token)

    async def load_stages(self, model: Path, cuts: Sequence[int], epoch: int = 1) -> tuple[WorkerHandle, ...]:
        stages = [StageInfo(name, *layers) for name, layers in zip(NAMES, pairwise(cuts), strict=False)]
        model_id = Model.open(model).model_id
        loads = StageLoads(epoch, stages, ModelReference(str(model), model_id), LIMITS)
        try:
            return await load_stages(loads, self.registry.workers)
        except StageLoadError as failed:
            raise failed.error from failed


def losses(registry: Registry) -> list[str]:
    """Returns a list to which the name of each lost worker is appended."""
    lost: list[str] = []
    registry.subscribe(lambda event: lost.append(event.worker.name) if isinstance(event, MemberLost) else None)
    return lost


@asynccontextmanager
async def real_cluster(
    folder: Path,
    workers: int,
    *,
    device: str = "cpu",
    heartbeat_timeout_s: float = 20.0,
    deadlines: Deadlines | None = None,
) -> AsyncIterator[RealCluster]:
    """Yields a cluster that workers a, b, ... have joined; stops their processes afterwards."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    with run_directory(folder) as run:
        launcher = LocalLauncher(run, logs)
        settings = JoinSettings(heartbeat_timeout_s, deadlines or Deadlines())
        registry = Registry(run.coordinator, run.token, launcher.last_error, settings)
        specs = [WorkerSettings(name=name, device=device, threads=1) for name in NAMES[:workers]]
        try:
            async with registry:
                await launcher.start(specs, registry.address, registry.process_exited)
                await registry.wait_for(NAMES[:workers], 30.0)
                yield RealCluster(run, launcher, registry)
        finally:
            await launcher.stop()


def microbatches(model_id: str, epoch: int, steps: int) -> list[tuple[Microbatch, SamplingInputs]]:
    """Builds microbatches of two sequences: a prefill in chunks of 16, then decodes, with scored and sampled rows."""
    work = []
    tables = ((3, 2, 20, 6), (40, 8))
    for number in range(steps):
        chunks, tasks = [], []
        for sequence, table in enumerate(tables):
            tokens = tuple((7 * number + 3 * i + sequence) % 300 for i in range(16 if number < 2 else 1))
            position = 16 * number if number < 2 else 30 + number
            outputs = 3 if number == 1 else number // 2
            outputs = min(outputs, len(tokens))
            chunks.append(Chunk(tokens, position, table, outputs))
            tasks += [
                ScoreTask(5 + row, 2) if row % 2 else SampleTask(SamplingParams(0.8, 40), 11, sequence, position + row)
                for row in range(outputs)
            ]
        microbatch = Microbatch(model_id, epoch, number, tuple(chunks))
        work.append((microbatch, SamplingInputs(epoch, number, tuple(tasks))))
    return work


class Running:
    """A running pipeline, whose results are read one by one."""

    def __init__(self, pipeline: RemotePipeline) -> None:
        self._results: asyncio.Queue[Result] = asyncio.Queue()
        self._work = asyncio.create_task(pipeline.run(self._put))

    def _put(self, results: Sequence[Result]) -> None:
        for result in results:
            self._results.put_nowait(result)

    async def next_result(self) -> Result:
        """Returns the next result or raises the pipeline's error; raises TimeoutError after 60 s."""
        getting = asyncio.create_task(self._results.get())
        try:
            async with asyncio.timeout(60):
                await asyncio.wait((getting, self._work), return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                await self._work
            return await getting
        finally:
            getting.cancel()

    async def stop(self) -> None:
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)


@asynccontextmanager
async def running(pipeline: RemotePipeline) -> AsyncIterator[Running]:
    """Runs the pipeline within the context and closes it at the end."""
    work = Running(pipeline)
    try:
        yield work
    finally:
        await work.stop()
        await pipeline.close()

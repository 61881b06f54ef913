from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from statistics import median, quantiles

from runner.case import Case, Group, Measures, argument, option
from runner.options import existing, positive

from llamaclust.cluster.control.epochs import load_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs
from llamaclust.wire.rpc.deadlines import recurring_deadline
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.stage_runner import StageRunner

_RESULT_S = 60.0
_LIMITS = StageLimits(max_batch_tokens=64, max_outputs=16, max_sequences=16, max_context_tokens=512, kv_blocks=512)
_BLOCKS = _LIMITS.max_context_tokens // 16

Step = Callable[[Microbatch, SamplingInputs], Awaitable[Result]]


@dataclass(frozen=True)
class Hop(Case):
    """Measures the cost of a hop: decode microbatches through a local stage, one worker, or two workers.
    `added us` is a worker's round trip minus its computing time. The rest is spent on a stream over a Unix socket and
    in Python. The cost of a hop is the round trip with two workers minus the round trip with one worker."""

    rounds = 3
    warm = 1
    model: Path = argument("path of a .gguf", existing)
    steps: int = option(200, "number of decode steps in a turn", positive)
    rows: int = option(1, "number of sequences in a microbatch", positive)

    async def groups(self) -> AsyncIterator[Group]:
        with Model.open(self.model) as model:
            layers = model.layer_count
            async with _workers(self.model, (0, layers)) as one, _workers(self.model, (0, layers // 2, layers)) as two:
                steps = {"in process": _in_process(model), "one worker": one, "two workers": two}
                numbers = {name: count() for name in steps}
                measured = {name: partial(self._timed, model.model_id, steps[name], numbers[name]) for name in steps}
                group = Group("", measured)
                yield group
        trips = [median(group.values(name, "us")) for name in ("one worker", "two workers")]
        print(f"a hop {trips[1] - trips[0]:+.0f} us")

    async def _timed(self, model_id: str, step: Step, numbers: count[int], turn: int) -> Measures:
        trips, computed = [], []
        for _ in range(self.steps):
            microbatch, inputs = _decode_step(model_id, next(numbers), self.rows)
            begun_ns = time.perf_counter_ns()
            result = await step(microbatch, inputs)
            trips.append((time.perf_counter_ns() - begun_ns) / 1e3)
            computed.append(sum(timing.compute_ns for timing in result.timings) / 1e3)
        added = median(trip - own for trip, own in zip(trips, computed, strict=True)) if any(computed) else 0.0
        return {
            "us": median(trips),
            "p99 us": quantiles(trips, n=100)[-1],
            "computed us": median(computed),
            "added us": added,
        }


def _decode_step(model_id: str, number: int, rows: int) -> tuple[Microbatch, SamplingInputs]:
    position = number % _LIMITS.max_context_tokens
    chunks = tuple(Chunk((number % 100,), position, (row * _BLOCKS, _BLOCKS), 1) for row in range(rows))
    task = SampleTask(SamplingParams(), 0, 0, position)
    return Microbatch(model_id, 1, number, chunks), SamplingInputs(1, number, (task,) * rows)


def _in_process(model: Model) -> Step:
    runner = StageRunner(CpuBackend(1), model, 0, model.layer_count, _LIMITS)

    async def step(microbatch: Microbatch, inputs: SamplingInputs) -> Result:
        return Result(1, 0, runner.finish(runner.run(microbatch, None), inputs))

    return step


@asynccontextmanager
async def _workers(path: Path, cuts: Sequence[int]) -> AsyncIterator[Step]:
    stages = [StageInfo(f"w{i}", start, end) for i, (start, end) in enumerate(pairwise(cuts))]
    with tempfile.TemporaryDirectory() as folder, run_directory(Path(folder)) as run:
        launcher = LocalLauncher(run, Path(folder))
        async with Registry(run.coordinator, run.token, launcher.last_error, JoinSettings(5.0)) as registry:
            try:
                specs = [WorkerSettings(name=stage.worker, threads=1) for stage in stages]
                await launcher.start(specs, registry.address, registry.process_exited)
                await registry.wait_for([spec.name for spec in specs], 60.0)
                with Model.open(path) as model:
                    loads = StageLoads(1, stages, ModelReference(str(path), model.model_id), _LIMITS)
                workers = await load_stages(loads, registry.workers)
                pipeline = await RemotePipeline.open(1, workers, run.token)
                results: asyncio.Queue[Result] = asyncio.Queue()
                at_work = asyncio.create_task(pipeline.run(partial(_put, results)))
                async with recurring_deadline("a result", _RESULT_S) as limit:

                    async def step(microbatch: Microbatch, inputs: SamplingInputs) -> Result:
                        pipeline.submit(ScheduledMicrobatch(microbatch, inputs))
                        with limit:
                            return await results.get()

                    yield step
                at_work.cancel()
                await pipeline.close()
            finally:
                await launcher.stop()


def _put(results: asyncio.Queue[Result], together: Sequence[Result]) -> None:
    for result in together:
        results.put_nowait(result)

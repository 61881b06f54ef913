"""Cost of a hop: one-row microbatches, one at a time, through a stage in this process, one worker and two.

    python benchmarks/hop.py MODEL.gguf --steps 500

A worker's round trip less the compute time it reports is what its stream, a Unix socket, and Python add; two workers
less one is a hop.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from llamaclust.cluster.control.epochs import load_stages  # noqa: E402
from llamaclust.cluster.control.load_orders import StageLoads  # noqa: E402
from llamaclust.cluster.control.weight_sources import ModelReference  # noqa: E402
from llamaclust.cluster.engine.pipeline import StageInfo  # noqa: E402
from llamaclust.cluster.launchers.local import LocalLauncher  # noqa: E402
from llamaclust.cluster.launchers.run_directory import run_directory  # noqa: E402
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch  # noqa: E402
from llamaclust.core.limits import StageLimits  # noqa: E402
from llamaclust.core.sampling import SampleTask, SamplingParams  # noqa: E402
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs  # noqa: E402
from llamaclust.wire.rpc.deadlines import recurring_deadline  # noqa: E402
from llamaclust.worker.settings import WorkerSettings  # noqa: E402

_RESULT_S = 60.0
LIMITS = StageLimits(max_batch_tokens=64, max_outputs=16, max_sequences=16, max_context_tokens=512, kv_blocks=512)
_BLOCKS = LIMITS.max_context_tokens // 16


def decode_step(model_id: str, epoch: int, number: int, rows: int) -> tuple[Microbatch, SamplingInputs]:
    """One token for each of `rows` sequences."""
    position = number % LIMITS.max_context_tokens
    chunks = tuple(Chunk((number % 100,), position, (row * _BLOCKS, _BLOCKS), 1) for row in range(rows))
    task = SampleTask(SamplingParams(), 0, 0, position)
    return Microbatch(model_id, epoch, number, chunks), SamplingInputs(epoch, number, (task,) * rows)


async def through_workers(path: Path, cuts: Sequence[int], steps: int, rows: int) -> list[tuple[int, Result]]:
    """Nanoseconds from submission to result, and the result."""
    from llamaclust.cluster.control.remote.pipeline import RemotePipeline
    from llamaclust.cluster.membership.join_rules import JoinSettings
    from llamaclust.cluster.membership.registry import Registry
    from llamaclust.model.loader import Model

    stages = [StageInfo(f"w{i}", start, end) for i, (start, end) in enumerate(pairwise(cuts))]
    model_id = Model.open(path).model_id
    with tempfile.TemporaryDirectory() as folder, run_directory(Path(folder)) as run:
        launcher = LocalLauncher(run, Path(folder))
        async with Registry(run.coordinator, run.token, launcher.last_error, JoinSettings()) as registry:
            try:
                specs = [WorkerSettings(name=stage.worker, threads=1) for stage in stages]
                await launcher.start(specs, registry.address, registry.process_exited)
                await registry.wait_for([spec.name for spec in specs], 60.0)
                loads = StageLoads(1, stages, ModelReference(str(path), model_id), LIMITS)
                workers = await load_stages(loads, registry.workers)
                pipeline = await RemotePipeline.open(1, workers, run.token)
                results: asyncio.Queue[Result] = asyncio.Queue()

                def put(together: Sequence[Result]) -> None:
                    for result in together:
                        results.put_nowait(result)

                at_work = asyncio.create_task(pipeline.run(put))

                async with recurring_deadline("a result", _RESULT_S) as limit:

                    async def step(microbatch: Microbatch, inputs: SamplingInputs) -> Result:
                        pipeline.submit(ScheduledMicrobatch(microbatch, inputs))
                        with limit:
                            return await results.get()

                    measured = await timed(step, model_id, steps, rows)
                at_work.cancel()
                await pipeline.close()
                return measured
            finally:
                await launcher.stop()


async def in_process(path: Path, steps: int, rows: int) -> list[tuple[int, Result]]:
    from llamaclust.kernels.cpu.backend import CpuBackend
    from llamaclust.model.loader import Model
    from llamaclust.worker.stage.stage_runner import StageRunner

    model = Model.open(path)
    runner = StageRunner(CpuBackend(1), model, 0, model.layer_count, LIMITS)

    async def step(microbatch: Microbatch, inputs: SamplingInputs) -> Result:
        return Result(1, 0, runner.finish(runner.run(microbatch, None), inputs))

    return await timed(step, model.model_id, steps, rows)


async def timed(
    step: Callable[[Microbatch, SamplingInputs], Awaitable[Result]], model_id: str, steps: int, rows: int
) -> list[tuple[int, Result]]:
    measured = []
    for number in range(steps):
        microbatch, inputs = decode_step(model_id, 1, number, rows)
        begun_ns = time.perf_counter_ns()
        result = await step(microbatch, inputs)
        measured.append((time.perf_counter_ns() - begun_ns, result))
    return measured[steps // 10 :]


def report(name: str, measured: list[tuple[int, Result]]) -> float:
    """Prints medians in microseconds; returns the round trip's."""
    trips = [trip / 1e3 for trip, _ in measured]
    computed = [sum(timing.compute_ns for timing in result.timings) / 1e3 for _, result in measured]
    added = median(trip - compute for trip, compute in zip(trips, computed, strict=True))
    tail = quantiles(trips, n=100)[-1]
    line = f"{name:12} p50 {median(trips):8.0f} us   p99 {tail:8.0f} us"
    if any(computed):
        line += f"   computed {median(computed):8.0f}   added {added:6.0f}"
    print(line, flush=True)
    return median(trips)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=1)
    given = parser.parse_args()
    from llamaclust.model.loader import Model

    layers = Model.open(given.model).layer_count
    report("in process", await in_process(given.model, given.steps, given.rows))
    one = report("one worker", await through_workers(given.model, (0, layers), given.steps, given.rows))
    cuts = (0, layers // 2, layers)
    two = report("two workers", await through_workers(given.model, cuts, given.steps, given.rows))
    print(f"a hop {two - one:+.0f} us")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

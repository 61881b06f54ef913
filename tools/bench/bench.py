"""Measures a model's speed and this machine's limits alternately, in one run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.state.measurements import LoadMeter, OtherLoad
from llamaclust.core.background import in_background
from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import SequenceState
from llamaclust.tools.bench.limits import GpuLimits, Limits, MachineLimits, Pair, Spread, paired
from llamaclust.tools.bench.stage import BenchStage, stage_limits
from llamaclust.tools.model_info import describe
from llamaclust.worker.devices.cores import physical_cores
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.whole_model import load_whole
from llamaclust.worker.settings import WorkerSettings

OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BenchTask:
    """The parameters of a benchmark. Prefill and decode are measured separately. Decode begins after `depth` tokens."""

    model: Path
    threads: int | None  # Threads of each worker. None divides the cores among the workers.
    prompt: int = 512
    generate: int = 128
    batch: int = 1  # Number of concurrent sequences.
    depth: int = 0
    repeats: int = 5
    workers: int = 1
    kv_type: KvType = KvType.F16
    device: str = "cpu"  # A GPU, such as "cuda:0", is possible only if `workers` is 1.

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, physical_cores() // self.workers)

    @property
    def context(self) -> int:
        # A cluster first generates one token more, whose time is the start of the measurement.
        return max(self.prompt, self.depth + self.generate + 1) + 1

    @property
    def steps(self) -> int:
        return 1 + 2 * self.repeats


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a prefill and of a decode step: multiply-adds (MACs) with weights, and bytes read. The sizes of
    weights are those in the file."""

    prefill_macs: int
    float_share: float  # Share of `prefill_macs` with float weights.
    decode_bytes: float  # Mean number of bytes that one step for all sequences reads.

    @classmethod
    def of(cls, model: Model, task: BenchTask) -> Work:
        costs = model.costs(task.kv_type)
        macs = task.prompt * sum(layer.macs_per_token for layer in costs.layers) + costs.head_macs
        float_macs = task.prompt * sum(layer.float_macs_per_token for layer in costs.layers) + costs.float_head_macs
        weights = costs.head_file_bytes + sum(layer.read_file_bytes(task.batch) for layer in costs.layers)
        lengths = range(task.depth + 1, task.depth + task.generate + 1)
        kv_bytes = sum(
            kept.n_bytes
            if isinstance(kept, SequenceState)
            else kept.kv_token_bytes * sum(min(length, kept.window or length) for length in lengths) / task.generate
            for kept in model.program(0, model.layer_count, task.kv_type).kv_memory
        )
        return cls(task.batch * macs, float_macs / macs, weights + task.batch * kv_bytes)


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The measurements of all repeats. The properties are medians over the repeats. A GB is 10^9 bytes."""

    task: BenchTask
    quant_type: str
    feature_level: str
    work: Work
    prefills: tuple[Pair, ...]  # GMAC/s
    decodes: tuple[Pair, ...]  # GB/s
    machine: MachineLimits
    other_load: OtherLoad | None = None
    gpu: str = ""  # Name of the GPU. Empty if there is none.

    @property
    def prefill_gmac_s(self) -> float:
        return median(pair.speed for pair in self.prefills)

    @property
    def prefill_tok_s(self) -> float:
        return self.task.batch * self.task.prompt * self.prefill_gmac_s * 1e9 / self.work.prefill_macs

    @property
    def decode_gb_s(self) -> float:
        return median(pair.speed for pair in self.decodes)

    @property
    def decode_tok_s(self) -> float:
        return self.task.batch * self.decode_gb_s * 1e9 / self.work.decode_bytes

    @property
    def decode_roofline(self) -> Spread:
        """Decode's share of the read bandwidth, as a spread over repeats. It exceeds 1 if weights stay in a cache."""
        return Spread.of(pair.share for pair in self.decodes)

    @property
    def prefill_roofline(self) -> Spread:
        """Prefill's share of the multiply-add peak, as a spread over repeats."""
        return Spread.of(pair.share for pair in self.prefills)

    def as_json(self) -> dict[str, Any]:
        task, prefills, decodes = self.task, self.prefill_roofline, self.decode_roofline
        return {
            "model": task.model.stem,
            "quant_type": self.quant_type,
            "threads": task.threads_each,
            "workers": task.workers,
            "batch": task.batch,
            "depth": task.depth,
            "kv_type": task.kv_type,
            "feature_level": self.feature_level,
            "gpu": self.gpu or None,
            "prefill": {"tokens": task.prompt, "tok_s": self.prefill_tok_s, "gmac_s": self.prefill_gmac_s},
            "decode": {"tokens": task.generate, "tok_s": self.decode_tok_s, "gb_s": self.decode_gb_s},
            "machine": asdict(self.machine),
            "other_load": None if self.other_load is None else asdict(self.other_load),
            "decode_roofline": decodes.median,
            "decode_roofline_range": [decodes.least, decodes.most],
            "prefill_roofline": prefills.median,
            "prefill_roofline_range": [prefills.least, prefills.most],
            "pairs": {"prefill": list(map(asdict, self.prefills)), "decode": list(map(asdict, self.decodes))},
        }


class Runner(Protocol):
    def prefill(self) -> Awaitable[float]: ...
    def decode(self) -> Awaitable[float]: ...


_Runs = tuple[tuple[Pair, ...], tuple[Pair, ...], MachineLimits]
"""Prefills in GMAC/s, decodes in GB/s, and the machine's limits during the run."""
_Measure = Callable[[Runner], Coroutine[None, None, _Runs]]


class _StageRunner:
    def __init__(self, stage: BenchStage, task: BenchTask) -> None:
        self._stage = stage
        self._task = task
        if task.depth:
            stage.prefill(task.depth)

    async def prefill(self) -> float:
        return self._stage.prefill(self._task.prompt)

    async def decode(self) -> float:
        return self._stage.decode(self._task.depth, self._task.generate)


def run_bench(task: BenchTask, on_step: OnStep) -> BenchReport:
    """Runs a benchmark. Raises UsageError if the model generates no text, if the task has more tokens than the
    model's context, or if there are more workers than layers."""
    with closing(Model.open(task.model)) as model:
        if not model.generates:
            raise UsageError(f"{task.model} is an encoder or reranker; give a model that generates text")
        trained = model.hyperparameters.context_length
        if task.context > trained:
            raise UsageError(f"{task.context} tokens are requested, but the model's context length is {trained}")
        work, load = Work.of(model, task), LoadMeter()
        measure = partial(_measure, task, work, on_step)
        with closing(_device(task)) as device:
            level, gpu_name = device.backend.feature_level, ""
            for gpu in device.gpus:
                level, gpu_name = gpu.feature_level, gpu.gpu().name
                measure = partial(measure, limits=GpuLimits(gpu))
            if task.workers > 1:
                runs = asyncio.run(_cluster_runs(task, on_step, measure))
            else:
                runs = in_background(partial(_stage_runs, task, model, device, measure)).result()
        quant_type = max(describe(model.file).by_type, key=lambda share: share.bytes).name
        return BenchReport(task, quant_type, level, work, *runs, load.measure(), gpu_name)


def _device(task: BenchTask) -> Device:
    variables = environment()
    settings = WorkerSettings(
        name="bench",
        device=task.device,
        threads=task.threads_each,
        feature_level=variables.feature_level or "",
        kernels_dir=variables.kernels_dir,
    )
    return Device.open(settings)


def _stage_runs(task: BenchTask, model: Model, device: Device, measure: _Measure) -> _Runs:
    limits = stage_limits(task.batch, task.context, task.kv_type)
    parts = (DeviceLayers(task.device, 0, model.layer_count),)
    with closing(BenchStage(model, load_whole(device, model, limits, parts))) as stage:
        return asyncio.run(measure(_StageRunner(stage, task)))


async def _cluster_runs(task: BenchTask, on_step: OnStep, measure: _Measure) -> _Runs:
    from llamaclust.tools.bench.temporary_cluster import ClusterRunner, temporary_cluster

    on_step("starting the workers")
    ways = (task.workers, task.threads_each, task.context, task.batch, task.kv_type)
    async with temporary_cluster(task.model, *ways) as cluster:
        return await measure(ClusterRunner(cluster, task))


async def _measure(
    task: BenchTask, work: Work, on_step: OnStep, runner: Runner, limits: GpuLimits | Limits | None = None
) -> _Runs:
    """Measures decode and prefill alternately, so that changes of the machine's speed affect both. If `limits` is None,
    the limits of the processor are measured."""
    on_step("warming up")
    threads = min(task.threads_each * task.workers, physical_cores())
    limits = limits or await Limits.open(threads, work.float_share)
    await runner.prefill()
    prefills, decodes = list[Pair](), list[Pair]()
    for number in range(1, task.repeats + 1):
        on_step(f"decode {number}/{task.repeats}")
        decodes.append(await paired(runner.decode, work.decode_bytes * task.generate, limits.read))
        on_step(f"prefill {number}/{task.repeats}")
        prefills.append(await paired(runner.prefill, work.prefill_macs, limits.peak))
    return tuple(prefills), tuple(decodes), limits.machine

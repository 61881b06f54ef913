"""Speed of a model here, beside what this machine could do at best, measured in turns in the same run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from llamaclust.cluster.config import environment
from llamaclust.errors import UsageError
from llamaclust.kernels import probes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.probes import Machine
from llamaclust.model.loader import Model
from llamaclust.tools.background import in_background
from llamaclust.tools.bench_stage import BenchStage
from llamaclust.tools.model_info import describe
from llamaclust.wire.deadlines import deadline

OnStep = Callable[[str], None]
"""Told what is measured next."""

_READ_S = 0.3
_INT8_S = 0.15
_PROBE_S = 600.0


@dataclass(frozen=True, slots=True)
class BenchTask:
    """What to measure. Prefill and decode are apart, as in llama-bench: decode begins behind `depth` tokens."""

    model: Path
    threads: int | None  # of each worker; None: the cores, shared out
    prompt: int = 512
    generate: int = 128
    batch: int = 1  # sequences
    depth: int = 0
    repeats: int = 3
    workers: int = 1

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.workers)

    @property
    def context(self) -> int:
        """Tokens of a sequence, at most."""
        return max(self.prompt, self.depth + self.generate) + 1

    @property
    def steps(self) -> int:
        """How often `OnStep` is called."""
        return 1 + 3 * self.repeats


@dataclass(frozen=True, slots=True)
class Work:
    """What one prefill and one decode step cost by count: the weights' multiply-accumulates, bytes that must be read.

    The embedding is not counted: of it one row a token is read. Nor are experts that a token does not choose.
    """

    prefill_macs: int
    decode_bytes: float  # a step, all sequences together, with keys and values half-way through the run

    @classmethod
    def of(cls, model: Model, task: BenchTask) -> Work:
        costs = model.costs
        layer_macs = sum(layer.macs_per_token for layer in costs.layers)
        weights = costs.head_bytes + sum(layer.weight_bytes - layer.idle_bytes for layer in costs.layers)
        kv = sum(layer.kv_bytes_per_token for layer in costs.layers)
        context = task.depth + (task.generate + 1) / 2
        return cls(task.batch * (task.prompt * layer_macs + costs.head_macs), weights + task.batch * context * kv)


@dataclass(slots=True)
class _Measured:
    """Of each repeat: seconds of a prefill and of a decode, and the machine's limits then."""

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    read_gb_s: list[float] = field(default_factory=list)
    int8_gmac_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Medians of the runs; the machine's limits are the best that was seen. GB are 10^9 bytes."""

    task: BenchTask
    quant_type: str
    feature_level: str
    prefill_tok_s: float
    prefill_gmac_s: float
    decode_tok_s: float
    decode_gb_s: float
    machine: Machine

    @property
    def decode_roofline(self) -> float:
        """Share of the read bandwidth; more than 1 where weights stay in a cache."""
        return self.decode_gb_s / self.machine.read_gb_s

    @property
    def prefill_roofline(self) -> float:
        """Share of the peak of 8-bit multiply-adds."""
        return self.prefill_gmac_s / self.machine.int8_gmac_s

    def as_json(self) -> dict[str, Any]:
        task = self.task
        return {
            "model": task.model.stem,
            "quant_type": self.quant_type,
            "threads": task.threads_each,
            "workers": task.workers,
            "batch": task.batch,
            "depth": task.depth,
            "feature_level": self.feature_level,
            "prefill": {"tokens": task.prompt, "tok_s": self.prefill_tok_s, "gmac_s": self.prefill_gmac_s},
            "decode": {"tokens": task.generate, "tok_s": self.decode_tok_s, "gb_s": self.decode_gb_s},
            "machine": {"read_gb_s": self.machine.read_gb_s, "int8_gmac_s": self.machine.int8_gmac_s},
            "decode_roofline": self.decode_roofline,
            "prefill_roofline": self.prefill_roofline,
        }


class Runner(Protocol):
    """What is measured. Both return seconds."""

    def prefill(self) -> Awaitable[float]: ...
    def decode(self) -> Awaitable[float]: ...


class _StageRunner:
    """One stage in this process; nothing else runs meanwhile."""

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
    """UsageError for more tokens than the model was made for, or workers than it has layers."""
    with closing(Model.open(task.model)) as model:
        trained = model.hyperparameters.context_length
        if task.context > trained:
            raise UsageError(f"{task.context} tokens are asked for, the model was made for {trained}")
        backend = CpuBackend(task.threads_each, environment().feature_level)
        if task.workers > 1:
            measured = asyncio.run(_cluster_runs(task, on_step))
        else:
            measured = in_background(partial(_stage_runs, model, backend, task, on_step)).result()
        quant_type = max(describe(model.file).by_type, key=lambda share: share.bytes).name
        return _report(task, Work.of(model, task), measured, quant_type, backend.feature_level)


def _stage_runs(model: Model, backend: CpuBackend, task: BenchTask, on_step: OnStep) -> _Measured:
    with closing(BenchStage(model, backend, task.batch, task.context)) as stage:
        return asyncio.run(_runs(_StageRunner(stage, task), task, on_step))


async def _cluster_runs(task: BenchTask, on_step: OnStep) -> _Measured:
    from llamaclust.tools.bench_cluster import ClusterRunner
    from llamaclust.tools.temporary_cluster import temporary_cluster

    on_step("starting the workers")
    async with temporary_cluster(task.model, task.workers, task.threads_each, task.context, task.batch) as cluster:
        return await _runs(ClusterRunner(cluster, task), task, on_step)


async def _runs(runner: Runner, task: BenchTask, on_step: OnStep) -> _Measured:
    """In turns, so that a change of the machine's mood meets all of them."""
    measured = _Measured()
    threads = min(task.threads_each * task.workers, len(os.sched_getaffinity(0)))
    on_step("warming up")
    await runner.prefill()
    for number in range(1, task.repeats + 1):
        on_step(f"limits of this machine {number}/{task.repeats}")
        measured.read_gb_s.append(await _limit(partial(probes.read_bandwidth, threads, _READ_S)))
        measured.int8_gmac_s.append(await _limit(partial(probes.int8_peak, threads, _INT8_S)))
        on_step(f"decode {number}/{task.repeats}")
        measured.decode_s.append(await runner.decode())
        on_step(f"prefill {number}/{task.repeats}")
        measured.prefill_s.append(await runner.prefill())
    return measured


async def _limit(probe: Callable[[], float]) -> float:
    async with deadline("measuring the machine's limits", _PROBE_S):
        return await asyncio.wrap_future(in_background(probe))


def _report(task: BenchTask, work: Work, measured: _Measured, quant_type: str, feature_level: str) -> BenchReport:
    prefill_s, decode_s = median(measured.prefill_s), median(measured.decode_s)
    return BenchReport(
        task,
        quant_type,
        feature_level,
        prefill_tok_s=task.batch * task.prompt / prefill_s,
        prefill_gmac_s=work.prefill_macs / prefill_s / 1e9,
        decode_tok_s=task.batch * task.generate / decode_s,
        decode_gb_s=work.decode_bytes * task.generate / decode_s / 1e9,
        machine=Machine(max(measured.read_gb_s), max(measured.int8_gmac_s)),
    )

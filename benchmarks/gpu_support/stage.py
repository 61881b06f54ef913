"""A whole model on a GPU, or on a GPU and the processor, in the chain of executors that a worker has: how many layers
go where, and rounds of measurements."""

from __future__ import annotations

import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gpu_support.work import Amount, Rates, Round, Work
from llamaclust.cluster.config.environment import environment
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.profile import DeviceProfile
from llamaclust.core.sizes import mib, missing
from llamaclust.kernels.backend import Backend
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.kernels.probes import ReadProbe, int8_peak
from llamaclust.model.loader import Model
from llamaclust.tools.bench.stage import BenchStage, stage_limits
from llamaclust.worker.devices import backends
from llamaclust.worker.devices.backends import GpuBackend
from llamaclust.worker.devices.system_info import available_memory_bytes
from llamaclust.worker.stage.stage_runner import StageMemory, StageOptions, plan_memory

_PROBE_BYTES, _PROBE_SHARE = 2 << 30, 8
"""What is left of VRAM so that its bandwidth can be measured beside the model, or so large a part of a small GPU's."""
_REPORT_S = 5.0
_READ_S, _PEAK_S = 0.3, 0.1


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured."""

    model: Path
    device: str = "cuda:0"
    threads: int = 1
    prompt: int = 512
    generate: int = 64
    sequences: int = 8
    gpu_memory_bytes: int | None = None  # of VRAM, at most; what does not fit stays in RAM
    graphs: bool = True

    @property
    def context(self) -> int:
        """Tokens of a sequence, at most."""
        return max(self.prompt, self.generate) + 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Layers [cut, layers) and the head are on the GPU, those before on the processor; with all that they need."""

    cut: int
    layers: int
    vram_bytes: int
    ram_bytes: int

    @classmethod
    def of(cls, model: Model, task: Task, gpu: GpuBackend, processor: Backend, vram_bytes: int) -> Self:
        """As many layers on the GPU as go into `vram_bytes`. InsufficientMemoryError where RAM is too small for the
        others."""
        limits, layers = stage_limits(task.sequences, task.context), model.layer_count

        def on_gpu(cut: int) -> StageMemory:
            return plan_memory(gpu, model, cut, layers, limits)

        cut = bisect_left(range(layers), True, key=lambda cut: on_gpu(cut).total_bytes <= vram_bytes)
        if cut == layers:
            need = missing(on_gpu(layers - 1).parts, vram_bytes)
            raise InsufficientMemoryError(
                f"{model.file.path}: the last layer and the head on {task.device} need {need}"
            )
        taken_bytes = on_gpu(cut).total_bytes
        if cut == 0:
            return cls(0, layers, taken_bytes, 0)
        in_ram, free_bytes = plan_memory(processor, model, 0, cut, limits), available_memory_bytes()
        if in_ram.total_bytes > free_bytes:
            where = f"{layers - cut} of {layers} layers go into {mib(vram_bytes)} MiB of VRAM; the others, in RAM,"
            raise InsufficientMemoryError(f"{model.file.path}: {where} need {missing(in_ram.parts, free_bytes)}")
        return cls(cut, layers, taken_bytes, in_ram.total_bytes)

    def backend(self, gpu: GpuBackend, processor: Backend) -> Backend:
        if self.cut == 0:
            return gpu
        return MultiDeviceBackend([BackendLayers(processor, 0, self.cut), BackendLayers(gpu, self.cut, self.layers)])

    def __str__(self) -> str:
        gpu = f"{self.layers - self.cut} of {self.layers} layers in {mib(self.vram_bytes)} MiB of VRAM"
        return gpu if self.cut == 0 else f"{gpu}, {self.cut} in {mib(self.ram_bytes)} MiB of RAM"


class Loaded:
    """A model that can be measured; holds its memory until it is closed."""

    def __init__(self, task: Task, whole: bool = False) -> None:
        """UsageError without the model or the GPU, or where the GPU is to hold the `whole` and cannot;
        InsufficientMemoryError where memory is short."""
        self.task = task
        with ExitStack() as held:
            self.model = held.enter_context(closing(Model.open(task.model)))
            self._check()
            kernels = environment().kernels_dir
            opened = backends.open_gpu(
                task.device, task.threads, task.gpu_memory_bytes, kernels_dir=kernels, graphs=task.graphs
            )
            self.gpu = held.enter_context(closing(opened))
            # Without a cap, which is for the model.
            self._probed = held.enter_context(closing(backends.open_gpu(task.device, 1, None, kernels_dir=kernels)))
            processor = backends.open_processor("cpu", task.threads, "")
            self.placement = Placement.of(self.model, task, self.gpu, processor, self._room())
            if whole and self.placement.cut:
                raise UsageError(f"beside llama-bench all layers must be on the GPU: {self.placement}")
            report(f"loading {task.model.stem}: {self.placement}")
            started, progress = time.perf_counter(), _Progress()
            backend = self.placement.backend(self.gpu, processor)
            options = StageOptions(threads=task.threads, progress=progress.add)
            stage = BenchStage(self.model, backend, stage_limits(task.sequences, task.context), options)
            self._stage = held.enter_context(closing(stage))
            self.load_s = time.perf_counter() - started
            report(f"loaded {progress.done_bytes / 1e9:.1f} GB in {self.load_s:.1f} s")
            self.work = Work.of(self.model, self.placement.cut, task.prompt, task.generate, task.sequences)
            self._ram = ReadProbe(task.threads) if self.placement.cut else None
            self._held = held.pop_all()

    def _check(self) -> None:
        trained = self.model.hyperparameters.context_length
        if self.task.context > trained:
            raise UsageError(f"{self.task.context} tokens requested, the model's context length is {trained}")

    def _room(self) -> int:
        """Of VRAM, for the model."""
        kept = min(_PROBE_BYTES, self.gpu.gpu().total_bytes // _PROBE_SHARE)
        return min(self.gpu.free_bytes, self._probed.free_bytes - kept)

    def warm_up(self) -> None:
        """The first prefill teaches the scheduler how to cut prompts; what then comes a second time is captured."""
        for _ in range(3):
            self._stage.prefill(self.task.prompt, 1)
        for sequences in (1, self.task.sequences):
            self._stage.decode(0, min(4, self.task.generate), sequences)

    def measure(self) -> Round:
        """One of each between two looks at what the devices can do."""
        task, stage = self.task, self._stage
        before = self.rates()
        prefill_s = stage.prefill(task.prompt, 1)
        step_s = stage.decode(0, task.generate, 1) / task.generate
        many_s = stage.decode(0, task.generate, task.sequences) / task.generate
        return Round(before.best(self.rates()), prefill_s, step_s, many_s)

    def rates(self) -> Rates:
        gpu, threads = self._probed.limits(), self.task.threads
        if self._ram is None:
            return Rates(Amount(gpu.read_bytes_s, 0.0), Amount(gpu.int8_macs_s, 0.0))
        read, int8 = self._ram.measure(_READ_S) * 1e9, int8_peak(threads, _PEAK_S) * 1e9
        return Rates(Amount(gpu.read_bytes_s, read), Amount(gpu.int8_macs_s, int8))

    def kernels(self) -> DeviceProfile:
        """What products reach on the GPU by themselves."""
        return self._probed.measure()

    def close(self) -> None:
        self._held.close()


class _Progress:
    """Of loading: a line now and then."""

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self.done_bytes = 0
        self._now_s = now_s
        self._told_s = now_s()

    def add(self, more_bytes: int) -> None:
        self.done_bytes += more_bytes
        if self._now_s() - self._told_s > _REPORT_S:
            self._told_s = self._now_s()
            report(f"loaded {self.done_bytes / 1e9:.1f} GB")


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Measures a whole model on a GPU, or on a GPU and the processor, with a worker's executors."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gpu_support.figures import CopiedSteps, Round
from gpu_support.work import Amount, Rates, Work
from llamaclust.cluster.config.environment import environment
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.gpus import DeviceLayers, Placement, placed
from llamaclust.core.profile import DeviceProfile
from llamaclust.core.sizes import mib, missing
from llamaclust.kernels.probes import ReadProbe, int8_peak
from llamaclust.model.loader import Model
from llamaclust.tools.bench.stage import BenchStage, stage_limits
from llamaclust.worker.devices import backends
from llamaclust.worker.devices.backends import GpuBackend
from llamaclust.worker.devices.device_memory import device_shares
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.whole_model import held_layers, load_whole
from llamaclust.worker.stage.stage_runner import plan_memory

_PROBE_BYTES, _PROBE_SHARE = 2 << 30, 8
"""VRAM that is kept free to measure the bandwidth: this many bytes, or an eighth of the VRAM if that is less."""
_REPORT_S = 5.0
_READ_S, _PEAK_S = 0.3, 0.1


@dataclass(frozen=True, slots=True)
class Task:
    model: Path
    device: str = "cuda:0"
    threads: int = 1
    prompt: int = 512
    generate: int = 64
    sequences: int = 8
    gpu_memory_bytes: int | None = None  # Maximum VRAM. Layers that do not fit stay in RAM.
    graphs: bool = True
    cpu_moe: int | None = None  # Number of first layers with experts in RAM. If None, VRAM decides.
    experts_cache_bytes: int | None = None  # Maximum VRAM for copies of experts. If None, all free VRAM.

    @property
    def context(self) -> int:
        return self.prompt + self.generate + 1


@dataclass(frozen=True, slots=True)
class Layout:
    """The placement of layers, and the memory that they need. The GPU has the last layers and the head. RAM has the
    earlier layers, and the experts of some layers that are on the GPU."""

    parts: tuple[DeviceLayers, ...]
    vram_bytes: int
    ram_bytes: int

    @classmethod
    def of(cls, device: Device, model: Model, task: Task) -> Self:
        """Places layers as for a model in one process (docs/gpu.md). Raises InsufficientMemoryError if memory is short,
        and UsageError if the model has no experts to place."""
        if not model.hyperparameters.expert_count and (task.cpu_moe is not None or task.experts_cache_bytes):
            raise UsageError(f"{model.file.path} has no experts; leave out --cpu-moe, --n-cpu-moe and --experts-cache")
        limits, end = stage_limits(task.sequences, task.context), model.layer_count
        parts = held_layers(device, model, limits, Placement(cpu_moe=task.cpu_moe), task.experts_cache_bytes)
        if parts[-1].device != task.device:
            (gpu,) = device.gpus
            need = missing(plan_memory(gpu, model, end - 1, end, limits).parts, gpu.free_bytes)
            raise InsufficientMemoryError(
                f"{model.file.path}: the last layer and the head on {task.device} need {need}"
            )
        shares = device_shares(device, model, parts, limits)
        taken_bytes = {name: share.memory.total_bytes for name, share in shares.items()}
        return cls(parts, taken_bytes[task.device], taken_bytes.get("cpu", 0))

    @property
    def gpu(self) -> DeviceLayers:
        return self.parts[-1]

    def __str__(self) -> str:
        where = f"{placed(self.parts)}; {mib(self.vram_bytes)} MiB of VRAM"
        in_ram = f", {mib(self.ram_bytes)} MiB of RAM" if self.ram_bytes else ""
        copies_bytes = self.gpu.experts_cache_bytes
        return where + in_ram + (f", {mib(copies_bytes)} MiB of VRAM for copies of experts" if copies_bytes else "")


class Loaded:
    def __init__(self, task: Task, whole: bool = False) -> None:
        """Loads the model. Raises UsageError if the model or the GPU is missing, if the GPU cannot hold the `whole`
        model, or if copies of experts are impossible. Raises InsufficientMemoryError if memory is short."""
        self.task = task
        with ExitStack() as held:
            self.model = held.enter_context(closing(Model.open(task.model)))
            self._check()
            device = self._device(held)
            self.layout = Layout.of(device, self.model, task)
            if whole and self.layout.ram_bytes:
                raise UsageError(f"--llama-bench needs all layers on the GPU, but the layout is {self.layout}")
            report(f"loading {task.model.stem}: {self.layout}")
            started, progress = time.perf_counter(), _Progress()
            limits = stage_limits(task.sequences, task.context)
            runner = load_whole(device, self.model, limits, self.layout.parts, progress.add)
            self._stage = held.enter_context(closing(BenchStage(self.model, runner)))
            self.load_s = time.perf_counter() - started
            report(f"loaded {progress.done_bytes / 1e9:.1f} GB in {self.load_s:.1f} s")
            self._check_copies()
            self.work = Work.of(self.model, self.layout.gpu, task.prompt, task.generate, task.sequences)
            self._ram = ReadProbe(task.threads) if self.work.is_mixed else None
            self._held = held.pop_all()

    def _check(self) -> None:
        trained = self.model.hyperparameters.context_length
        if self.task.context > trained:
            raise UsageError(
                f"{self.task.context} tokens are requested, but the model's context length is {trained}; "
                "lower --prompt or --generate"
            )

    def _check_copies(self) -> None:
        wanted_bytes = self.task.experts_cache_bytes
        if wanted_bytes and not self._stage.has_copies:
            why = f"none is in RAM, fits into {mib(wanted_bytes)} MiB or has a gate"
            raise UsageError(f"--experts-cache would make no copies of experts, since {why}; leave it out")

    def _device(self, held: ExitStack) -> Device:
        task, kernels = self.task, environment().kernels_dir

        def opened(threads: int, cap_bytes: int | None) -> GpuBackend:
            gpu = backends.open_gpu(task.device, threads, cap_bytes, kernels_dir=kernels, graphs=task.graphs)
            return held.enter_context(closing(gpu))

        self._probed = opened(1, None)  # Opened without the memory limit, which is only for the model.
        kept_bytes = min(_PROBE_BYTES, self._probed.gpu().total_bytes // _PROBE_SHARE)
        room_bytes = self._probed.free_bytes - kept_bytes
        self.gpu = opened(task.threads, min(task.gpu_memory_bytes or room_bytes, room_bytes))
        processor = backends.open_processor("cpu", task.threads, "")
        return Device("cpu", task.threads, "", None, processor, (self.gpu,))

    def warm_up(self) -> None:
        """Runs all measured parts, so that the scheduler learns to divide prompts and CUDA graphs are captured."""
        for _ in range(3):
            self._stage.prefill(self.task.prompt, 1)
        for depth, sequences in ((self.task.prompt, 1), (0, 1), (0, self.task.sequences)):
            self._stage.decode(depth, min(4, self.task.generate), sequences)
        if self._stage.has_copies:
            self._stage.decode(0, self.task.generate, self.task.sequences)

    def measure(self) -> Round:
        task, stage, counts = self.task, self._stage, (1, self.task.sequences)
        before = self.rates()
        with stage.without_copies():
            prefill_s = stage.prefill(task.prompt, 1)
            deep_s = stage.decode(task.prompt, task.generate, 1) / task.generate
            step_s, many_s = (stage.decode(0, task.generate, count) / task.generate for count in counts)
        copied = {count: self._copied_steps(count) for count in counts if stage.has_copies}
        return Round(before.best(self.rates()), prefill_s, step_s, many_s, deep_s, copied=copied)

    def _copied_steps(self, sequences: int) -> CopiedSteps:
        before = self._stage.copies
        step_s = self._stage.decode(0, self.task.generate, sequences) / self.task.generate
        after = self._stage.copies
        return CopiedSteps(step_s, after.hits - before.hits, after.misses - before.misses)

    def rates(self) -> Rates:
        gpu, threads = self._probed.limits(), self.task.threads
        if self._ram is None:
            return Rates(Amount(gpu.read_bytes_s, 0.0), Amount(gpu.int8_macs_s, 0.0))
        read, int8 = self._ram.measure(_READ_S) * 1e9, int8_peak(threads, _PEAK_S) * 1e9
        return Rates(Amount(gpu.read_bytes_s, read), Amount(gpu.int8_macs_s, int8))

    def kernels(self) -> DeviceProfile:
        return self._probed.measure()

    def close(self) -> None:
        self._held.close()


class _Progress:
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

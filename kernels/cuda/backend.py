"""The CUDA backend, which runs a program on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import groupby
from weakref import WeakSet

from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, UsageError
from llamaclust.core.gpus import Gpu, cache_room
from llamaclust.core.limits import NUMERICS_VERSION, StageLimits
from llamaclust.core.profile import DeviceProfile
from llamaclust.kernels.backend import ExchangingStage, ExpertsStage, Progress, kv_bytes
from llamaclust.kernels.cuda.device_weights import DeviceWeights, LayerMemory, LoadProgress, layers_of_weights
from llamaclust.kernels.cuda.executor.plan import Plan
from llamaclust.kernels.cuda.executor.stage import CudaStage
from llamaclust.kernels.cuda.experts_cache.cache import CudaExpertsCache
from llamaclust.kernels.cuda.experts_cache.opening import open_cache, plan_cache, slots_in
from llamaclust.kernels.cuda.launches.attention import check_attention
from llamaclust.kernels.cuda.launches.gpu_properties import ANY_GPU, LaunchLimits
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.probe import allocate_flush, flush_cache, limits, measure
from llamaclust.kernels.cuda.runtime.device import Device
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock
from llamaclust.kernels.cuda.runtime.memory import allocated, most_rounded_bytes
from llamaclust.kernels.distinct_layers import distinct_layers
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.kernels.packed.weights import check_weights
from llamaclust.kernels.split_experts import MOST_CACHED_ROWS
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Adapt, Attention, MixtureStep, Program

_RESERVED_SHARE = 256
"""The GPU driver needs 1 / `_RESERVED_SHARE` of the GPU's memory for compiled kernels and graphs."""


class CudaBackend:
    """Implements `kernels.backend.Backend` on a GPU. `threads` is the number of threads that pack weights. With
    `graphs`, launches are captured as CUDA graphs."""

    numerics_version = NUMERICS_VERSION

    def __init__(
        self,
        name: str,
        device: Device,
        threads: int,
        packed_cache: PackedCacheFolder | None = None,
        *,
        graphs: bool = True,
    ) -> None:
        major, minor = device.compute_capability
        self.name = self.device = name
        self.feature_level = f"sm_{major}{minor}"
        self._device = device
        self._graphs = graphs
        self._gpu_lock = GpuLock(name, device)
        self._weights = DeviceWeights(self._gpu_lock, threads, packed_cache)
        self._caches: WeakSet[CudaExpertsCache] = WeakSet()

    @property
    def free_bytes(self) -> int:
        """The bytes that are free or held by experts caches, minus a reserve for kernels and graphs."""
        cached_bytes = sum(cache.n_bytes for cache in tuple(self._caches))
        with self._gpu_lock.driver_errors():
            return max(0, self._device.free_bytes + cached_bytes - self._device.memory_bytes // _RESERVED_SHARE)

    def gpu(self) -> Gpu:
        device = self._device
        return Gpu(self.device, device.name, device.memory_bytes, self.free_bytes, device.uuid)

    def measure(self) -> DeviceProfile:
        with self._gpu_lock.exclusive():
            return DeviceProfile(*measure(self._device))

    def limits(self) -> DeviceProfile:
        with self._gpu_lock.exclusive():
            return DeviceProfile(*limits(self._device))

    @contextmanager
    def cache_flush(self) -> Iterator[Callable[[], None]]:
        with self._gpu_lock.exclusive():
            memory = allocate_flush(self._device)

        def sweep() -> None:
            with self._gpu_lock.exclusive():
                flush_cache(self._device, memory)

        try:
            yield sweep
        finally:
            with self._gpu_lock.exclusive():
                memory.close()

    def load(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress) -> CudaStage:
        """Frees all experts caches, then loads the program. Raises ModelFileError if there are no kernels for it."""
        for cache in tuple(self._caches):
            cache.close()
        plan = _plan(program, tensors, limits, LaunchLimits.of(self._device))
        try:
            memories = self._weights_and_kernels(plan, tensors, progress)
        except MemoryError as error:
            what = f"this machine's RAM does not suffice to prepare two layers at a time for {self.name}"
            raise InsufficientMemoryError(f"{what}; end other programs, or add swap space") from error
        weights = {name: weight for memory in memories for name, weight in memory.weights.items()}
        with self._gpu_lock.exclusive(), ExitStack() as held:
            kv = held.enter_context(closing(self._device.allocate(plan.kv_allocated_bytes)))
            buffers = held.enter_context(closing(self._device.allocate(plan.buffers_allocated_bytes)))
            plan.bind(self._device, {name: weights[name] for name in program.weights}, buffers, kv)
            held.pop_all()
        return CudaStage(self._gpu_lock, plan, memories, kv, buffers, self._graphs)

    def cache_experts(
        self,
        stage: ExchangingStage,
        experts: ExpertsStage,
        program: Program,
        tensors: Mapping[str, Tensor],
        limits: StageLimits,
        n_bytes: int,
    ) -> CudaExpertsCache | None:
        assert isinstance(stage, CudaStage)
        weights = {name: Weights(tensors[name].quant_type, tensors[name].shape) for name in program.weights}
        rows = min(limits.max_batch_tokens, MOST_CACHED_ROWS)
        plan = plan_cache(program, weights, rows, LaunchLimits.of(self._device))
        slots = slots_in(plan, min(n_bytes, cache_room(self.free_bytes, None)))
        if not any(slots.values()):
            return None
        cache = open_cache(self._gpu_lock, plan, slots, stage, experts, self._graphs)
        self._caches.add(cache)
        return cache

    def _weights_and_kernels(
        self, plan: Plan, tensors: Mapping[str, Tensor], progress: Progress
    ) -> tuple[LayerMemory, ...]:
        by_module = groupby(sorted(plan.kernels), key=lambda kernel: kernel.rpartition(".")[0])
        modules = [tuple(kernels) for _, kernels in by_module]
        told = LoadProgress(progress, plan.weight_bytes, len(modules))

        def compile_kernels() -> None:
            for kernels in modules:
                with self._gpu_lock.driver_errors():
                    self._device.prepare(kernels)
                told.module_done()

        with ThreadPoolExecutor(1, "compile-kernels") as compiler:
            compiled = compiler.submit(compile_kernels)
            memories = self._weights.load(plan.program, tensors, told.add_bytes)
            try:
                compiled.result()
            finally:
                # Breaks a reference cycle, because an error's frames refer to the weights and to `compiled`.
                del compiled
        return memories

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        return self._weights.held_bytes(tensors[name] for name in program.weights)

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        return workspace_bytes(program, tensors, limits)

    def close(self) -> None:
        self._device.close()


def workspace_bytes(program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
    """Returns a stage's memory besides weights and KV memory. Needs no GPU. Raises ModelFileError or UsageError."""
    plan = _plan(program, tensors, limits)
    rounded = plan.kv_allocated_bytes - kv_bytes(program, limits)
    return plan.buffers_allocated_bytes + rounded + rounded_weight_bytes(program, tensors)


def most_workspace_bytes(program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
    """Returns an upper bound of `workspace_bytes` - `rounded_weight_bytes` that holds for any number of KV blocks."""
    if program.window is not None:
        # With window blocks, layers with windows have their own block table, which takes memory.
        limits = replace(limits, window_blocks=1)
    weights = _checked_weights(program, tensors)
    plan = Plan(distinct_layers(program, tensors), weights, limits, ANY_GPU)
    return plan.buffers_allocated_bytes + most_rounded_bytes(len(program.kv_memory))


def rounded_weight_bytes(program: Program, tensors: Mapping[str, Tensor]) -> int:
    layers = layers_of_weights(tensors[name] for name in program.weights)
    return sum(allocated(layer.n_bytes) - layer.resident_bytes for layer in layers)


def _check_part(program: Program) -> None:
    known = set() if program.is_first else {program.hidden.name}
    stored: set[int] = set()
    for step in program.steps:
        missing = {buffer.name for buffer in step.reads} - known
        known.add(step.out.name)
        if isinstance(step, Attention):
            missing |= (
                {f"keys and values of layer {step.layer}"} if step.shares_kv and step.layer not in stored else set()
            )
            stored.add(step.layer)
        if missing:
            what = f"layers {program.start} to {program.end} read {min(missing)}, which are on another device"
            raise ModelFileError(f"{what}; give all layers of the worker to the GPU, or set 'gpu_layers: 0'")


def _plan(program: Program, tensors: Mapping[str, Tensor], limits: StageLimits, gpu: LaunchLimits = ANY_GPU) -> Plan:
    return Plan(program, _checked_weights(program, tensors), limits, gpu)


def _has_windows_ahead(program: Program) -> bool:
    return any(not step.causal and step.window is not None for step in program.kv_layers)


def _checked_weights(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Weights]:
    if any(isinstance(step, MixtureStep) for step in program.steps):
        raise ModelFileError("GPUs cannot compute only some of a layer's experts; set 'device: cpu' for the worker")
    if not program.is_causal and (program.is_first or program.is_last or _has_windows_ahead(program)):
        raise ModelFileError("encoders are not supported on GPUs; set 'device: cpu' for the workers of the encoder")
    if program.is_last and not program.has_logits:
        raise ModelFileError("rerankers are not supported on GPUs; set 'device: cpu' for the workers of the reranker")
    if any(isinstance(step, Adapt) for step in program.steps):
        raise UsageError("adapters are supported only on CPUs; set 'device: cpu' for all workers, or remove adapters")
    _check_part(program)
    check_weights(program, tensors)
    check_attention(program)
    return {name: Weights(tensors[name].quant_type, tensors[name].shape) for name in program.weights}

"""Loads stages with an experts cache of a given size, and simulates slow copies into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import ExpertsBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.experts_cache.cache import CudaExpertsCache
from llamaclust.kernels.cuda.experts_cache.launches import CachePlan
from llamaclust.kernels.cuda.experts_cache.opening import plan_cache, slots_in
from llamaclust.kernels.cuda.launches.gpu_properties import ANY_GPU
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes, Device, Event
from llamaclust.kernels.split_experts import MOST_CACHED_ROWS, SplitExpertsBackend, SplitExpertsStage, experts_of
from llamaclust.model.loader import Model
from support.arithmetic.batches import load_stage
from support.cuda.stages import LIMITS

SETTLE_S = 60.0


def cache_plan(model: Model, limits: StageLimits = LIMITS) -> CachePlan:
    program = experts_of(model.program(0, model.layer_count), range(model.layer_count))
    assert program is not None
    tensors = model.tensors_for(program)
    weights = {name: Weights(tensors[name].quant_type, tensors[name].shape) for name in program.weights}
    return plan_cache(program, weights, min(limits.max_batch_tokens, MOST_CACHED_ROWS), ANY_GPU)


def expert_count(model: Model) -> int:
    """Returns the number of experts in all layers."""
    return sum(step.experts for step in cache_plan(model).mixtures)


def bytes_for(model: Model, experts: int, limits: StageLimits = LIMITS) -> int:
    """Returns the smallest cache size in bytes that holds `experts` experts."""
    plan = cache_plan(model, limits)
    few, enough = 0, plan.n_bytes + (experts + len(plan.pools) + 1) * max(p.layout.pool_bytes(1) for p in plan.pools)
    while few < enough:
        middle = (few + enough) // 2
        if sum(slots_in(plan, middle).values()) >= experts:
            enough = middle
        else:
            few = middle + 1
    return enough


def load_cached(
    cuda: CudaBackend, experts: ExpertsBackend, model: Model, n_bytes: int, limits: StageLimits = LIMITS
) -> SplitExpertsStage:
    """Loads all layers with experts in RAM and an experts cache of `n_bytes`."""
    backend = SplitExpertsBackend(cuda, experts, range(model.layer_count), n_bytes)
    stage = load_stage(backend, model, limits=limits)
    assert isinstance(stage, SplitExpertsStage)
    return stage


def cache_of(stage: SplitExpertsStage) -> CudaExpertsCache:
    assert isinstance(stage.cache, CudaExpertsCache)
    return stage.cache


@dataclass(frozen=True, slots=True)
class SlowCopies:
    """A slow `copy_in_background` for the shim: its destination holds only ones until the copy is waited for. Copies of
    a GPU are slow anyway, and uploads would disturb a capture by another thread."""

    device: Device

    def copy(self, buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> Event:
        wanted = tuple(parts)
        for offset, pinned in wanted:
            self.device.upload(buffer, offset, np.full(pinned.nbytes, 0xFF, np.uint8))
        return _SlowCopy(self.device, buffer, wanted)


@dataclass(frozen=True, slots=True)
class _SlowCopy:
    device: Device
    buffer: Buffer
    parts: tuple[tuple[int, Bytes], ...]

    def synchronize(self) -> None:
        for offset, pinned in self.parts:
            self.device.upload(self.buffer, offset, pinned)

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

import numpy as np

from llamaclust.kernels.backend import ExpertsStage
from llamaclust.kernels.cuda.executor.stage import CudaStage
from llamaclust.kernels.cuda.experts_cache.cache import CudaExpertsCache
from llamaclust.kernels.cuda.experts_cache.copies import ExpertCopies
from llamaclust.kernels.cuda.experts_cache.launches import CachePlan, PoolPlace
from llamaclust.kernels.cuda.experts_cache.slots import SlotLayout, pools_bytes, slot_counts
from llamaclust.kernels.cuda.experts_cache.table import ExpertTable, Pool
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.device import Buffer
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.kernels.split_experts import mixtures_of
from llamaclust.model.program import Program


def plan_cache(program: Program, weights: Mapping[str, Weights], rows: int, gpu: LaunchLimits) -> CachePlan:
    mixtures = mixtures_of(program)
    pools = [PoolPlace(SlotLayout.of(step, weights)) for step in mixtures]
    return CachePlan(program, mixtures, weights, rows, gpu, pools)


def slots_in(plan: CachePlan, n_bytes: int) -> dict[SlotLayout, int]:
    experts: Counter[SlotLayout] = Counter()
    for pool, step in zip(plan.pools, plan.mixtures, strict=True):
        experts[pool.layout] += step.experts
    return slot_counts(experts, max(0, n_bytes - aligned(plan.n_bytes)))


def open_cache(
    gpu_lock: GpuLock,
    plan: CachePlan,
    slots: Mapping[SlotLayout, int],
    stage: CudaStage,
    experts: ExpertsStage,
    graphs: bool,
) -> CudaExpertsCache:
    with gpu_lock.driver_errors():
        gpu_lock.device.prepare(plan.kernels)
    with ExitStack() as held:
        with gpu_lock.exclusive():
            buffer = gpu_lock.device.allocate(aligned(plan.n_bytes) + pools_bytes(slots))
            held.enter_context(closing(buffer))
            gpu_lock.device.upload(buffer, 0, np.zeros(plan.n_bytes, np.uint8))
        pools = _placed(plan, slots, buffer)
        order = list(dict.fromkeys(pools))
        members = {pool: tuple(n for n, own in enumerate(pools) if own == pool) for pool in order}
        table = ExpertTable([Pool(members[pool], pool.slots) for pool in order], plan.mixtures[0].experts)
        plan.bind(buffer.address, pools, [stage.exchanged(number) for number in range(len(pools))])
        copies = held.enter_context(closing(ExpertCopies(gpu_lock, buffer, order, table, experts.expert_weights)))
        cache = CudaExpertsCache(gpu_lock, plan, buffer, copies, table, experts, graphs)
        held.pop_all()
    return cache


def _placed(plan: CachePlan, slots: Mapping[SlotLayout, int], buffer: Buffer) -> Sequence[PoolPlace]:
    at, places = aligned(plan.n_bytes), dict[SlotLayout, PoolPlace]()
    for layout, count in slots.items():
        places[layout] = PoolPlace(layout, count, buffer.at(at))
        at += layout.pool_bytes(count)
    return [places[pool.layout] for pool in plan.pools]

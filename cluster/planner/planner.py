"""Assigns layers to workers and predicts the speed of the plan. Pure.

Objective `throughput`: the slowest stage is as fast as possible for a mix of work that includes the head (on the last
stage): 512 prompt tokens and 128 output tokens for each of eight concurrent sequences. Objective `latency`: the compute
time per token is within 10 % of its minimum; of these splits, the one where a percent more of it has made the slowest
stage three percent faster. So equal workers share the layers where a hop costs little, and much slower ones stay idle
unless their memory is needed. Of equal splits, the one with fewer stages. There is KV memory for several whole
contexts, or for one where that makes a step faster by a tenth.

Workers keep the file's order unless another one is clearly better. Unless every worker has a profile, all are taken to
be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from llamaclust.cluster.planner.adjacency import Pairs, constrained_steps, violated_pair
from llamaclust.cluster.planner.chain import Chain, is_measured
from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import Held, devices_of
from llamaclust.cluster.planner.explain import idle_workers, model_memory_error, split_memory_error
from llamaclust.cluster.planner.groups.choice import better_groups
from llamaclust.cluster.planner.manual import Assignment, check_possible, checked
from llamaclust.cluster.planner.memory import MemoryModel, PlanRequest
from llamaclust.cluster.planner.plan import DevicePlan, Plan, StagePlan
from llamaclust.cluster.planner.splits.search import Best, best_split
from llamaclust.cluster.planner.splits.worker_classes import WorkerClass, worker_classes
from llamaclust.cluster.planner.stage_parts import StageParts
from llamaclust.cluster.planner.stage_tables import stage_tables
from llamaclust.core.errors import InsufficientMemoryError, NetworkPartitionError
from llamaclust.core.gpus import cache_room
from llamaclust.core.profile import DeviceProfile
from llamaclust.model.costs import ModelCosts

_AIMS = {"throughput": (0, np.inf), "latency": (3, 1.1)}
"""(percent by which a percent more time per token makes the slowest stage faster at least, most of its least time)."""

_WANTED_CONTEXTS = 4
"""For so many whole contexts a split should leave KV memory; one is the least."""

_WORTH_ROOM = 1.1
"""Less room for keys and values, though for a whole context, has to make a plan faster by so much."""

_NOMINAL_CPU = DeviceProfile(read_bytes_s=20e9, int8_macs_s=300e9)
_NOMINAL_GPU = DeviceProfile(read_bytes_s=500e9, int8_macs_s=50e12)


def make_plan(costs: ModelCosts, workers: Sequence[WorkerFacts], request: PlanRequest) -> Plan:
    """Raises UsageError for a wrong manual plan, InsufficientMemoryError with the missing MiB, NetworkPartitionError
    where only `partitions` prevents a plan."""
    stages = StageCosts.of(costs)
    sizes = MemoryModel(stages, request)
    if request.manual is not None:
        by_hand = checked(request.manual, [worker.name for worker in workers], stages.layers, stages.expert_shards)
        check_possible(by_hand, stages.possible, stages.expert_shards)
        _check_adjacency(by_hand, request.partitions)
        found = _Found(by_hand, contexts=1, optimality_gap=None)
    else:
        found = _automatic(sizes, workers)
    by_name = {worker.name: worker for worker in workers}
    chain = Chain.of(sizes, found.split, by_name, found.contexts)
    held, kv_blocks = chain.members, chain.kv_blocks
    if kv_blocks < request.context_blocks:
        raise split_memory_error(sizes, held)
    return Plan(
        stages=tuple(_stage(sizes.of(stage.costs), by_name[stage.worker], stage, kv_blocks) for stage in held),
        kv_blocks=kv_blocks,
        window_blocks=sizes.kv_groups.window_blocks(kv_blocks),
        state_blocks=sizes.kv_groups.state_blocks(kv_blocks),
        context_length=request.context_length,
        idle_workers=idle_workers(sizes, workers, {stage.worker for stage in held}, found.contexts),
        prediction=chain.prediction,
        optimality_gap=found.optimality_gap,
        expert_shards=stages.expert_shards,
    )


def _stage(sizes: MemoryModel, worker: WorkerFacts, stage: StageParts, kv_blocks: int) -> StagePlan:
    """`sizes`: of the model, or of a member's portion of it."""
    parts = tuple(
        DevicePlan(
            device=part.device.device,
            start=part.start,
            end=part.end,
            cpu_moe=part.cpu_moe,
            is_experts=part.is_experts,
            weight_bytes=sizes.weight_bytes(part),
            touched_bytes=_touched_bytes(sizes.stages, part),
            kv_bytes=0 if part.is_experts else sizes.kv_bytes(part.start, part.end, kv_blocks),
            workspace_bytes=sizes.workspace_of(part),
            memory_bytes=part.device.memory_bytes,
        )
        for part in stage.parts
    )
    parts = tuple(_with_cache(part, sizes.request.experts_cache_bytes) for part in parts)
    rooms = [device.memory_bytes for device in devices_of(worker)]
    return StagePlan(
        worker=worker.name,
        start=stage.start,
        end=stage.end,
        shares=stage.shares,
        member=stage.member,
        weight_bytes=sum(part.weight_bytes for part in parts),
        touched_bytes=sum(part.touched_bytes for part in parts),
        kv_bytes=sum(part.kv_bytes for part in parts),
        workspace_bytes=sum(part.workspace_bytes for part in parts),
        memory_bytes=None if None in rooms else sum(room or 0 for room in rooms),
        devices=parts if worker.gpus else (),
    )


def _with_cache(part: DevicePlan, limit_bytes: int | None) -> DevicePlan:
    """With what its layers leave for copies of their experts in RAM."""
    if part.is_experts or not part.cpu_moe or part.memory_bytes is None:
        return part
    return replace(part, experts_cache_bytes=cache_room(part.memory_bytes - part.bytes, limit_bytes))


def _touched_bytes(costs: StageCosts, part: Held) -> int:
    moved = costs.touched_expert_bytes(part.cpu_moe)
    return moved if part.is_experts else costs.touched_bytes(part.start, part.end) - moved


@dataclass(frozen=True, slots=True)
class _Found:
    split: tuple[Assignment, ...]
    contexts: int  # for so many whole contexts there is KV memory at least
    optimality_gap: float | None  # see `Plan`


def _check_adjacency(split: Sequence[Assignment], partitions: Pairs) -> None:
    if (pair := violated_pair([entry.workers for entry in split], partitions)) is not None:
        raise NetworkPartitionError(
            f"every plan has workers {' and '.join(sorted(pair))} next to each other, which cannot reach each other"
        )


def _automatic(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> _Found:
    """Workers without any measurement hold no layers where the others suffice. A worker that lacks only measurements of
    its GPUs is used."""
    measured = [worker for worker in workers if worker.profile is not None]
    if 0 < len(measured) < len(workers):
        with suppress(InsufficientMemoryError, NetworkPartitionError):
            return _automatic(sizes, measured)
    try:
        found = _of_single_workers(sizes, workers)
    except InsufficientMemoryError:
        groups = better_groups(sizes, workers, None, _contexts(sizes))
        if groups is None:
            raise
    else:
        groups = better_groups(sizes, workers, found.split, _contexts(sizes))
        if groups is None:
            return found
    return _Found(groups.entries, groups.contexts, None)


def _contexts(sizes: MemoryModel) -> tuple[int, ...]:
    return tuple(dict.fromkeys((min(_WANTED_CONTEXTS, sizes.request.max_sequences), 1)))


def _of_single_workers(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> _Found:
    objective, partitions = sizes.request.objective, sizes.request.partitions
    if not is_measured(workers):
        workers = [_nominal(worker) for worker in workers]
    weight, slack = _AIMS[objective]
    constrained = frozenset[str]().union(*partitions)
    chosen: tuple[Best, int] | None = None
    before: list[WorkerClass] = []
    for contexts in _contexts(sizes):
        classes = worker_classes(workers, partial(stage_tables, sizes, contexts), constrained)
        if chosen is not None and all(map(WorkerClass.costs_as, classes, before)):
            break  # memory is not what decides
        before = classes
        ways = constrained_steps(classes, [worker.name for worker in workers], partitions) if partitions else None
        best = best_split(classes, weight, slack, ways)
        if best is not None and (chosen is None or _is_worth(best, chosen[0], objective)):
            chosen = best, contexts
    if chosen is not None:
        best, contexts = chosen
        split = tuple(Assignment((workers[index].name,), start, end) for index, start, end in best.split.stages)
        return _Found(split, contexts, best.optimality_gap)
    if partitions:
        found = _of_single_workers(replace(sizes, request=replace(sizes.request, partitions=frozenset())), workers)
        _check_adjacency(found.split, partitions)
        return found
    raise model_memory_error(sizes, workers)


def _is_worth(less_room: Best, more_room: Best, objective: str) -> bool:
    """Whether it is so much faster where there is room for fewer contexts: fewer layers beside a GPU, say."""
    fast, slow = less_room.split, more_room.split
    if objective == "latency":
        return fast.total * _WORTH_ROOM < slow.total
    return fast.slowest * _WORTH_ROOM < slow.slowest


def _nominal(worker: WorkerFacts) -> WorkerFacts:
    gpus = tuple(replace(gpu, profile=_NOMINAL_GPU) for gpu in worker.gpus)
    return replace(worker, profile=_NOMINAL_CPU, gpus=gpus)

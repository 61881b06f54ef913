"""Assigns layers to workers and groups, and predicts the speed of the plan. All functions are pure.

The objective `latency` minimizes the time of one request with 512 prompt tokens and 128 answer tokens. The objective
`throughput` minimizes the time of the slowest stage for eight such requests at once. A plan without groups, or in the
order of the cluster file, is preferred unless another plan is at least 2 % faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from llamaclust.cluster.planner.chain import Chain, is_measured, with_context
from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers, devices_of
from llamaclust.cluster.planner.explain import idle_workers, model_memory_error, split_memory_error
from llamaclust.cluster.planner.groups.best_chain import Found, best_chain
from llamaclust.cluster.planner.groups.rejected import rejected_group
from llamaclust.cluster.planner.links import Pairs, disputed_pair, violated_pair
from llamaclust.cluster.planner.manual import Assignment, check_possible, checked
from llamaclust.cluster.planner.memory import MemoryModel, PlanRequest
from llamaclust.cluster.planner.plan import DevicePlan, Plan, Prediction, RejectedGroup, StagePlan
from llamaclust.cluster.planner.stage_parts import StageParts
from llamaclust.core.errors import DisputeError, InsufficientMemoryError, NetworkPartitionError
from llamaclust.core.gpus import cache_room
from llamaclust.core.profile import DeviceProfile
from llamaclust.model.costs import ModelCosts

_WANTED_CONTEXTS = 4
"""Number of full-length sequences that KV memory should hold. It must hold at least one."""

_NOMINAL_CPU = DeviceProfile(read_bytes_s=20e9, int8_macs_s=300e9)
_NOMINAL_GPU = DeviceProfile(read_bytes_s=500e9, int8_macs_s=50e12)


def make_plan(costs: ModelCosts, workers: Sequence[WorkerFacts], request: PlanRequest) -> Plan:
    """Makes a plan. Raises UsageError if a manual plan is invalid, InsufficientMemoryError if the model does not fit,
    and NetworkPartitionError if every plan needs a link between workers that cannot reach each other."""
    plan, kept = _plan(costs, workers, request), request.kept_context
    if kept is not None and kept > request.context_length and plan.lacks_kv_memory:
        # Other places of the layers may leave the memory.
        with suppress(InsufficientMemoryError, NetworkPartitionError):
            return _plan(costs, workers, replace(request, context_length=kept))
    return plan


def _plan(costs: ModelCosts, workers: Sequence[WorkerFacts], request: PlanRequest) -> Plan:
    stages = StageCosts.of(costs)
    sizes = MemoryModel(stages, request)
    if request.manual is not None:
        by_hand = checked(request.manual, [worker.name for worker in workers], stages.layers, stages.expert_shards)
        check_possible(by_hand, stages.possible, stages.expert_shards)
        _check_adjacency(by_hand, request.partitions)
        _check_disputes(by_hand, request.disputes)
        found = Found(by_hand, contexts=1)
    else:
        found = _automatic(sizes, workers)
    by_name = {worker.name: worker for worker in workers}
    chain = Chain.of(sizes, found.entries, by_name, found.contexts)
    if chain.kv_blocks < request.context_blocks:
        raise split_memory_error(sizes, chain.members)
    served, context = with_context(chain)
    served_sizes, held, kv_blocks = served.sizes, served.members, served.kv_blocks
    if kv_blocks < request.context_blocks:
        raise split_memory_error(served_sizes, held)
    rejected = None if request.manual is not None else rejected_group(chain, workers, found.contexts)
    return Plan(
        stages=tuple(_stage(served_sizes, by_name[stage.worker], stage, kv_blocks) for stage in held),
        kv_blocks=kv_blocks,
        least_kv_blocks=chain.kv_blocks,
        window_blocks=served_sizes.kv_groups.window_blocks(kv_blocks),
        state_blocks=served_sizes.kv_groups.state_blocks(kv_blocks),
        context=context,
        idle_workers=idle_workers(sizes, workers, {stage.worker for stage in held}, found.contexts),
        prediction=served.prediction,
        objective=None if request.manual is not None else request.objective,
        without_groups=_without_groups(sizes, by_name, found),
        rejected_group=rejected if isinstance(rejected, RejectedGroup) else None,
        no_group=rejected if isinstance(rejected, str) else "",
        optimality_gap=found.optimality_gap,
        expert_shards=stages.expert_shards,
    )


def _without_groups(sizes: MemoryModel, workers: Mapping[str, WorkerFacts], found: Found) -> Prediction | None:
    if found.single is None or not found.has_groups:
        return None
    return Chain.of(sizes, found.single.entries, workers, found.single.contexts).prediction


def _stage(sizes: MemoryModel, worker: WorkerFacts, stage: StageParts, kv_blocks: int) -> StagePlan:
    sizes = sizes.of(stage.costs, stage.portion)
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
    if part.is_experts or not part.cpu_moe or part.memory_bytes is None:
        return part
    return replace(part, experts_cache_bytes=cache_room(part.memory_bytes - part.bytes, limit_bytes))


def _touched_bytes(costs: StageCosts, part: PlannedLayers) -> int:
    moved = costs.touched_expert_bytes(part.cpu_moe)
    return moved if part.is_experts else costs.touched_bytes(part.start, part.end) - moved


def _check_adjacency(split: Sequence[Assignment], partitions: Pairs) -> None:
    if (pair := violated_pair([entry.workers for entry in split], partitions)) is not None:
        raise NetworkPartitionError(
            f"workers {' and '.join(sorted(pair))} cannot reach each other, but are neighbours in every plan"
        )


def _check_disputes(split: Sequence[Assignment], disputes: Pairs) -> None:
    if (pair := disputed_pair([entry.workers for entry in split], disputes)) is not None:
        workers = " and ".join(sorted(pair))
        why = f"workers {workers} accuse each other, but are in one group of the `plan`: change the plan, or wait"
        raise DisputeError(why, pair=pair)


def _automatic(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> Found:
    """Searches for a plan. Ignores unmeasured workers if the model fits on the measured workers."""
    measured = [worker for worker in workers if worker.profile is not None]
    if 0 < len(measured) < len(workers):
        with suppress(InsufficientMemoryError, NetworkPartitionError):
            return _automatic(sizes, measured)
    contexts = tuple(dict.fromkeys((min(_WANTED_CONTEXTS, sizes.request.max_sequences), 1)))
    known = workers if is_measured(workers) else [_nominal(worker) for worker in workers]
    largest = sizes.request.largest_group if known is workers else 1
    found = best_chain(replace(sizes, request=replace(sizes.request, largest_group=largest)), known, contexts)
    if found is not None:
        return found
    if sizes.request.partitions:
        joined = _automatic(replace(sizes, request=replace(sizes.request, partitions=frozenset())), workers)
        _check_adjacency(joined.entries, sizes.request.partitions)
        return joined
    raise model_memory_error(sizes, workers)


def _nominal(worker: WorkerFacts) -> WorkerFacts:
    gpus = tuple(replace(gpu, profile=_NOMINAL_GPU) for gpu in worker.gpus)
    return replace(worker, profile=_NOMINAL_CPU, gpus=gpus)

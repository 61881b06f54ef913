"""Explains why a model or a plan does not fit, and why workers are idle."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers, devices_of
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.plan import IdleWorker, Plan
from llamaclust.cluster.planner.splits.holders import StageTable, worker_classes
from llamaclust.cluster.planner.splits.orders import least_total
from llamaclust.cluster.planner.stage_parts import StageParts
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import ranges
from llamaclust.core.limits import layer_span
from llamaclust.core.sizes import MIB, mib, missing, needed
from llamaclust.model.program import KV_BLOCK_TOKENS

_CONTEXT_STEP = 256


def split_memory_error(sizes: MemoryModel, split: Sequence[StageParts]) -> InsufficientMemoryError:
    lacking = "; ".join(text for stage in split for text in _lacking(sizes.of(stage.costs, stage.portion), stage))
    tokens = sizes.request.context_length
    return InsufficientMemoryError(
        f"the plan does not fit for {tokens} tokens of context: {lacking}; change the layers, or give more memory"
    )


def _lacking(sizes: MemoryModel, stage_parts: StageParts) -> Iterator[str]:
    for held in stage_parts.parts:
        worker, start, end, given = held.device, held.start, held.end, sizes.request.kv_memory_bytes
        layers = layer_span(start, end, sizes.stages.expert_shards)
        what = f"experts of layers {ranges(held.cpu_moe)}" if held.is_experts else f"layers {layers}"
        if stage_parts.shares:
            what = f"{stage_parts.shares[stage_parts.member] / sum(stage_parts.shares):.0%} of {what}"
        stage, parts = f"{what} on worker {worker.name!r} need", sizes.parts(held, 1)
        context_bytes = 0 if held.is_experts else sizes.context_bytes(start, end)
        if given is not None and context_bytes > given:
            yield f"{stage} {missing({'KV memory': context_bytes}, given, 'kv_memory is {} MiB')}"
        elif worker.memory_bytes is not None and sum(parts.values()) > worker.memory_bytes:
            yield f"{stage} {missing(parts, worker.memory_bytes, 'it has {} MiB')}"


def model_memory_error(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> InsufficientMemoryError:
    layers = sizes.stages.layers
    parts = {"weights": sizes.stages.weight_bytes(0, layers), "KV memory": sizes.context_bytes(0, layers)}
    devices = [device for worker in workers for device in devices_of(worker)]
    workspace = max(sizes.workspace_bytes(device, 0, layers) for device in devices)
    given, have = sizes.request.kv_memory_bytes, [device for device in devices if device.memory_bytes is not None]
    rooms = [f"{worker.name} {(worker.memory_bytes or 0) // MIB}" for worker in have]
    missing_bytes = _least_shortfall(sizes, workers)
    fitting_context = _fitting_context(sizes, workers)
    problem = (
        f"the model does not fit: it needs {needed(parts)} for {sizes.request.context_length} tokens of context, and "
        f"up to {mib(workspace)} MiB of workspace a worker; the workers have, in MiB: {', '.join(rooms) or '?'}"
        f"{'' if given is None else f', and kv_memory is {given // MIB} MiB each'}; "
        f"{mib(missing_bytes)} MiB are missing"
    )
    smaller = f"set context_length to {fitting_context} or less" if fitting_context else "take a smaller model"
    error = InsufficientMemoryError(f"{problem}. Add a worker, give the workers more memory, or {smaller}")
    error.problem, error.missing_bytes, error.fitting_context = problem, missing_bytes, fitting_context
    return error


def other_models_error(plan: Plan) -> InsufficientMemoryError:
    fitting, missing_bytes = plan.kv_blocks * KV_BLOCK_TOKENS, plan.missing_kv_bytes
    problem = (
        f"other models leave room for {fitting} of {plan.context_length} tokens of context; "
        f"{mib(missing_bytes)} MiB are missing"
    )
    cures = f"Unload another model, give the workers more memory, or set context_length to {fitting} or less"
    error = InsufficientMemoryError(f"{problem}. {cures}")
    error.problem, error.missing_bytes, error.fitting_context = problem, missing_bytes, fitting
    return error


def _least_shortfall(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> float:
    def tables(worker: WorkerFacts) -> tuple[StageTable, ...]:
        shortfall_bytes = np.where(sizes.stages.possible, sizes.shortfall_table(worker, 1), np.inf)
        return (StageTable(shortfall_bytes, shortfall_bytes),)

    return least_total(worker_classes([replace(worker, profile=None) for worker in workers], tables))


def _fitting_context(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> int | None:
    def is_too_long(length: int) -> bool:
        request = replace(sizes.request, context_length=length)
        return _least_shortfall(replace(sizes, request=request), workers) > 0

    lengths = range(_CONTEXT_STEP, sizes.request.context_length + 1, _CONTEXT_STEP)
    fitting = bisect_left(lengths, True, key=is_too_long)
    return lengths[fitting - 1] if fitting else None


def idle_workers(
    sizes: MemoryModel, workers: Sequence[WorkerFacts], used: Collection[str], contexts: int
) -> tuple[IdleWorker, ...]:
    """Returns workers without layers, with reasons. KV memory is planned for `contexts` full-length sequences."""
    idle = [worker for worker in workers if worker.name not in used]
    if sizes.request.manual is not None:
        return tuple(IdleWorker(worker.name, "the manual plan does not name this worker") for worker in idle)
    return tuple(IdleWorker(worker.name, _reason(sizes, worker, used, contexts)) for worker in idle)


def _reason(sizes: MemoryModel, worker: WorkerFacts, used: Collection[str], contexts: int) -> str:
    if others := sorted(other for other in used if frozenset((worker.name, other)) in sizes.request.partitions):
        return f"it and {', '.join(others)} cannot reach each other"
    layers, stages = sizes.stages.layers, len(used)
    # With one other worker, the idle worker could hold the first or the last layer.
    open_to = range(layers) if stages > 1 else (0, layers - 1)
    least = min(sum(sizes.parts(PlannedLayers(worker, layer, layer + 1), contexts).values()) for layer in open_to)
    rooms = [device.memory_bytes for device in devices_of(worker)]
    room = max(least if memory_bytes is None else memory_bytes for memory_bytes in rooms)
    if room < least:
        what = "a stage of one layer" if sizes.stages.expert_shards == 1 else "the smallest part of a layer"
        return f"too little memory: it has {room // MIB} MiB, {what} needs {mib(least)} MiB"
    if stages == layers:
        return f"the model has {layers} layers, one for each of the other workers"
    return "with this worker, the plan would be slower"

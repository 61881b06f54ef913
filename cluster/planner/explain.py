"""Explanations: why a model or a plan does not fit, and why workers are idle."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.costs import Table, WorkerFacts
from llamaclust.cluster.planner.devices import devices_of
from llamaclust.cluster.planner.memory import MemoryModel, Split
from llamaclust.cluster.planner.plan import IdleWorker
from llamaclust.cluster.planner.search import least_total
from llamaclust.cluster.planner.worker_classes import worker_classes
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import MIB, mib, missing, needed

_CONTEXT_STEP = 256


def split_memory_error(sizes: MemoryModel, split: Split) -> InsufficientMemoryError:
    """Says what every worker of a split lacks."""
    lacking = "; ".join(_lacking(sizes, split))
    tokens = sizes.limits.context_length
    return InsufficientMemoryError(
        f"the plan does not fit for {tokens} tokens of context: {lacking}; change the layers, or give more memory"
    )


def _lacking(sizes: MemoryModel, split: Split) -> Iterator[str]:
    for worker, start, end in split:
        stage, given = f"worker {worker.name!r}: layers [{start}, {end}) need", sizes.limits.kv_memory_bytes
        if given is not None and sizes.kv_shortfall_bytes(start, end):
            yield f"{stage} {missing({'KV memory': sizes.context_bytes(start, end)}, given, 'kv_memory is {} MiB')}"
        elif worker.memory_bytes is not None and not sizes.fits(worker, start, end, 1):
            yield f"{stage} {missing(sizes.parts(worker, start, end, 1), worker.memory_bytes, 'it has {} MiB')}"


def model_memory_error(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> InsufficientMemoryError:
    """Says what is missing at least, over all splits, and what it would take."""
    layers = sizes.stages.layers
    parts = {"weights": sizes.stages.weight_bytes(0, layers), "KV memory": sizes.context_bytes(0, layers)}
    devices = [device for worker in workers for device in devices_of(worker)]
    workspace = max(sizes.workspace_bytes(device, 0, layers) for device in devices)
    given, have = sizes.limits.kv_memory_bytes, [device for device in devices if device.memory_bytes is not None]
    rooms = [f"{worker.name} {(worker.memory_bytes or 0) // MIB}" for worker in have]
    return InsufficientMemoryError(
        f"the model does not fit: it needs {needed(parts)} for {sizes.limits.context_length} tokens of context, and "
        f"up to {mib(workspace)} MiB of workspace a worker; the workers have, in MiB: {', '.join(rooms) or '?'}"
        f"{'' if given is None else f', and kv_memory is {given // MIB} MiB each'}; "
        f"{mib(_least_shortfall(sizes, workers))} MiB are missing. Add a worker, give them more memory"
        f"{_shorter_context(sizes, workers)}"
    )


def _least_shortfall(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> float:
    """Bytes that memory lacks in the best of all splits."""

    def tables(worker: WorkerFacts) -> tuple[Table, Table]:
        shortfall_bytes = sizes.shortfall_table(worker, 1)
        return shortfall_bytes, shortfall_bytes

    return least_total(worker_classes([replace(worker, profile=None) for worker in workers], tables))


def _shorter_context(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> str:
    """The longest context that fits, as a piece of advice."""
    low, high = 0, sizes.limits.context_length // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(sizes, limits=replace(sizes.limits, context_length=middle * _CONTEXT_STEP))
        low, high = (middle, high) if _least_shortfall(shorter, workers) == 0 else (low, middle - 1)
    return f", or set context_length to {low * _CONTEXT_STEP} or less" if low else ", or take a smaller model"


def idle_workers(
    sizes: MemoryModel,
    workers: Sequence[WorkerFacts],
    used: Collection[str],
    *,
    by_hand: bool,
    contexts: int,
    partitions: Pairs = frozenset(),
) -> tuple[IdleWorker, ...]:
    """Workers without layers. `contexts`: the whole contexts for which the plan has KV memory."""
    idle = [worker for worker in workers if worker.name not in used]
    if by_hand:
        return tuple(IdleWorker(worker.name, "the plan gives it no layers") for worker in idle)
    return tuple(
        IdleWorker(
            worker.name, _unreachable(worker.name, used, partitions) or _reason(sizes, worker, len(used), contexts)
        )
        for worker in idle
    )


def _unreachable(name: str, used: Collection[str], partitions: Pairs) -> str | None:
    others = sorted(other for other in used if frozenset((name, other)) in partitions)
    return f"it and {', '.join(others)} cannot reach each other" if others else None


def _reason(sizes: MemoryModel, worker: WorkerFacts, stages: int, contexts: int) -> str:
    layers = sizes.stages.layers
    open_to = range(layers) if stages > 1 else (0, layers - 1)  # beside one other worker, it is the first or the last
    least = min(sum(sizes.parts(worker, layer, layer + 1, contexts).values()) for layer in open_to)
    rooms = [device.memory_bytes for device in devices_of(worker)]
    room = max(least if memory_bytes is None else memory_bytes for memory_bytes in rooms)
    if room < least:
        return f"too little memory: it has {room // MIB} MiB, a stage of one layer needs {mib(least)} MiB"
    if stages == layers:
        return f"the model has {layers} layers, one for each of the others"
    return "it would make the others slower"

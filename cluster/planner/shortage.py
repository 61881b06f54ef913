"""What to say where a model does not fit: who lacks how much, and what it would take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llamaclust.cluster.planner.costs import Table, WorkerFacts
from llamaclust.cluster.planner.devices import devices_of
from llamaclust.cluster.planner.memory import Cut, Sizes
from llamaclust.cluster.planner.search import least_total
from llamaclust.cluster.planner.worker_classes import kinds_of
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import MIB, mib, missing, needed

_CONTEXT_STEP = 256


def cut_does_not_fit(sizes: Sizes, cut: Cut) -> InsufficientMemoryError:
    """Says what every worker of a cut lacks."""
    lacking = "; ".join(_lacking(sizes, cut))
    tokens = sizes.limits.context_length
    return InsufficientMemoryError(
        f"the plan does not fit for {tokens} tokens of context: {lacking}; change the layers, or give more memory"
    )


def _lacking(sizes: Sizes, cut: Cut) -> Iterator[str]:
    for worker, start, end in cut:
        stage, given = f"worker {worker.name!r}: layers [{start}, {end}) need", sizes.limits.kv_memory_bytes
        if given is not None and sizes.missing_kv_bytes(start, end):
            yield f"{stage} {missing({'KV memory': sizes.context_bytes(start, end)}, given, 'kv_memory is {} MiB')}"
        elif worker.memory_bytes is not None and not sizes.fits(worker, start, end, 1):
            yield f"{stage} {missing(sizes.parts(worker, start, end, 1), worker.memory_bytes, 'it has {} MiB')}"


def does_not_fit(sizes: Sizes, workers: Sequence[WorkerFacts]) -> InsufficientMemoryError:
    """Says what is missing at least, over all cuts, and what it would take."""
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
        f"{mib(_least_missing(sizes, workers))} MiB are missing. Add a worker, give them more memory"
        f"{_shorter_context(sizes, workers)}"
    )


def _least_missing(sizes: Sizes, workers: Sequence[WorkerFacts]) -> float:
    """Bytes that memory lacks in the best of all cuts."""

    def tables(worker: WorkerFacts) -> tuple[Table, Table]:
        missing_bytes = sizes.missing_table(worker, 1)
        return missing_bytes, missing_bytes

    return least_total(kinds_of([replace(worker, profile=None) for worker in workers], tables))


def _shorter_context(sizes: Sizes, workers: Sequence[WorkerFacts]) -> str:
    """The longest context that fits, as a piece of advice."""
    low, high = 0, sizes.limits.context_length // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(sizes, limits=replace(sizes.limits, context_length=middle * _CONTEXT_STEP))
        low, high = (middle, high) if _least_missing(shorter, workers) == 0 else (low, middle - 1)
    return f", or set context_length to {low * _CONTEXT_STEP} or less" if low else ", or take a smaller model"

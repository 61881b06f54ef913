"""The worker that holds the encoder of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Protocol

from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import HeldLayers, Plan, StagePlan
from llamaclust.core.errors import InsufficientMemoryError, NetworkPartitionError, UsageError
from llamaclust.core.sizes import MIB, needed

EncoderParts = Callable[[int], Mapping[str, int]]
"""Returns the RAM of an encoder in bytes by kind, on a worker with this number of threads. It must cache, because it is
called often."""


class MakePlan(Protocol):
    def __call__(self, workers: Sequence[WorkerFacts], by_hand: tuple[Assignment, ...] | None = None) -> Plan:
        """Makes a plan with these layers, or else the request's plan."""
        ...


def plan_with_encoder(
    encoder: EncoderParts,
    workers: Sequence[WorkerFacts],
    make_plan: MakePlan,
    *,
    is_manual: bool = False,
    partitions: Pairs = frozenset(),
) -> Plan:
    """Makes a plan in which one of the workers with layers holds the encoder of images.

    The encoder's bytes are taken from the RAM of one worker before layers are assigned. Workers are tried in the order
    of most free RAM, and the first one that has layers in the resulting plan holds the encoder. If none has, the first
    one that can hold a layer beside the encoder gets one: the first layer of the largest stage. With a manual plan,
    only its workers are tried, in the order of most RAM that weights and workspace leave. Raises
    InsufficientMemoryError with the numbers if there is no such plan.
    """
    tried = _by_room(make_plan(workers), workers) if is_manual else _by_memory(workers, partitions)
    without: list[tuple[WorkerFacts, Plan]] = []
    for worker in tried:
        plan = _plan_of(make_plan, _lessened(workers, worker, encoder))
        if plan is not None and _has_layers(plan, worker):
            return _placed(plan, worker, encoder)
        if plan is not None:
            without.append((worker, plan))
    for worker, plan in without:
        plan_with_layer = _with_layer(plan, worker.name, _lessened(workers, worker, encoder), make_plan)
        if plan_with_layer is not None:
            return _placed(plan_with_layer, worker, encoder)
    raise _error(encoder, workers, make_plan)


def _by_memory(workers: Sequence[WorkerFacts], partitions: Pairs) -> list[WorkerFacts]:
    """Returns one worker of each kind, because equal workers are interchangeable."""
    unlike = frozenset[str]().union(*partitions)
    kinds: dict[WorkerFacts, WorkerFacts] = {}
    for worker in workers:
        kinds.setdefault(worker if worker.name in unlike else replace(worker, name=""), worker)
    return sorted(kinds.values(), key=lambda worker: -_room(worker))


def _room(worker: WorkerFacts) -> float:
    return inf if worker.memory_bytes is None else worker.memory_bytes


def _by_room(plan: Plan, workers: Sequence[WorkerFacts]) -> list[WorkerFacts]:
    left = {stage.worker: _taken_bytes(stage) for stage in plan.stages}
    with_layers = [worker for worker in workers if worker.name in left]
    return sorted(with_layers, key=lambda worker: left[worker.name] - _room(worker))


def _taken_bytes(stage: StagePlan) -> int:
    in_ram: Sequence[HeldLayers] = [stage]
    if stage.devices:
        in_ram = [part for part in stage.devices if part.device == "cpu"]
    return sum(held.weight_bytes + held.workspace_bytes for held in in_ram)


def _lessened(
    workers: Sequence[WorkerFacts], holder: WorkerFacts, encoder: EncoderParts
) -> Sequence[WorkerFacts] | None:
    """Takes the encoder's bytes from the holder's RAM. Returns None if it has less."""
    if holder.memory_bytes is None:
        return workers
    left_bytes = holder.memory_bytes - sum(encoder(holder.threads).values())
    if left_bytes < 0:
        return None
    return [replace(worker, memory_bytes=left_bytes) if worker is holder else worker for worker in workers]


def _plan_of(
    make_plan: MakePlan, workers: Sequence[WorkerFacts] | None, by_hand: tuple[Assignment, ...] | None = None
) -> Plan | None:
    """Returns None if there is no plan."""
    with suppress(InsufficientMemoryError, NetworkPartitionError):
        return None if workers is None else make_plan(workers, by_hand)
    return None


def _with_layer(plan: Plan, holder: str, workers: Sequence[WorkerFacts] | None, make_plan: MakePlan) -> Plan | None:
    """Gives the first layer of the largest stage to the holder, or so many layers that a border is possible there."""
    entries = [Assignment(_names(stage), stage[0].start, stage[0].end, stage[0].shares) for stage in plan.by_stage]
    place, largest = max(enumerate(entries), key=lambda each: each[1].end - each[1].start)
    for border in range(largest.start + 1, largest.end):
        parts = (Assignment((holder,), largest.start, border), replace(largest, start=border))
        by_hand = (*entries[:place], *parts, *entries[place + 1 :])
        with suppress(UsageError):  # no border is possible there
            made = _plan_of(make_plan, workers, by_hand)
            idle = tuple(idle for idle in plan.idle_workers if idle.worker != holder)
            return None if made is None else replace(made, objective=plan.objective, idle_workers=idle)
    return None


def _names(stage: Sequence[StagePlan]) -> tuple[str, ...]:
    return tuple(member.worker for member in stage)


def _has_layers(plan: Plan, worker: WorkerFacts) -> bool:
    return any(stage.worker == worker.name for stage in plan.stages)


def _placed(plan: Plan, holder: WorkerFacts, encoder: EncoderParts) -> Plan:
    n_bytes = sum(encoder(holder.threads).values())

    def stage_of(stage: StagePlan) -> StagePlan:
        if stage.worker != holder.name:
            return stage
        whole = None if stage.memory_bytes is None else stage.memory_bytes + n_bytes
        return replace(stage, encoder_bytes=n_bytes, memory_bytes=whole)

    return replace(plan, stages=tuple(map(stage_of, plan.stages)))


def _error(encoder: EncoderParts, workers: Sequence[WorkerFacts], make_plan: MakePlan) -> InsufficientMemoryError:
    """Returns the error of a model that does not fit even without its encoder, or else that of the encoder."""
    text = needed(encoder(min(worker.threads for worker in workers)))
    try:
        make_plan(workers)
    except InsufficientMemoryError as error:
        told = InsufficientMemoryError(f"{error}; the encoder of images needs {text} in addition")
        told.missing_bytes, told.problem, told.fitting_context = (
            error.missing_bytes,
            error.problem,
            error.fitting_context,
        )
        return told
    rooms = ", ".join(f"{worker.name} {worker.memory_bytes // MIB}" for worker in workers if worker.memory_bytes)
    return InsufficientMemoryError(
        f"the encoder of images does not fit: beside layers, one worker needs {text} for it; the workers have, in MiB: "
        f"{rooms or '?'}. Give one of them more memory, or set mmproj: off"
    )

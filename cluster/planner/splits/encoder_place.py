"""Chooses the worker that holds the image encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Protocol

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import HeldLayers, Plan, StagePlan
from llamaclust.core.errors import InsufficientMemoryError, NetworkPartitionError, UsageError
from llamaclust.core.sizes import MIB, needed

_MOST_HOLDERS = 8
"""Number of tried workers after which the search ends if a plan was found."""
_FASTER = 0.98
"""Maximum ratio of times at which a plan counts as clearly faster than another."""
_MUCH_FASTER = 0.9
"""Maximum ratio of times at which a plan with less KV memory counts as clearly faster."""

EncoderParts = Callable[[int], Mapping[str, int]]
"""Returns the encoder's RAM in bytes by kind, for a number of threads. Must cache its results."""


class MakePlan(Protocol):
    def __call__(self, workers: Sequence[WorkerFacts], by_hand: tuple[Assignment, ...] | None = None) -> Plan:
        """Makes a plan for these workers. Assignments in `by_hand` replace those of the plan request."""
        ...


def plan_with_encoder(
    encoder: EncoderParts,
    workers: Sequence[WorkerFacts],
    make_plan: MakePlan,
    *,
    is_manual: bool = False,
    partitions: Pairs = frozenset(),
) -> Plan:
    """Makes a plan in which one worker also holds the image encoder. Raises InsufficientMemoryError if no plan fits."""
    without = _without_encoder(encoder, workers, make_plan)
    tried = _by_room(without, workers) if is_manual else _by_memory(without, workers, partitions)
    best: Plan | None = None
    for number, holder in enumerate(tried):
        for plan in _plans_with(holder, _lessened(workers, holder, encoder), make_plan, is_manual=is_manual):
            if best is None or _is_better(plan, best):
                best = _placed(plan, holder, encoder)
        if best is not None and (number + 1 >= _MOST_HOLDERS or not _is_better(without, best)):
            return best
    if best is None:
        raise _error(encoder, workers)
    return best


def _is_better(plan: Plan, other: Plan) -> bool:
    if _is_faster(plan, other) or _is_faster(other, plan):
        return _is_faster(plan, other)
    return len(plan.leaders) < len(other.leaders)


def _is_faster(plan: Plan, other: Plan) -> bool:
    new, old = plan.prediction, other.prediction
    if new is None or old is None:
        return False
    most = _FASTER if plan.least_kv_blocks >= other.least_kv_blocks else _MUCH_FASTER
    if plan.objective == "throughput":
        return old.tokens_per_s < most * new.tokens_per_s
    return new.answer_s < most * old.answer_s


def _plans_with(
    holder: WorkerFacts, workers: Sequence[WorkerFacts] | None, make_plan: MakePlan, *, is_manual: bool
) -> Iterator[Plan]:
    plan = _plan_of(make_plan, workers)
    if plan is None or workers is None:
        return
    if _has_layers(plan, holder):
        yield plan
    elif not is_manual:
        yield from _plans_in_place(plan, holder, workers, make_plan)
        yield from _plans_with_a_layer(plan, holder, workers, make_plan)


def _plans_in_place(
    plan: Plan, holder: WorkerFacts, workers: Sequence[WorkerFacts], make_plan: MakePlan
) -> Iterator[Plan]:
    held = {stage.worker for stage in plan.stages}
    for left in sorted(held):
        others = [worker for worker in workers if worker.name == holder.name or worker.name in held - {left}]
        found = _plan_of(make_plan, others)
        if found is not None and _has_layers(found, holder):
            entries = tuple(_entry(stage) for stage in found.by_stage)
            yield from _plans_by_hand(plan, entries, workers, make_plan)


def _by_memory(without: Plan, workers: Sequence[WorkerFacts], partitions: Pairs) -> list[WorkerFacts]:
    """Returns one worker of each kind. Workers with layers come first, then workers with more memory."""
    unlike = frozenset[str]().union(*partitions)
    kinds: dict[WorkerFacts, WorkerFacts] = {}
    for worker in sorted(workers, key=lambda worker: (not _has_layers(without, worker), -_room(worker))):
        kinds.setdefault(worker if worker.name in unlike else replace(worker, name=""), worker)
    return list(kinds.values())


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
    if holder.memory_bytes is None:
        return workers
    left_bytes = holder.memory_bytes - sum(encoder(holder.threads).values())
    if left_bytes < 0:
        return None
    return [replace(worker, memory_bytes=left_bytes) if worker is holder else worker for worker in workers]


def _plan_of(
    make_plan: MakePlan, workers: Sequence[WorkerFacts] | None, by_hand: tuple[Assignment, ...] | None = None
) -> Plan | None:
    with suppress(InsufficientMemoryError, NetworkPartitionError):
        return None if workers is None else make_plan(workers, by_hand)
    return None


def _plans_with_a_layer(
    plan: Plan, holder: WorkerFacts, workers: Sequence[WorkerFacts], make_plan: MakePlan
) -> Iterator[Plan]:
    """Yields a plan in which the worker `holder` takes over the first layers of the largest stage."""
    entries = [_entry(stage) for stage in plan.by_stage]
    place, largest = max(enumerate(entries), key=lambda each: each[1].end - each[1].start)
    for border in range(largest.start + 1, largest.end):
        parts = (Assignment((holder.name,), largest.start, border), replace(largest, start=border))
        by_hand = (*entries[:place], *parts, *entries[place + 1 :])
        with suppress(UsageError):  # No border is possible at this layer.
            yield from _plans_by_hand(plan, by_hand, workers, make_plan)
            return


def _plans_by_hand(
    plan: Plan, entries: tuple[Assignment, ...], workers: Sequence[WorkerFacts], make_plan: MakePlan
) -> Iterator[Plan]:
    made = _plan_of(make_plan, workers, entries)
    if made is not None:
        used = {worker for entry in entries for worker in entry.workers}
        reasons = {idle.worker: idle for idle in (*made.idle_workers, *plan.idle_workers) if idle.worker not in used}
        yield replace(made, objective=plan.objective, idle_workers=tuple(reasons.values()))


def _entry(stage: Sequence[StagePlan]) -> Assignment:
    return Assignment(tuple(member.worker for member in stage), stage[0].start, stage[0].end, stage[0].shares)


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


def _without_encoder(encoder: EncoderParts, workers: Sequence[WorkerFacts], make_plan: MakePlan) -> Plan:
    try:
        return make_plan(workers)
    except InsufficientMemoryError as error:
        text = needed(encoder(min(worker.threads for worker in workers)))
        explained = InsufficientMemoryError(f"{error}; the encoder of images needs {text} in addition")
        explained.missing_bytes, explained.problem, explained.fitting_context = (
            error.missing_bytes,
            error.problem,
            error.fitting_context,
        )
        raise explained from error


def _error(encoder: EncoderParts, workers: Sequence[WorkerFacts]) -> InsufficientMemoryError:
    text = needed(encoder(min(worker.threads for worker in workers)))
    rooms = ", ".join(f"{worker.name} {worker.memory_bytes // MIB}" for worker in workers if worker.memory_bytes)
    return InsufficientMemoryError(
        f"the encoder of images does not fit: one worker needs {text} in addition to layers; the workers have, in MiB: "
        f"{rooms or '?'}. Give one of them more memory, or set mmproj: off"
    )

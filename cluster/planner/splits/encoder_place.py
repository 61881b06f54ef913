"""The worker that holds the encoder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.plan import HeldLayers, Plan, StagePlan
from llamaclust.core.errors import InsufficientMemoryError, NetworkPartitionError
from llamaclust.core.sizes import MIB, needed

EncoderParts = Callable[[int], Mapping[str, int]]
"""Returns the RAM of an encoder in bytes by kind, on a worker with this number of threads. It must cache, because it is
called often."""
MakePlan = Callable[[Sequence[WorkerFacts]], Plan]


def plan_with_encoder(
    encoder: EncoderParts,
    workers: Sequence[WorkerFacts],
    make_plan: MakePlan,
    *,
    by_hand: bool = False,
    partitions: Pairs = frozenset(),
) -> Plan:
    """Makes a plan in which one of the workers with layers holds the encoder of images.

    The encoder's bytes are taken from the RAM of one worker before layers are assigned. Workers are tried in the order
    of most free RAM, and the first one that has layers in the resulting plan holds the encoder. If none has, each is
    tried again without the workers that had the layers. With a plan `by_hand`, only its workers are tried, in the order
    of most RAM that weights and workspace leave. Raises InsufficientMemoryError with the numbers if no plan is left.
    """
    tried = _by_room(make_plan(workers), workers) if by_hand else _by_memory(workers, partitions)
    open_ = [(worker, _plans(encoder, worker, workers, make_plan)) for worker in tried]
    while open_:
        left = []
        for worker, plans in open_:
            plan = next(plans, None)
            if plan is not None and _has_layers(plan, worker):
                return _placed(plan, worker, sum(encoder(worker.threads).values()))
            if plan is not None:
                left.append((worker, plans))
        open_ = left
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


def _plans(
    encoder: EncoderParts, holder: WorkerFacts, workers: Sequence[WorkerFacts], make_plan: MakePlan
) -> Iterator[Plan]:
    """Yields plans that leave the holder room for the encoder: the best one, then the best without its workers, until
    the holder has layers or the rest does not suffice."""
    room = _room(holder) - sum(encoder(holder.threads).values())
    if room < 0:
        return
    smaller = holder if holder.memory_bytes is None else replace(holder, memory_bytes=int(room))
    left = [smaller if worker.name == holder.name else worker for worker in workers]
    while True:
        try:
            plan = make_plan(left)
        except (InsufficientMemoryError, NetworkPartitionError):
            return
        yield plan
        used = {stage.worker for stage in plan.stages}
        left = [worker for worker in left if worker.name not in used]


def _has_layers(plan: Plan, worker: WorkerFacts) -> bool:
    return any(stage.worker == worker.name for stage in plan.stages)


def _placed(plan: Plan, holder: WorkerFacts, n_bytes: int) -> Plan:
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

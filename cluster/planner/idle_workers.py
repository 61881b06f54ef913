"""Why a plan has no layers for some workers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.devices import devices_of
from llamaclust.cluster.planner.memory import Sizes
from llamaclust.cluster.planner.plan import Spare
from llamaclust.core.sizes import MIB, mib


def spares(
    sizes: Sizes,
    workers: Sequence[WorkerFacts],
    used: Collection[str],
    *,
    by_hand: bool,
    contexts: int,
    apart: Pairs = frozenset(),
) -> tuple[Spare, ...]:
    """Those that are not used. `contexts`: how many whole contexts the plan was made to hold."""
    idle = [worker for worker in workers if worker.name not in used]
    if by_hand:
        return tuple(Spare(worker.name, "the plan gives it no layers") for worker in idle)
    return tuple(
        Spare(worker.name, _apart(worker.name, used, apart) or _reason(sizes, worker, len(used), contexts))
        for worker in idle
    )


def _apart(name: str, used: Collection[str], apart: Pairs) -> str | None:
    others = sorted(other for other in used if frozenset((name, other)) in apart)
    return f"it and {', '.join(others)} cannot reach each other" if others else None


def _reason(sizes: Sizes, worker: WorkerFacts, stages: int, contexts: int) -> str:
    layers = sizes.stages.layers
    open_to = range(layers) if stages > 1 else (0, layers - 1)  # beside one other worker, it is the first or the last
    least = min(sum(sizes.parts(worker, layer, layer + 1, contexts).values()) for layer in open_to)
    rooms = [device.memory_bytes for device in devices_of(worker)]
    room = max(least if one is None else one for one in rooms)
    if room < least:
        return f"too little memory: it has {room // MIB} MiB, a stage of one layer needs {mib(least)} MiB"
    if stages == layers:
        return f"the model has {layers} layers, one for each of the others"
    return "it would make the others slower"

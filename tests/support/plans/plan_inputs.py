"""Small planning inputs."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.links import Link
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import PlanRequest, StagePlace
from llamaclust.core.profile import DeviceProfile, StepTime, StepTimes
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import LayerCost, ModelCosts
from llamaclust.model.groups.costs import DividedLayer, EmbeddingCost, GatherCost, GroupCosts, PortionCost

LAYER = LayerCost(weight_bytes=10 * MIB, macs_per_token=20_000_000, kv_bytes_per_token=4096)


SMALL = ModelCosts(20 * MIB, 20 * MIB, 30_000_000, (LAYER,) * 12)


def split_by_hand(*entries: tuple[str, int, int]) -> tuple[Assignment, ...]:
    """Builds assignments from entries of (worker, start, end)."""
    return tuple(Assignment((worker,), start, end) for worker, start, end in entries)


def workspace(place: StagePlace) -> int:
    return (7 if place.is_last else 4) * MIB + place.threads * MIB


REQUEST = PlanRequest(context_length=1024, max_sequences=8, workspace=workspace)


def profile(
    read_gb_s: float = 20, int8_gmac_s: float = 300, concurrent: StepTimes = (), isolated: StepTimes = ()
) -> DeviceProfile:
    return DeviceProfile(read_gb_s * 1e9, int8_gmac_s * 1e9, concurrent, isolated)


def step_time(rows: int, stage_ms: float, layers_ms_per_gb: float, head_ms: float) -> StepTime:
    return StepTime(rows, stage_ms / 1e3, layers_ms_per_gb / 1e12, head_ms / 1e3)


def link(one_way_ms: float, ms_per_mb: float = 0.0) -> Link:
    return Link(one_way_ms / 1e3, ms_per_mb / 1e9)


def reach(one_way_ms: float, ms_per_mb: float = 0.0) -> Link:
    """Returns the latency and time per byte that a worker adds to each of its links."""
    return link(one_way_ms, ms_per_mb)


def worker(name: str, memory_mib: int | None = 10_000, read: float | None = 20, int8: float = 300) -> WorkerFacts:
    memory_bytes = None if memory_mib is None else memory_mib * MIB
    return WorkerFacts(name, memory_bytes, None if read is None else profile(read, int8))


def divided(layer: LayerCost, gathers: tuple[GatherCost, ...]) -> DividedLayer:
    """Divides all of a layer into 1200 units."""
    nothing = PortionCost(1, layer).of(0)
    return DividedLayer(nothing, (PortionCost(1200, layer),), gathers)


def group_costs(model: ModelCosts, members: int, gathers: int = 4, width: int = 9600) -> GroupCosts:
    """Builds costs of a model whose products are divided into 1200 units, with `gathers` float32 gathers per layer."""
    head = replace(LayerCost(model.head_bytes, model.head_macs, 0), weights=model.head_weights)
    return GroupCosts(
        members,
        model,
        tuple(divided(layer, (GatherCost(width, 1200),) * gathers) for layer in model.layers),
        divided(head, (GatherCost(4 * width, 1200, to_leader=True),)),
        EmbeddingCost(0, (GatherCost(width, 1, from_leader=True),)),
    )

"""Small planning inputs."""

from __future__ import annotations

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.planner import PlanRequest
from llamaclust.cluster.planner.workspace import StagePlace
from llamaclust.core.sizes import MIB
from llamaclust.model.loader import LayerCost, ModelCosts

LAYER = LayerCost(weight_bytes=10 * MIB, macs_per_token=20_000_000, kv_bytes_per_token=4096)


SMALL = ModelCosts(20 * MIB, 20 * MIB, 30_000_000, (LAYER,) * 12)


def workspace(place: StagePlace) -> int:
    return (7 if place.is_last else 4) * MIB + place.threads * MIB


ASK = PlanRequest(context_length=1024, max_sequences=8, workspace=workspace)


def worker(
    name: str, memory_mib: int | None = 10_000, read: float | None = 20, int8: float | None = 300
) -> WorkerFacts:
    return WorkerFacts(name, None if memory_mib is None else memory_mib * MIB, read, int8)

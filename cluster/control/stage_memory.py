"""What stages will take on a worker, asked of the worker's own code: nothing is loaded for it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from llamaclust.cluster.planner.costs import Counts, sums
from llamaclust.cluster.planner.memory import Rounding, StagePlace, Workspace
from llamaclust.core.limits import StageLimits
from llamaclust.model.loader import Model
from llamaclust.worker.devices.workspace import planned_workspace_bytes, weight_rounding_bytes


def workspace_of(model: Model, limits: StageLimits) -> Workspace:
    """Of stages that are loaded with these limits, whatever their context. A stage is taken to hold all layers: weights
    of several types may make it take a little more than it will."""

    @cache
    def bytes_at(place: StagePlace) -> int:
        end = model.layer_count if place.is_last else max(1, model.layer_count - 1)
        at = replace(limits, max_context_tokens=place.context_length)
        return planned_workspace_bytes(model, 0, end, at, place.threads, place.device)

    return bytes_at


def rounding_of(model: Model, *, experts: bool = True) -> Rounding:
    """Of stages of the model, with their experts or without: the first layer is there with the embedding, the last one
    with the head."""

    @cache
    def table(device: str) -> Counts:
        layers = range(model.layer_count)
        return sums(weight_rounding_bytes(model, layer, layer + 1, device, experts=experts) for layer in layers)

    return table

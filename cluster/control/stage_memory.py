"""Computes the memory that a stage will use on a worker. The worker uses the same functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from llamaclust.cluster.planner.costs import Counts, sums
from llamaclust.cluster.planner.memory import Rounding, StagePlace, Workspace
from llamaclust.cluster.planner.splits.encoder_place import EncoderParts
from llamaclust.core.limits import StageLimits
from llamaclust.model.groups.division import divide
from llamaclust.model.groups.portion import Portion
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from llamaclust.worker.devices.encoder_memory import encoder_bytes
from llamaclust.worker.devices.workspace import planned_program, program_workspace_bytes, weight_rounding_bytes


@dataclass(frozen=True, slots=True)
class _Known:
    workspaces: dict[StageLimits, dict[StagePlace, int]] = field(default_factory=dict)
    programs: dict[tuple[int, int, StageLimits, str, Portion | None], Program] = field(default_factory=dict)
    roundings: dict[tuple[str, bool], Counts] = field(default_factory=dict)
    encoders: dict[int, Mapping[str, int]] = field(default_factory=dict)  # Encoder memory by number of threads.


_known: MutableMapping[Model, _Known] = WeakKeyDictionary()


def workspace_of(model: Model, limits: StageLimits) -> Workspace:
    """Returns a function that computes a stage's workspace in bytes. If no layers are given, it returns the maximum."""
    known = _known.setdefault(model, _Known()).workspaces.setdefault(limits, {})
    programs = _known[model].programs

    def stage_program(start: int, end: int, limits: StageLimits, device: str, portion: Portion | None) -> Program:
        stage = start, end, limits, device
        if (*stage, portion) not in programs:
            if portion is None:
                programs[*stage, portion] = planned_program(model, *stage)
            else:
                whole = stage_program(*stage, None)
                programs[*stage, portion] = divide(whole, portion.shares, portion.member)
        return programs[*stage, portion]

    def stage_bytes(start: int, end: int, limits: StageLimits, place: StagePlace) -> int:
        program = stage_program(start, end, limits, place.device, place.portion)
        return program_workspace_bytes(model, program, limits, place.threads, place.device)

    def bytes_at(place: StagePlace) -> int:
        if place not in known:
            at = replace(limits, max_context_tokens=place.context_length)
            stages = _largest_stages(model, at, place) if place.layers is None else [(*place.layers, at)]
            known[place] = max(stage_bytes(*stage, place) for stage in stages)
        return known[place]

    return bytes_at


def _largest_stages(model: Model, limits: StageLimits, place: StagePlace) -> Iterator[tuple[int, int, StageLimits]]:
    """Yields (start, end, limits) for each stage that may need the largest workspace."""
    yield 0, model.layer_count if place.is_last else max(1, model.layer_count - 1), replace(limits, expert_shards=1)
    if limits.expert_shards > 1:
        for parts in _divided_stages(model, limits.expert_shards, place):
            yield *parts, limits


def _divided_stages(model: Model, shards: int, place: StagePlace) -> Iterator[tuple[int, int]]:
    """Yields (start, end), in layer parts, for stages that have divided layers and may need the largest workspace."""
    layers = [layer for layer in range(model.layer_count) if model.is_divisible(layer, shards)]
    half = shards // 2
    if not layers:
        return
    first, last = layers[0] * shards + half, layers[-1] * shards + half
    yield 0, last
    if first < last:
        yield first, last
    if place.is_last:
        yield first, model.layer_count * shards
    for layer in layers:
        start, end = layer * shards, (layer + 1) * shards
        yield start, start + half
        yield start + half, end
        if shards > 2:
            yield start + 1, end - 1


def rounding_of(model: Model, *, experts: bool = True) -> Rounding:
    """Returns a function that makes a table for a device. Entry [i, j] is the number of bytes that rounding adds to the
    weights of a stage with layers [i, j), including the embedding and the head if the stage has them."""
    known = _known.setdefault(model, _Known()).roundings

    def table(device: str) -> Counts:
        if (device, experts) not in known:
            layers = range(model.layer_count)
            bytes_of = (weight_rounding_bytes(model, layer, layer + 1, device, experts=experts) for layer in layers)
            known[device, experts] = sums(bytes_of)
        return known[device, experts]

    return table


def encoder_of(model: Model) -> EncoderParts | None:
    """Returns the image encoder's memory as a function of the number of threads. None if the model has no encoder."""
    projector = model.projector
    if projector is None:
        return None
    known = _known.setdefault(model, _Known()).encoders

    def parts(threads: int) -> Mapping[str, int]:
        if threads not in known:
            known[threads] = encoder_bytes(projector, threads).parts
        return known[threads]

    return parts

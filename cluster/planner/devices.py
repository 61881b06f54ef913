"""Divides a stage among the devices of its worker. The last layers go to GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from llamaclust.cluster.planner.costs import Counts, Flags, Table, WorkerFacts
from llamaclust.core.gpus import Placement


@dataclass(frozen=True, slots=True)
class PlannedLayers:
    """Layers [start, end) on one device of a worker."""

    device: WorkerFacts
    start: int
    end: int
    cpu_moe: tuple[int, ...] = ()  # Layers on a GPU whose experts are in RAM.
    # True if this entry is in RAM and holds only the experts of the layers in `cpu_moe`.
    is_experts: bool = False

    @property
    def place(self) -> tuple[str, str]:
        return self.device.name, self.device.device


@dataclass(frozen=True, slots=True, eq=False)
class MoeLayers:
    fixed: Flags  # Layers whose experts must be in RAM.
    open: Flags  # Layers whose experts are in RAM if that is faster or necessary.

    @classmethod
    def of(cls, placement: Placement, mixtures: Flags) -> MoeLayers:
        rules = [placement.experts_in_ram(layer) for layer in range(len(mixtures))]
        fixed, is_open = ([where is wanted for where in rules] for wanted in (True, None))
        return cls(mixtures & np.array(fixed, np.bool_), mixtures & np.array(is_open, np.bool_))


def devices_of(worker: WorkerFacts) -> tuple[WorkerFacts, ...]:
    if not worker.gpus:
        return (worker,)
    gpus = (
        replace(
            worker,
            name=f"{worker.name} {gpu.device}",
            device=gpu.device,
            memory_bytes=gpu.memory_bytes,
            profile=gpu.profile,
            gpus=(),
        )
        for gpu in worker.gpus
    )
    return (replace(worker, gpus=()), *gpus)


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """The layers of each possible stage on a worker's devices. Device i holds the layers [bounds[i], bounds[i + 1])."""

    devices: tuple[WorkerFacts, ...]
    bounds: tuple[Counts, ...]  # Tables by start and end of the stage.
    # Tables like `bounds`. Device i keeps experts in RAM for its layers in `moe.open` below moe_ends[i] >= bounds[i].
    moe_ends: tuple[Counts, ...]
    moe: MoeLayers

    def held(self, start: int, end: int) -> tuple[PlannedLayers, ...]:
        """Returns the layers of a stage on each device that has any. Entries for experts in RAM come last."""
        at = [int(table[start, end]) for table in self.bounds]
        ends = [int(table[start, end]) for table in self.moe_ends]
        parts = [
            PlannedLayers(device, begin, until, self._cpu_moe(begin, until, moe_end) if number else ())
            for number, (device, begin, until, moe_end) in enumerate(zip(self.devices, at, at[1:], ends, strict=False))
            if begin < until
        ]
        layers = (part.cpu_moe for part in parts if part.cpu_moe)
        return (
            *parts,
            *(PlannedLayers(self.devices[0], moved[0], moved[-1] + 1, moved, is_experts=True) for moved in layers),
        )

    def _cpu_moe(self, begin: int, until: int, moe_end: int) -> tuple[int, ...]:
        fixed, is_open = self.moe.fixed, self.moe.open
        return tuple(layer for layer in range(begin, until) if fixed[layer] or (is_open[layer] and layer < moe_end))

    def parts(self) -> Iterator[tuple[WorkerFacts, Counts, Counts, Counts]]:
        """Yields (device, start, end, moe_end) for each device. The last three are tables with one entry per stage."""
        yield from zip(self.devices, self.bounds, self.bounds[1:], self.moe_ends, strict=False)

    def moved_ranges(self) -> Iterator[tuple[WorkerFacts, Flags, Counts, Counts]]:
        """Yields (GPU, flags, start, end). Layers in [start, end) with a true flag have their experts in RAM. `start`
        and `end` are tables by stage."""
        for device, begin, until, moe_end in islice(self.parts(), 1, None):
            for layers, end in ((self.moe.fixed, until), (self.moe.open, moe_end)):
                if layers.any():
                    yield device, layers, begin, end

    def sums(self, table: Callable[[WorkerFacts], Table]) -> Table:
        total: Table = np.where(self.bounds[0] < self.bounds[-1], 0.0, np.inf)
        for device, begin, until, _ in self.parts():
            total += np.where(begin < until, table(device)[begin, until], 0.0)
        return total

    def moved(self, experts: Callable[[WorkerFacts, Flags], Table], exchange: Callable[[Flags], Table]) -> Table:
        """Returns the extra seconds of each stage if experts are in RAM. `experts(device, flags)` is the time of
        the flagged layers' experts on the device. `exchange(flags)` is the time to copy their inputs and outputs."""
        total: Table = np.zeros(self.bounds[0].shape)
        for device, layers, begin, end in self.moved_ranges():
            change = experts(self.devices[0], layers) + exchange(layers) - experts(device, layers)
            total += np.where(begin < end, change[begin, end], 0.0)
        return total

    def where(self, other: Division, is_other: Flags) -> Division:
        bounds = (np.where(is_other, *pair) for pair in zip(other.bounds, self.bounds, strict=True))
        ends = (np.where(is_other, *pair) for pair in zip(other.moe_ends, self.moe_ends, strict=True))
        return Division(self.devices, tuple(bounds), tuple(ends), self.moe)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceNeeds:
    """Memory that a device lacks for each possible stage, and memory that is freed if experts are in RAM."""

    # Missing bytes by start and end, if all experts except those in `MoeLayers.fixed` are on the device.
    excess: Table
    # experts[n]: bytes saved if open experts (those in `MoeLayers.open`) of the first n layers are in RAM.
    experts: Counts
    # held_experts[n]: bytes of the same experts. The saving can be 0 because of rounding, and these bytes cannot.
    held_experts: Counts

    def first_moe_end(self) -> Counts:
        starts = np.arange(len(self.experts))[:, np.newaxis]
        found: Counts = np.searchsorted(self.experts, self.excess + self.experts[:, np.newaxis])
        return np.maximum(found, starts)


def divide(
    worker: WorkerFacts,
    possible: Flags,
    needs: Callable[[WorkerFacts], DeviceNeeds],
    moe: MoeLayers,
    *,
    apart: bool = False,
) -> Division:
    """Divides the layers of each possible stage among the worker's devices. If `apart` is set, experts of layers in
    `moe.open` go to RAM, layer by layer, until the stage fits on the first GPU."""
    devices, borders = devices_of(worker), possible.diagonal()
    starts, ends = np.indices((len(borders), len(borders)))
    wanted = len(borders) if worker.gpu_layers is None else worker.gpu_layers
    least = np.minimum(_next_border(borders)[np.maximum(starts, ends - wanted)], ends)
    bounds: list[Counts] = [ends]
    moe_ends: list[Counts] = []
    for index in range(len(devices) - 1, 0, -1):
        need = needs(devices[index])
        moe_end = need.first_moe_end() if apart and index == 1 else starts
        moe_end = np.minimum(moe_end, ends)
        moe_end = np.where(need.held_experts[moe_end] > need.held_experts[starts], moe_end, starts)
        freed = need.experts[moe_end] - need.experts[starts]
        # If the user set `gpu_layers`, the first GPU takes the layers that do not fit on other GPUs.
        if index == 1 and worker.gpu_layers is not None:
            begin = np.minimum(least, bounds[-1])
        else:
            first = _first_that_fits((need.excess - freed <= 0) & (starts < ends) & borders[:, np.newaxis])
            begin = np.minimum(np.maximum(least, first[bounds[-1]]), bounds[-1])
        bounds.append(_allowed(worker, borders, index, begin))
        moe_ends.append(moe_end[bounds[-1], bounds[-2]])
    return Division(devices, (starts, *reversed(bounds)), (starts, *reversed(moe_ends)), moe)


def _allowed(worker: WorkerFacts, borders: Flags, index: int, begin: Counts) -> Counts:
    """Returns `begin`, the first layer on device `index` for each stage, moved to the nearest layer that the user's
    placement rules allow."""
    if not worker.placement.layers:
        return begin
    gpus, layers = [gpu.device for gpu in worker.gpus], len(borders) - 1
    devices = [worker.placement.devices_of(layer, gpus) for layer in range(layers)]
    before = [layer + 1 if devices[layer][-1] < index else 0 for layer in range(layers)]
    behind = [layer if devices[layer][0] >= index else layers for layer in range(layers)]
    ended = _next_border(borders)[np.maximum.accumulate([0, *before])][np.newaxis, :]
    begun = np.minimum.accumulate([layers, *reversed(behind)])[::-1]
    last_borders = np.maximum.accumulate(np.where(borders, np.arange(layers + 1), 0))
    starts, ends = np.indices(begin.shape)
    allowed: Counts = np.maximum(np.minimum(begin, last_borders[begun][:, np.newaxis]), ended)
    return np.where(starts < ends, np.clip(allowed, starts, ends), begin)


def _next_border(borders: Flags) -> Counts:
    places = np.where(borders, np.arange(len(borders)), len(borders) - 1)
    found: Counts = np.minimum.accumulate(places[::-1])[::-1]
    return found


def _first_that_fits(fits: Flags) -> Counts:
    ends = np.arange(len(fits))
    first: Counts = np.where(fits.any(axis=0), fits.argmax(axis=0), ends)
    return first

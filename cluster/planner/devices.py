"""Division of a stage among the devices of its worker: the last layers go to its GPUs, as many as fit there or as the
user set, the others to its processor. Of mixtures of experts, layers on a GPU may have their experts in RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.planner.costs import Counts, Table, WorkerFacts

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Held:
    """Layers [start, end) on a worker's device, which is here a worker of its own."""

    device: WorkerFacts
    start: int
    end: int
    cpu_moe_end: int = 0  # experts of layers before it are in RAM; 0: none
    is_experts: bool = False  # only these, of a GPU's layers

    @property
    def place(self) -> tuple[str, str]:
        """The worker's device, whose name has both."""
        return self.device.name, self.device.device


def devices_of(worker: WorkerFacts) -> tuple[WorkerFacts, ...]:
    """The worker's processor and its GPUs, in the order in which layers go to them."""
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
    """Of stages of all layers [start, end): device number i holds [bounds[i], bounds[i + 1]), without the experts of
    [bounds[i], moe_ends[i])."""

    devices: tuple[WorkerFacts, ...]
    bounds: tuple[Counts, ...]  # tables by start and end
    moe_ends: tuple[Counts, ...]  # likewise, bounds[i] at least

    def held(self, start: int, end: int) -> tuple[Held, ...]:
        """The devices that hold layers of a stage; experts in RAM last."""
        at = [int(table[start, end]) for table in self.bounds]
        ends = [int(table[start, end]) for table in self.moe_ends]
        parts = [
            Held(device, begin, until, moe_end if moe_end > begin else 0)
            for device, begin, until, moe_end in zip(self.devices, at, at[1:], ends, strict=False)
            if begin < until
        ]
        apart = [Held(self.devices[0], part.start, part.cpu_moe_end, is_experts=True) for part in parts]
        return (*parts, *(part for part in apart if part.end))

    def parts(self) -> Iterator[tuple[WorkerFacts, Counts, Counts, Counts]]:
        """(device, start, end, where its experts begin) of all stages."""
        yield from zip(self.devices, self.bounds, self.bounds[1:], self.moe_ends, strict=False)

    def sums(self, table: Callable[[WorkerFacts], Table]) -> Table:
        """What `table` has of each device for the layers that it holds, together; experts count where their layer
        is."""
        total: Table = np.where(self.bounds[0] < self.bounds[-1], 0.0, np.inf)
        for device, begin, until, _ in self.parts():
            total += np.where(begin < until, table(device)[begin, until], 0.0)
        return total

    def moved(self, experts: Callable[[WorkerFacts], Table], exchange: Table) -> Table:
        """What changes by experts that are in RAM: `experts` has their part of `table`, `exchange` what it takes to
        bring their inputs there."""
        total: Table = np.zeros_like(exchange)
        processor = experts(self.devices[0]) + exchange
        for device, begin, _, moe_end in self.parts():
            total += np.where(begin < moe_end, (processor - experts(device))[begin, moe_end], 0.0)
        return total

    def where(self, other: Division, is_other: Flags) -> Division:
        """With the other's bounds for those stages."""
        bounds = (np.where(is_other, *pair) for pair in zip(other.bounds, self.bounds, strict=True))
        ends = (np.where(is_other, *pair) for pair in zip(other.moe_ends, self.moe_ends, strict=True))
        return Division(self.devices, tuple(bounds), tuple(ends))


@dataclass(frozen=True, slots=True, eq=False)
class DeviceNeeds:
    """Bytes of stages on a device."""

    excess: Table  # needed beyond its memory with whole layers, by start and end
    experts: Counts  # needed less where the experts of the first n layers are in RAM, by n
    held_experts: Counts  # bytes of the experts of the first n layers, by n: rounding may make them free nothing

    def first_moe_end(self) -> Counts:
        """By start and end: the fewest layers from the start on whose experts have to be in RAM."""
        starts = np.arange(len(self.experts))[:, np.newaxis]
        found: Counts = np.searchsorted(self.experts, self.excess + self.experts[:, np.newaxis])
        return np.maximum(found, starts)


def divide(
    worker: WorkerFacts, possible: Flags, needs: Callable[[WorkerFacts], DeviceNeeds], cpu_moe: int | None = 0
) -> Division:
    """Of `possible` stages, into such. Experts of the first `cpu_moe` layers are in RAM; None: of as many layers as the
    first GPU has no room for. Where the user says how many layers the GPUs hold, the first GPU has to take what is left
    of these."""
    devices, borders = devices_of(worker), possible.diagonal()
    starts, ends = np.indices((len(borders), len(borders)))
    wanted = len(borders) if worker.gpu_layers is None else worker.gpu_layers
    least = np.minimum(_next_border(borders)[np.maximum(starts, ends - wanted)], ends)
    bounds: list[Counts] = [ends]
    moe_ends: list[Counts] = []
    for index in range(len(devices) - 1, 0, -1):
        need = needs(devices[index])
        is_open = cpu_moe is None and index == 1
        moe_end = need.first_moe_end() if is_open else np.clip(0 if cpu_moe is None else cpu_moe, starts, ends)
        moe_end = np.minimum(moe_end, ends)
        moe_end = np.where(need.held_experts[moe_end] > need.held_experts[starts], moe_end, starts)
        freed = need.experts[moe_end] - need.experts[starts]
        if index == 1 and worker.gpu_layers is not None:
            bounds.append(np.minimum(least, bounds[-1]))
        else:
            first = _first_that_fits((need.excess - freed <= 0) & (starts < ends) & borders[:, np.newaxis])
            bounds.append(np.minimum(np.maximum(least, first[bounds[-1]]), bounds[-1]))
        moe_ends.append(moe_end[bounds[-1], bounds[-2]])
    return Division(devices, (starts, *reversed(bounds)), (starts, *reversed(moe_ends)))


def _next_border(borders: Flags) -> Counts:
    """The first one from each layer on; the end of the model is one."""
    places = np.where(borders, np.arange(len(borders)), len(borders) - 1)
    found: Counts = np.minimum.accumulate(places[::-1])[::-1]
    return found


def _first_that_fits(fits: Flags) -> Counts:
    """By the end of a range of layers, where the longest one begins that fits; the end where none does."""
    ends = np.arange(len(fits))
    first: Counts = np.where(fits.any(axis=0), fits.argmax(axis=0), ends)
    return first

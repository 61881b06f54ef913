"""Division of a stage among the devices of its worker: the last layers go to its GPUs, as many as fit there or as the
user set, the others to its processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from llamaclust.cluster.planner.costs import Counts, Table, WorkerFacts

Held = tuple[WorkerFacts, int, int]
"""Layers [start, end) on a worker's device, which is here a worker of its own."""


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
    """Of stages of all layers [start, end): device number i holds [bounds[i], bounds[i + 1])."""

    devices: tuple[WorkerFacts, ...]
    bounds: tuple[Counts, ...]  # tables by start and end

    def held(self, start: int, end: int) -> tuple[Held, ...]:
        """The devices that hold layers of a stage."""
        at = [int(table[start, end]) for table in self.bounds]
        held = zip(self.devices, at, at[1:], strict=False)
        return tuple((device, begin, until) for device, begin, until in held if begin < until)

    def sums(self, table: Callable[[WorkerFacts], Table]) -> Table:
        """What `table` has of each device for the layers that it holds, together."""
        total: Table = np.where(self.bounds[0] < self.bounds[-1], 0.0, np.inf)
        for device, begin, until in zip(self.devices, self.bounds, self.bounds[1:], strict=False):
            total += np.where(begin < until, table(device)[begin, until], 0.0)
        return total


def divide(worker: WorkerFacts, layers: int, missing: Callable[[WorkerFacts], Table]) -> Division:
    """`missing`: the bytes that a device lacks for layers [start, end). Where the user says how many layers the GPUs
    hold, the first GPU has to take what is left of these."""
    devices = devices_of(worker)
    starts, ends = np.indices((layers + 1, layers + 1))
    wanted = layers if worker.gpu_layers is None else worker.gpu_layers
    least = np.maximum(starts, ends - wanted)
    bounds: list[Counts] = [ends]
    for index in range(len(devices) - 1, 0, -1):
        if index == 1 and worker.gpu_layers is not None:
            bounds.append(np.minimum(least, bounds[-1]))
        else:
            first = _first_that_fits(missing(devices[index]) == 0)
            bounds.append(np.minimum(np.maximum(least, first[bounds[-1]]), bounds[-1]))
    return Division(devices, (starts, *reversed(bounds)))


def _first_that_fits(fits: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> Counts:
    """By the end of a range of layers, where the longest one begins that fits; the end where none does."""
    ends = np.arange(len(fits))
    first: Counts = np.where(fits.any(axis=0), fits.argmax(axis=0), ends)
    return first

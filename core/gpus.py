"""GPUs of workers, as these tell of them and are told what to hold there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of a worker."""

    device: str  # "cuda:N"
    name: str  # as its driver calls it
    total_bytes: int
    free_bytes: int  # what the worker may still take of it, its cap considered
    uuid: str = ""  # the same for all workers that use it, whatever number it has there; "": not known


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """Layers [start, end) of a stage on one of its worker's devices."""

    device: str  # "cpu" | "cuda:N"
    start: int
    end: int


def placed(devices: Sequence[DeviceLayers]) -> str:
    """'16 of 32 layers on GPUs: [0, 16) cpu, [16, 32) cuda:0'."""
    counts = {one.device: one.end - one.start for one in devices}
    on_gpus = sum(count for device, count in counts.items() if device != "cpu")
    where = ", ".join(f"[{one.start}, {one.end}) {one.device}" for one in devices)
    return f"{on_gpus} of {sum(counts.values())} layers on GPUs: {where}"

"""GPUs of workers: facts, and which layers of a stage they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import MAX_LAYERS, DeviceName, Integer, Line, MemoryBytes
from llamaclust.core.errors import ProtocolError

CUDA = "cuda:"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of a worker."""

    device: DeviceName  # "cuda:N"
    name: Annotated[str, Line(255)]  # as its driver reports it
    total_bytes: MemoryBytes
    free_bytes: MemoryBytes  # what the worker may still take of it, its cap considered
    uuid: Annotated[str, Line(64)] = ""  # the same for all workers that use it; "": unknown


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """Layers [start, end) of a stage on one of its worker's devices."""

    device: DeviceName  # "cpu" | "cuda:N"
    start: int
    end: Annotated[int, Integer(1, MAX_LAYERS)]
    cpu_moe_end: int = 0  # of a GPU's layers, those before this one have their experts in RAM; 0: none

    def check(self) -> None:
        if self.start >= self.end:
            raise ProtocolError(f"{self.device} holds layers [{self.start}, {self.end})")
        if self.cpu_moe_end and not (self.start < self.cpu_moe_end <= self.end and self.device.startswith(CUDA)):
            what = f"{self.device} holds layers [{self.start}, {self.end}), experts of those before {self.cpu_moe_end}"
            raise ProtocolError(f"{what} are to be in RAM")

    @property
    def cpu_moe(self) -> range:
        """Layers whose experts are in RAM."""
        return range(self.start, max(self.start, self.cpu_moe_end))


def placed(devices: Sequence[DeviceLayers]) -> str:
    """'16 of 32 layers on GPUs: [0, 16) cpu, [16, 32) cuda:0, experts of [16, 20) cpu'."""
    counts = {part.device: part.end - part.start for part in devices}
    on_gpus = sum(count for device, count in counts.items() if device != "cpu")
    where = ", ".join(f"[{part.start}, {part.end}) {part.device}" for part in devices)
    apart = (f"[{part.start}, {part.cpu_moe_end})" for part in devices if part.cpu_moe)
    where += "".join(f", experts of {layers} cpu" for layers in apart)
    return f"{on_gpus} of {sum(counts.values())} layers on GPUs: {where}"


def gpu_names(device: str) -> Sequence[str]:
    """The GPUs of a device as settings name it: "cuda:0,cuda:1"."""
    return device.split(",") if device.startswith(CUDA) else ()

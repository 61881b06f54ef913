"""Workers' GPUs, the layers on each device of a stage, and the user's rules for placing layers on devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Annotated

from llamaclust.core.bounds import MAX_LAYERS, DeviceName, Integer, Line, MemoryBytes, Size
from llamaclust.core.errors import ProtocolError, UsageError

CUDA = "cuda:"

_UNIT_BYTES = 2 << 20
"""The unit in which GPU drivers allocate memory."""


@dataclass(frozen=True, slots=True)
class Gpu:
    device: DeviceName  # "cuda:N".
    name: Annotated[str, Line(255)]  # Name that the driver reports.
    total_bytes: MemoryBytes
    free_bytes: MemoryBytes  # Memory that the worker may still take, within its cap.
    uuid: Annotated[str, Line(64)] = ""  # Equal for all workers that use the GPU, or "" if unknown.


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """The layers [start, end) of a stage that are on one of the worker's devices."""

    device: DeviceName  # "cpu" or "cuda:N".
    start: int
    end: Annotated[int, Integer(1, MAX_LAYERS)]
    cpu_moe: Annotated[tuple[int, ...], Size(0, MAX_LAYERS)] = ()  # Layers on a GPU whose experts are in RAM.
    # Size of the GPU's cache for copies of these experts. Placements that differ only in this size are equal.
    experts_cache_bytes: MemoryBytes = field(default=0, compare=False)

    def check(self) -> None:
        if self.start >= self.end:
            raise ProtocolError(f"{self.device} holds layers [{self.start}, {self.end}), which is not a range")
        ascending = all(lower < upper for lower, upper in pairwise((self.start - 1, *self.cpu_moe, self.end)))
        if self.cpu_moe and not (ascending and self.device.startswith(CUDA)):
            what = f"{self.device} holds layers [{self.start}, {self.end})"
            raise ProtocolError(f"{what}, but its list of layers with experts in RAM is invalid: {self.cpu_moe[:8]}")


def ranges(layers: Sequence[int]) -> str:
    """Formats ascending layer numbers as half-open ranges, for example '[0, 4), [7, 8)'."""
    numbers = enumerate(layers)
    runs = (list(run) for _, run in groupby(numbers, lambda pair: pair[1] - pair[0]))
    return ", ".join(f"[{run[0][1]}, {run[-1][1] + 1})" for run in runs)


def cache_room(left_bytes: int, limit_bytes: int | None) -> int:
    """Returns the size of a GPU's expert cache: the smaller argument, rounded down to a multiple of 2 MiB."""
    most = left_bytes if limit_bytes is None else min(left_bytes, limit_bytes)
    return max(0, most // _UNIT_BYTES * _UNIT_BYTES)


def placed(devices: Sequence[DeviceLayers]) -> str:
    """Formats a placement like '16 of 32 layers on GPUs: [0, 16) cpu, [16, 32) cuda:0, experts of [16, 20) cpu'."""
    counts = {part.device: part.end - part.start for part in devices}
    on_gpus = sum(count for device, count in counts.items() if device != "cpu")
    where = ", ".join(f"[{part.start}, {part.end}) {part.device}" for part in devices)
    where += "".join(f", experts of {ranges(part.cpu_moe)} cpu" for part in devices if part.cpu_moe)
    return f"{on_gpus} of {sum(counts.values())} layers on GPUs: {where}"


UNUSED_BY_PARTS = "layers are divided by their experts, and parts of layers are computed on processors only"


def gpu_names(device: str) -> Sequence[str]:
    return device.split(",") if device.startswith(CUDA) else ()


RAM, ANY_GPU = "ram", "gpu"


@dataclass(frozen=True, slots=True)
class Placement:
    """The user's rules for placing layers on a worker with GPUs. Each tuple is empty or has one entry per layer."""

    layers: tuple[str | None, ...] = ()  # "ram", "gpu" (any GPU), "cuda:N", or None for no rule.
    experts: tuple[bool | None, ...] = ()  # True keeps a GPU layer's experts in RAM. None applies `cpu_moe`.
    cpu_moe: int | None = 0  # The first `cpu_moe` layers have their experts in RAM. None means no rule.

    def experts_in_ram(self, layer: int) -> bool | None:
        rule = self.experts[layer] if self.experts else None
        if rule is not None or self.cpu_moe is None:
            return rule
        return layer < self.cpu_moe

    def devices_of(self, layer: int, gpus: Sequence[str]) -> range:
        """Returns the indices of the devices on which a layer may be: 0 is RAM, and 1 is the first GPU."""
        rule = self.layers[layer] if self.layers else None
        # `check` reports a rule that names a missing GPU.
        if rule is None or self.missing(gpus, layer, layer + 1):
            return range(len(gpus) + 1)
        if rule in (RAM, ANY_GPU):
            return range(1) if rule == RAM else range(1, len(gpus) + 1)
        return range((at := gpus.index(rule) + 1), at + 1)

    def missing(self, gpus: Sequence[str], start: int, end: int) -> str | None:
        known = (None, RAM, ANY_GPU, *gpus)
        return next((rule for rule in self.layers[start:end] if rule not in known), None)

    def check(self, gpus: Sequence[str], start: int, end: int) -> None:
        """Raises UsageError if the rules break a stage's order: layers in RAM come first, then each GPU's layers."""
        if not gpus:
            return
        if (missing := self.missing(gpus, start, end)) is not None:
            what = f"there is no {missing} among {', '.join(gpus)}"
            raise UsageError(f"placement: {what}; name one of these, or `gpu` for any GPU")
        least, held_up, first_open = 0, start, None
        for layer in range(start, end):
            devices = self.devices_of(layer, gpus)
            if devices == range(1) and first_open is not None:
                what = f"layer {layer} in RAM comes after layer {first_open}, which may be on a GPU"
                raise UsageError(f"placement: {what}; {_ORDER}")
            if devices[-1] < least:
                what = f"layer {layer} on {gpus[devices[-1] - 1]} comes after layer {held_up} on {gpus[least - 1]}"
                raise UsageError(f"placement: {what}; {_ORDER}")
            if devices[0] > least:
                least, held_up = devices[0], layer
            if devices != range(1) and first_open is None:
                first_open = layer

    def check_obeyed(self, devices: Sequence[DeviceLayers]) -> None:
        """Raises UsageError if a layer is not on the device that the user's rule names."""
        for part in devices if self.layers else ():
            allowed = (None, RAM) if part.device == "cpu" else (None, ANY_GPU, part.device)
            for layer in range(part.start, part.end):
                if self.layers[layer] not in allowed:
                    what = f"layer {layer} cannot be on {self.layers[layer]} while others are on {part.device}"
                    raise UsageError(f"placement: {what}, as layers that share keys and values must be on one device")


NO_RULES = Placement()
_ORDER = "a worker's layers in RAM must come first, then those on each GPU in order; any experts may be in RAM"

"""Loads a whole model as one stage of this process. GPUs get the last layers, as many as fit or as the user wants."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import DeviceLayers, Placement, cache_room
from llamaclust.core.limits import StageLimits
from llamaclust.core.sizes import missing
from llamaclust.kernels.backend import Progress
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Moe
from llamaclust.worker.devices.device_memory import device_shares
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner

if TYPE_CHECKING:
    from llamaclust.worker.devices.devices import Device

_CPU = "cpu"


def load_whole(
    device: Device,
    model: Model,
    limits: StageLimits,
    parts: tuple[DeviceLayers, ...] = (),
    progress: Progress | None = None,
) -> StageRunner:
    """Loads all layers on the devices of `parts` (default: the CPU). Does not check memory. Samples on the CPU."""
    end = model.layer_count
    options = StageOptions(device.backend.feature_level, device.threads, parts, progress, device.backend)
    backend = device.backend_for(parts or (DeviceLayers(_CPU, 0, end),))
    return StageRunner(backend, model, 0, end, limits, options)


def held_layers(
    device: Device,
    model: Model,
    limits: StageLimits,
    placement: Placement | None = None,
    experts_cache: int | None = None,
) -> tuple[DeviceLayers, ...]:
    """Assigns layers to devices by the rules of `placement`. The last layers go to the last GPU. Experts are cached in
    up to `experts_cache` bytes of free GPU memory. Raises UsageError or InsufficientMemoryError."""
    placement, end = placement or Placement(cpu_moe=None), model.layer_count
    placement.check([gpu.device for gpu in device.gpus], 0, end)
    borders = model.costs(KvType(limits.kv_type)).borders
    choice = _Choice(device, model, limits, placement, _mixtures(model), borders)
    held = []
    for index in reversed(range(len(device.gpus))):
        part = choice.first_gpu(end) if index == 0 else choice.fitting(index, end)
        held.append(part)
        end = end if part is None else part.start
    parts = tuple(part for part in (DeviceLayers(_CPU, 0, end) if end else None, *reversed(held)) if part is not None)
    parts = tuple(_with_cache(device, model, limits, part, experts_cache) for part in parts)
    placement.check_obeyed(parts)
    for name, share in device_shares(device, model, parts, limits).items():
        free_bytes = device.free_bytes_of(name)
        if share.memory.total_bytes > free_bytes:
            which = "" if not device.gpus else f", {share.layers} on {name},"
            fewer = "fewer layers on GPUs (auto puts as many there as fit), or " if name != _CPU else ""
            what = f"{model.file.path}{which} needs {missing(share.memory.parts, free_bytes)}"
            raise InsufficientMemoryError(f"{what}; use {fewer}a smaller context_length")
    return parts


def _with_cache(
    device: Device, model: Model, limits: StageLimits, part: DeviceLayers, limit_bytes: int | None
) -> DeviceLayers:
    if not part.cpu_moe:
        return part
    share = device_shares(device, model, (part,), limits)[part.device]
    left_bytes = device.free_bytes_of(part.device) - share.memory.total_bytes
    return replace(part, experts_cache_bytes=cache_room(left_bytes, limit_bytes))


def _mixtures(model: Model) -> frozenset[int]:
    steps = model.program(0, model.layer_count).steps
    return frozenset(step.layer for step in steps if isinstance(step, Moe))


@dataclass(frozen=True, slots=True)
class _Choice:
    device: Device
    model: Model
    limits: StageLimits
    placement: Placement
    mixtures: frozenset[int]
    borders: Sequence[int]  # Numbers of the layers with which a device's range of layers may start.

    def first_gpu(self, end: int) -> DeviceLayers | None:
        """Assigns layers below `end` to the first GPU. Its memory holds the experts of as many layers as possible."""
        least, _ = self._starts(0, end)
        is_open = any(self.placement.experts_in_ram(layer) is None for layer in self.mixtures)
        if is_open and end > least:
            ends = range(least, end + 1)
            fewest = bisect_left(ends, True, key=lambda at: self._fits(self._part(0, least, end, at)))
            if fewest < len(ends):
                return self._part(0, least, end, ends[fewest])
        if self.device.gpu_layers is not None:
            return None if least == end else self._part(0, least, end, end)
        return self.fitting(0, end, open_end=end)

    def fitting(self, index: int, end: int, open_end: int = 0) -> DeviceLayers | None:
        least, most = self._starts(index, end)
        starts = [border for border in self.borders if least <= border < most]
        first = bisect_left(starts, True, key=lambda start: self._fits(self._part(index, start, end, open_end)))
        start = starts[first] if first < len(starts) else most
        return self._part(index, start, end, open_end) if start < end else None

    def _starts(self, index: int, end: int) -> tuple[int, int]:
        """Returns the lowest and the highest `start` of layers [start, end) on this GPU. The GPU may have no layers."""
        number, gpus = index + 1, [gpu.device for gpu in self.device.gpus]
        allowed = [self.placement.devices_of(layer, gpus) for layer in range(end)]
        ended = max((layer + 1 for layer, devices in enumerate(allowed) if devices[-1] < number), default=0)
        begun = min((layer for layer, devices in enumerate(allowed) if devices[0] >= number), default=end)
        last_begun = max(border for border in self.borders if border <= begun)
        first_ended = min(border for border in self.borders if border >= ended)
        wanted = self.model.layer_count if self.device.gpu_layers is None else self.device.gpu_layers
        least = min(border for border in self.borders if border >= self.model.layer_count - wanted)
        return max(min(least, last_begun), first_ended), max(last_begun, first_ended)

    def _part(self, index: int, start: int, end: int, open_end: int) -> DeviceLayers:
        """Returns layers [start, end) on a GPU. Below `open_end`, experts are in RAM unless a rule says otherwise."""
        rules = ((layer, self.placement.experts_in_ram(layer)) for layer in range(start, end) if layer in self.mixtures)
        cpu_moe = (layer for layer, in_ram in rules if in_ram or (in_ram is None and layer < open_end))
        return DeviceLayers(self.device.gpus[index].device, start, end, tuple(cpu_moe))

    def _fits(self, part: DeviceLayers) -> bool:
        share = device_shares(self.device, self.model, (part,), self.limits)[part.device]
        return share.memory.total_bytes <= self.device.free_bytes_of(part.device)

"""Where the layers of a whole model lie: the last ones on this machine's GPUs, as many as these have memory for or the
user wants there, the others on its processor; of mixtures of experts, experts of layers on a GPU may be in RAM. Of a
cluster's workers the plan says so."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.core.limits import StageLimits
from llamaclust.core.sizes import missing
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.worker.devices.device_memory import device_shares
from llamaclust.worker.devices.devices import Device

_CPU = "cpu"


def held_layers(
    device: Device, model: Model, limits: StageLimits, cpu_moe: int | None = None
) -> tuple[DeviceLayers, ...]:
    """Which device holds which layers. The last GPU is filled first; where the user says how many layers GPUs hold,
    the first one has to take what is left of these. Experts of the first `cpu_moe` layers are in RAM; None: of as many
    layers as the first GPU has no room for. InsufficientMemoryError where memory is short: it is taken as it is used,
    and would end the process while it answers."""
    end = model.layer_count
    borders = model.costs(KvType(limits.kv_type)).borders
    wanted = end if device.gpu_layers is None else device.gpu_layers
    least = next(border for border in borders if border >= end - wanted)
    choice = _Choice(device, model, limits, cpu_moe, borders)
    held = []
    for index in reversed(range(len(device.gpus))):
        name = device.gpus[index].device
        part = choice.first_gpu(name, least, end) if index == 0 else choice.fitting(name, least, end)
        held.append(part)
        end = end if part is None else part.start
    parts = tuple(part for part in (DeviceLayers(_CPU, 0, end) if end else None, *reversed(held)) if part is not None)
    for name, share in device_shares(device, model, parts, limits).items():
        free_bytes = device.free_bytes_of(name)
        if share.memory.total_bytes > free_bytes:
            which = "" if not device.gpus else f", {share.layers} on {name},"
            fewer = "fewer layers on GPUs (auto: as many as fit), or " if name != _CPU else ""
            what = f"{model.file.path}{which} needs {missing(share.memory.parts, free_bytes)}"
            raise InsufficientMemoryError(f"{what}; take {fewer}a smaller context_length")
    return parts


@dataclass(frozen=True, slots=True)
class _Choice:
    """Layers of a GPU, by its memory and what the user wants."""

    device: Device
    model: Model
    limits: StageLimits
    cpu_moe: int | None
    borders: Sequence[int]  # where layers may be divided

    def first_gpu(self, name: str, least: int, end: int) -> DeviceLayers | None:
        """Of the GPU behind the layers in RAM: all layers from `least`, with the experts of as few in RAM as fit. The
        products of attention come before experts, of which a token reads few."""
        is_mixture = self.model.hyperparameters.expert_count > 0
        if self.cpu_moe is None and end > least and is_mixture:
            ends = range(least, end + 1)
            fewest = bisect_left(ends, True, key=lambda at: self._fits(_part(name, least, end, at)))
            if fewest < len(ends):
                return _part(name, least, end, ends[fewest])
        if self.device.gpu_layers is not None:
            return None if least == end else _part(name, least, end, self._apart(end, whole=not is_mixture))
        return self.fitting(name, least, end, whole=not is_mixture)

    def fitting(self, name: str, least: int, end: int, *, whole: bool = True) -> DeviceLayers | None:
        """As many layers as fit; unless `whole`, with all experts in RAM where the user leaves that open."""
        apart, starts = self._apart(end, whole=whole), [border for border in self.borders if least <= border < end]
        first = bisect_left(starts, True, key=lambda start: self._fits(_part(name, start, end, apart)))
        return _part(name, starts[first], end, apart) if first < len(starts) else None

    def _apart(self, end: int, *, whole: bool) -> int:
        if self.cpu_moe is not None:
            return self.cpu_moe
        return 0 if whole else end

    def _fits(self, part: DeviceLayers) -> bool:
        share = device_shares(self.device, self.model, (part,), self.limits)[part.device]
        return share.memory.total_bytes <= self.device.free_bytes_of(part.device)


def _part(name: str, start: int, end: int, cpu_moe: int) -> DeviceLayers:
    return DeviceLayers(name, start, end, min(end, cpu_moe) if cpu_moe > start else 0)

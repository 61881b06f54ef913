"""Where the layers of a whole model lie: the last ones on this machine's GPUs, as many as these have memory for or the
user wants there, the others on its processor. Of a cluster's workers the plan says so."""

from __future__ import annotations

from bisect import bisect_left

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.core.limits import StageLimits
from llamaclust.core.sizes import missing
from llamaclust.model.loader import Model
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.stage.stage_runner import plan_memory

_CPU = "cpu"


def held_layers(device: Device, model: Model, limits: StageLimits) -> tuple[DeviceLayers, ...]:
    """Which device holds which layers. The last GPU is filled first; where the user says how many layers GPUs hold,
    the first one has to take what is left of these. InsufficientMemoryError where memory is short: it is taken as it
    is used, and would end the process while it answers."""
    end = model.layer_count
    least = 0 if device.gpu_layers is None else max(0, end - device.gpu_layers)
    held = []
    for index in reversed(range(len(device.gpus))):
        start = least
        if index > 0 or device.gpu_layers is None:
            name, until = device.gpus[index].device, end
            layers = range(least, until)
            start = least + bisect_left(
                layers, True, key=lambda at: not _shortage(device, DeviceLayers(name, at, until), model, limits)
            )
        held.append(DeviceLayers(device.gpus[index].device, start, end))
        end = start
    parts = tuple(part for part in (DeviceLayers(_CPU, 0, end), *reversed(held)) if part.start < part.end)
    for part in parts:
        if shortage := _shortage(device, part, model, limits):
            which = "" if not device.gpus else f", layers [{part.start}, {part.end}) on {part.device},"
            fewer = "fewer layers on GPUs (auto: as many as fit), or " if part.device != _CPU else ""
            what = f"{model.file.path}{which} needs {shortage}"
            raise InsufficientMemoryError(f"{what}; take {fewer}a smaller context_length")
    return parts


def _shortage(device: Device, held: DeviceLayers, model: Model, limits: StageLimits) -> str:
    """What these layers need and what is free; "" where they fit."""
    planned = plan_memory(device.backend_of(held.device), model, held.start, held.end, limits)
    free_bytes = device.free_bytes_of(held.device)
    return missing(planned.parts, free_bytes) if planned.total_bytes > free_bytes else ""

"""Where the layers of a whole model lie: the last ones on this machine's GPUs, as many as these have memory for or the
user wants there, the others on its processor. Of a cluster's workers the plan says so."""

from __future__ import annotations

from bisect import bisect_left

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.core.limits import StageLimits
from llamaclust.core.sizes import missing
from llamaclust.kernels.backend import Backend
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
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
                layers, True, key=lambda at: _lacking_bytes(device, DeviceLayers(name, at, until), model, limits) <= 0
            )
        held.append(DeviceLayers(device.gpus[index].device, start, end))
        end = start
    parts = tuple(one for one in (DeviceLayers(_CPU, 0, end), *reversed(held)) if one.start < one.end)
    for one in parts:
        _check(device, one, model, limits)
    return parts


def backend_of(device: Device, held: tuple[DeviceLayers, ...]) -> Backend:
    """What computes these layers: one device, or several in a chain."""
    parts = [BackendLayers(device.backend_of(one.device), one.start, one.end) for one in held]
    return parts[0].backend if len(parts) == 1 else MultiDeviceBackend(parts)


def _lacking_bytes(device: Device, held: DeviceLayers, model: Model, limits: StageLimits) -> int:
    planned = plan_memory(device.backend_of(held.device), model, held.start, held.end, limits)
    return planned.total_bytes - device.free_bytes_of(held.device)


def _check(device: Device, held: DeviceLayers, model: Model, limits: StageLimits) -> None:
    planned = plan_memory(device.backend_of(held.device), model, held.start, held.end, limits)
    free_bytes = device.free_bytes_of(held.device)
    if planned.total_bytes > free_bytes:
        which = "" if not device.gpus else f", layers [{held.start}, {held.end}) on {held.device},"
        fewer = "fewer layers on GPUs (auto: as many as fit), or " if held.device != _CPU else ""
        what = f"{model.file.path}{which} needs {missing(planned.parts, free_bytes)}"
        raise InsufficientMemoryError(f"{what}; take {fewer}a smaller context_length")

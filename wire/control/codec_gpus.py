"""GPUs of workers as protobuf messages: what there is, and which layers go there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from llamaclust.core.errors import ProtocolError
from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.proto import control_pb2 as proto
from llamaclust.wire.bounds import bounded, line, memory

MAX_GPUS = 16
_MAX_LAYERS = 1 << 16


def gpus_out(gpus: Iterable[Gpu]) -> list[proto.Gpu]:
    return [
        proto.Gpu(
            device=one.device,
            name=one.name,
            total_bytes=one.total_bytes,
            free_bytes=one.free_bytes,
            uuid=one.uuid,
        )
        for one in gpus
    ]


def gpus_in(gpus: Sequence[proto.Gpu]) -> tuple[Gpu, ...]:
    bounded("gpus", len(gpus), 0, MAX_GPUS)
    return tuple(
        Gpu(
            device=line("device", one.device, 64),
            name=line("name", one.name, 255),
            total_bytes=memory("total_bytes", one.total_bytes),
            free_bytes=memory("free_bytes", one.free_bytes),
            uuid=line("uuid", one.uuid, 64),
        )
        for one in gpus
    )


def layers_out(devices: Iterable[DeviceLayers]) -> list[proto.DeviceLayers]:
    return [proto.DeviceLayers(device=one.device, start=one.start, end=one.end) for one in devices]


def layers_in(devices: Sequence[proto.DeviceLayers], start: int, end: int) -> tuple[DeviceLayers, ...]:
    """Of a stage with layers [start, end), all of which they must hold."""
    bounded("devices", len(devices), 0, MAX_GPUS + 1)
    held = tuple(map(_layers_in, devices))
    gaps = any(one.end != two.start for one, two in pairwise(held))
    if held and (gaps or (held[0].start, held[-1].end) != (start, end)):
        ranges = ", ".join(f"[{one.start}, {one.end})" for one in held)
        raise ProtocolError(f"devices hold layers {ranges} of [{start}, {end})")
    return held


def _layers_in(one: proto.DeviceLayers) -> DeviceLayers:
    end = bounded("end", one.end, 1, _MAX_LAYERS)
    return DeviceLayers(line("device", one.device, 64), bounded("start", one.start, 0, end - 1), end)


def free_in(gpu_free_bytes: Sequence[int]) -> tuple[int, ...]:
    bounded("gpu_free_bytes", len(gpu_free_bytes), 0, MAX_GPUS)
    return tuple(memory("gpu_free_bytes", free) for free in gpu_free_bytes)

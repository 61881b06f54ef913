"""Computes the memory that a stage's layers need on each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, cast

from llamaclust.core.gpus import DeviceLayers, ranges
from llamaclust.core.limits import StageLimits, layer_span
from llamaclust.kernels.backend import ExpertsBackend
from llamaclust.kernels.split_experts import cached_lines, experts_of, without_experts
from llamaclust.model.groups.portion import Portion
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from llamaclust.worker.stage.stage_runner import StageMemory, model_program, nextn_memory, program_memory

if TYPE_CHECKING:
    from llamaclust.worker.devices.devices import Device

_CPU = "cpu"


@dataclass(frozen=True, slots=True)
class DeviceShare:
    layers: str  # Text for messages, for example "layers 0-15".
    memory: StageMemory


def device_shares(
    device: Device, model: Model, held: Sequence[DeviceLayers], limits: StageLimits, portion: Portion | None = None
) -> dict[str, DeviceShare]:
    """Returns the memory that the layers in `held` need, by device name. Experts in RAM count only for the CPU."""
    found: dict[str, list[DeviceShare]] = {}
    for part in held:
        backend, layers = (
            device.backend_of(part.device),
            f"layers {layer_span(part.start, part.end, limits.expert_shards)}",
        )
        program = model_program(model, part.start, part.end, limits, portion)
        rest, experts = without_experts(program, part.cpu_moe), experts_of(program, part.cpu_moe)
        share = DeviceShare(layers, program_memory(backend, model, rest, limits))
        found.setdefault(part.device, []).append(share)
        if experts is not None:
            layers = f"experts of layers {ranges(part.cpu_moe)}"
            lines = cached_lines(experts, limits) if part.experts_cache_bytes else 0
            memory = _experts_memory(device, model, experts, limits, lines)
            found.setdefault(_CPU, []).append(DeviceShare(layers, memory))
        if limits.nextn and program.is_last:
            memory = nextn_memory(device.backend, model, program, limits)
            found.setdefault(_CPU, []).append(DeviceShare("the MTP head", memory))
    return {name: _together(shares) for name, shares in found.items()}


def _experts_memory(device: Device, model: Model, experts: Program, limits: StageLimits, lines: int) -> StageMemory:
    tensors, backend = model.tensors_for(experts), cast(ExpertsBackend, device.backend)
    weight_bytes = sum(tensor.resident_bytes for tensor in tensors.values())
    workspace_bytes = backend.experts_workspace_bytes(experts, tensors, limits, lines)
    return StageMemory(weight_bytes, 0, workspace_bytes, backend.held_bytes(experts, tensors))


def _together(shares: Sequence[DeviceShare]) -> DeviceShare:
    memories = zip(*(astuple(share.memory) for share in shares), strict=True)
    return DeviceShare(" and ".join(share.layers for share in shares), StageMemory(*map(sum, memories)))

"""Computes the memory of a stage without loading it. This machine does not need the stage's device."""

from __future__ import annotations

from llamaclust.core.gpus import gpu_names
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.distinct_layers import distinct_layers
from llamaclust.kernels.split_experts import without_experts
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from llamaclust.worker.stage.nextn import nextn_limits, nextn_program_of
from llamaclust.worker.stage.stage_runner import model_program


def planned_workspace_bytes(
    model: Model, start: int, end: int, limits: StageLimits, threads: int, device: str = "cpu"
) -> int:
    program = planned_program(model, start, end, limits, device)
    return program_workspace_bytes(model, program, limits, threads, device)


def planned_program(model: Model, start: int, end: int, limits: StageLimits, device: str = "cpu") -> Program:
    """Returns a program that needs the same workspace as layers [start, end), but may have fewer layers."""
    program = model_program(model, start, end, limits)
    if gpu_names(device):
        return program  # On GPUs, workspace contains the rounding of each layer's KV memory.
    return distinct_layers(program, model.tensors_for(program))


def program_workspace_bytes(model: Model, program: Program, limits: StageLimits, threads: int, device: str) -> int:
    from llamaclust.kernels.cpu.backend import workspace_bytes

    head_bytes = 0
    if limits.nextn and program.is_last:
        head = nextn_program_of(model, limits)
        head_bytes = workspace_bytes(head, model.tensors_for(head), nextn_limits(limits), threads)
    tensors = model.tensors_for(program)
    if gpu_names(device):
        from llamaclust.kernels.cuda import backend as cuda

        return cuda.most_workspace_bytes(program, tensors, limits) + head_bytes
    return workspace_bytes(program, tensors, limits, threads) + head_bytes


def weight_rounding_bytes(model: Model, start: int, end: int, device: str, *, experts: bool = True) -> int:
    if not gpu_names(device):
        return 0
    from llamaclust.kernels.cuda.backend import rounded_weight_bytes

    program = model.program(start, end)
    if not experts:
        program = without_experts(program, range(start, end))
    return rounded_weight_bytes(program, model.tensors_for(program))

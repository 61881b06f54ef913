"""What workers measure of themselves, as they tell it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageProfile:
    """What a step takes: stage_s + layers_byte_s * bytes of its layers' weights + head_s on the last stage."""

    rows: int
    stage_s: float
    layers_byte_s: float
    head_s: float


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """What kernels reach on a GPU, and what steps of the model take there."""

    read_bytes_s: float
    int8_macs_s: float
    trials: tuple[StageProfile, ...] = ()  # as `WorkerProfile.trials`

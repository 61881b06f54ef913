"""Properties of a GPU that decide which kernels run and how many thread blocks they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from llamaclust.kernels.cuda.runtime.device import LEAST_SHARED_BYTES, MIN_COMPUTE_CAPABILITY, Device


@dataclass(frozen=True, slots=True)
class LaunchLimits:
    sms: int
    shared_bytes: int
    compute_capability: tuple[int, int]

    @classmethod
    def of(cls, device: Device) -> Self:
        return cls(device.sms, device.shared_bytes, device.compute_capability)


ANY_GPU = LaunchLimits(1, LEAST_SHARED_BYTES, MIN_COMPUTE_CAPABILITY)
"""Limits for the computation of buffer sizes, which are equal on all GPUs."""

"""What of a GPU decides which kernels run, and with how many blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from llamaclust.kernels.cuda.runtime.device import LEAST_SHARED_BYTES, MIN_COMPUTE_CAPABILITY, Device


@dataclass(frozen=True, slots=True)
class LaunchLimits:
    """Its multiprocessors, the shared memory that a block can have, and its age."""

    sms: int
    shared_bytes: int
    compute_capability: tuple[int, int]

    @classmethod
    def of(cls, device: Device) -> Self:
        return cls(device.sms, device.shared_bytes, device.compute_capability)


ANY_GPU = LaunchLimits(1, LEAST_SHARED_BYTES, MIN_COMPUTE_CAPABILITY)
"""For sizes of buffers, which are those of any GPU."""

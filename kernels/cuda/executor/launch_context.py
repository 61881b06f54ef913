"""The context of launches: a program, addresses of its weights, buffers and KV memory, and limits of the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda.executor.buffer_layout import BufferLayout
from llamaclust.kernels.cuda.executor.inputs import Addresses
from llamaclust.kernels.cuda.launches.attention import LaunchLimits
from llamaclust.model.program import Program

if TYPE_CHECKING:
    from llamaclust.kernels.cuda.weights.device_weights import DeviceWeight


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """Addresses are 0 while sizes are computed."""

    program: Program
    weights: Mapping[str, DeviceWeight]
    limits: StageLimits
    layout: BufferLayout
    inputs: Addresses
    kv: Mapping[int, np.uint64]  # by layer
    constants: set[bytes]  # uploaded before the first launch
    gpu: LaunchLimits

    def constant(self, numbers: NDArray[Any]) -> np.uint64:
        """Their address on the device."""
        data = numbers.tobytes()
        self.constants.add(data)
        return self.layout.at(constant_name(data), len(data))


def constant_name(data: bytes) -> object:
    """The name of its buffer."""
    return "constant", data

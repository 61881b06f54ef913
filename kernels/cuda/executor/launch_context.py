"""What launches refer to: a program, its weights, KV memory and buffers, and limits of the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda.launches.attention import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import Inputs
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.model.program import Program


@dataclass(slots=True)
class BufferLayout:
    """Named buffers in one allocation. Before `lay_out`, `at` records their sizes; afterwards it gives addresses."""

    n_bytes: int = 0
    base: int = 0
    _sizes: dict[object, int] = field(default_factory=dict)
    _offsets: dict[object, int] = field(default_factory=dict)

    def at(self, name: object, n_bytes: int) -> np.uint64:
        """The address of a buffer; 0 before `lay_out`."""
        if not self._offsets:
            self._sizes[name] = max(n_bytes, self._sizes.get(name, 0))
            return np.uint64(0)
        assert n_bytes <= self._sizes[name], (name, n_bytes, self._sizes[name])
        return np.uint64(self.base + self._offsets[name])

    def constant(self, numbers: NDArray[Any]) -> np.uint64:
        """The address of numbers that are uploaded before the first launch."""
        data = numbers.tobytes()
        return self.at(data, len(data))

    @property
    def constants(self) -> Iterator[tuple[int, bytes]]:
        """Their offsets and bytes."""
        return ((offset, name) for name, offset in self._offsets.items() if isinstance(name, bytes))

    def lay_out(self) -> None:
        """Assigns consecutive offsets."""
        for name, n_bytes in self._sizes.items():
            self._offsets[name] = self.n_bytes
            self.n_bytes = aligned(self.n_bytes + n_bytes)

    def offset(self, name: object) -> int:
        return self._offsets[name]


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """Addresses are 0 while sizes are computed."""

    program: Program
    weights: Mapping[str, Weights]
    limits: StageLimits
    layout: BufferLayout
    inputs: Inputs
    kv: Mapping[int, np.uint64]  # by layer
    gpu: LaunchLimits

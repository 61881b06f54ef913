"""Runs single kernels on arrays."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.cuda.runtime.device import Buffer, Device, Launch, Scalar

Size = int | tuple[int, ...]


class Bench:
    """A device and the arrays that are on it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._buffers: list[Buffer] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, what: BaseException | None, where: TracebackType | None
    ) -> None:
        for buffer in self._buffers:
            buffer.close()

    def room(self, n_bytes: int) -> Buffer:
        """Allocates uninitialized memory."""
        self._buffers.append(self.device.allocate(n_bytes))
        return self._buffers[-1]

    def put(self, values: NDArray[Any]) -> Buffer:
        buffer = self.room(values.nbytes)
        self.device.upload(buffer, 0, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        return buffer

    def get(self, buffer: Buffer, shape: Size, dtype: type[Any] = np.float32) -> NDArray[Any]:
        """Returns the values from the beginning of the buffer."""
        values: NDArray[Any] = np.empty(shape, dtype)
        self.device.copy_out(values.reshape(-1).view(np.uint8), buffer, 0)
        self.device.synchronize()
        return values

    def run(
        self, kernel: str, grid: Size, block: Size, *args: Buffer | Scalar | int | float, shared_bytes: int = 0
    ) -> None:
        """Launches a kernel; integers become int32 and floats float32."""
        given = tuple(_scalar(one) for one in args)
        self.device.launch(Launch(kernel, _three(grid), _three(block), given, shared_bytes))


def _scalar(value: Buffer | Scalar | int | float) -> Scalar:
    if isinstance(value, np.generic):
        return value
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value.at()


def _three(size: Size) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else size
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z

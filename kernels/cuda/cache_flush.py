"""A GPU's cache as it is between two tokens: other weights have been read meanwhile."""

from __future__ import annotations

import numpy as np

from llamaclust.kernels.cuda.probe import BLOCK, PIECE_BYTES
from llamaclust.kernels.cuda.runtime.device import Device, Launch

_MOST_BYTES = 256 << 20
"""More than the largest last-level cache of a GPU (126 MiB)."""
_LEAST_BYTES = 4 * PIECE_BYTES


class CacheFlush:
    """Holds memory to read: `flush` leaves nothing else in the cache. At most a quarter of what is free."""

    def __init__(self, device: Device) -> None:
        """InsufficientMemoryError where hardly anything is free."""
        self._device = device
        self._pieces = max(_LEAST_BYTES, min(_MOST_BYTES, device.free_bytes // 4)) // PIECE_BYTES
        self._memory = device.allocate(self._pieces * PIECE_BYTES)

    def flush(self) -> None:
        """Returns when it is done: after a millisecond, or less. What is read is nothing; it goes nowhere."""
        args = self._memory.at(), np.int32(self._pieces), self._memory.at()
        self._device.launch(Launch("limits.read", (8 * self._device.sms, 1, 1), (BLOCK, 1, 1), args))
        self._device.synchronize()

    def close(self) -> None:
        self._memory.close()

"""Flushes a GPU's cache before a measurement, as other weights do between two tokens."""

from __future__ import annotations

import numpy as np

from llamaclust.kernels.cuda.probe import BLOCK, PIECE_BYTES
from llamaclust.kernels.cuda.runtime.device import Device, Launch

_MOST_BYTES = 256 << 20
"""More than the largest last-level cache of a GPU (126 MiB)."""
_LEAST_BYTES = 4 * PIECE_BYTES


class CacheFlush:
    """Memory whose read replaces the content of the cache; at most a quarter of the free memory."""

    def __init__(self, device: Device) -> None:
        """InsufficientMemoryError if too little is free."""
        self._device = device
        self._pieces = max(_LEAST_BYTES, min(_MOST_BYTES, device.free_bytes // 4)) // PIECE_BYTES
        self._memory = device.allocate(self._pieces * PIECE_BYTES)

    def flush(self) -> None:
        """Returns after the read, at most about a millisecond."""
        args = self._memory.at(), np.int32(self._pieces), self._memory.at()
        self._device.launch(Launch("limits.read", (8 * self._device.sms, 1, 1), (BLOCK, 1, 1), args))
        self._device.synchronize()

    def close(self) -> None:
        self._memory.close()

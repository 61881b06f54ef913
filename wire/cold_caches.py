"""Caches as they are between two tokens of a cluster: other processes have read weights meanwhile."""

from __future__ import annotations

from time import sleep

import numpy as np

BYTES = 64 << 20
_REST_S = 0.0005
"""Whoever waits for work sleeps by then."""


class ColdCaches:
    """Holds memory to read: `sweep` leaves nothing else in the caches that this core can reach."""

    def __init__(self) -> None:
        self._memory = np.ones(BYTES // 8, np.uint64)

    def sweep(self) -> None:
        """Blocks for some milliseconds."""
        self._memory.max()
        sleep(_REST_S)

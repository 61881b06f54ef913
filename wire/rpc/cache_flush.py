"""Empties CPU caches before measurements, because a cluster's other processes use the caches between two tokens."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import sleep
from typing import ClassVar
from weakref import WeakValueDictionary

import numpy as np

BYTES = 64 << 20  # Larger than a core's own caches, and than all caches of most processors.
_MOST_BYTES = 1 << 30
_LEVELS = "/sys/devices/system/cpu/cpu0/cache"
_TURN_BYTES = 1 << 20
_REST_S = 0.0005  # Pause after which threads that spin for work are asleep.


def largest_cache_bytes(levels: Path = Path(_LEVELS)) -> int:
    """Returns the size of the largest CPU cache that Linux reports, limited to [BYTES, `_MOST_BYTES`]."""
    sizes = [BYTES]
    for size in levels.glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(int(size.read_text().strip().removesuffix("K")) << 10)
    return min(max(sizes), _MOST_BYTES)


class CacheFlush:
    """A large buffer. Reading the buffer evicts all other data from caches that are not larger than the buffer."""

    _shared: ClassVar[WeakValueDictionary[int, CacheFlush]] = WeakValueDictionary()
    _making: ClassVar[Lock] = Lock()

    @classmethod
    def shared(cls) -> CacheFlush:
        with cls._making:
            if (there := cls._shared.get(BYTES)) is None:
                there = cls._shared[BYTES] = cls()
            return there

    def __init__(self, n_bytes: int = BYTES) -> None:
        self._memory = np.ones(n_bytes // 8, np.uint64)

    def sweep(self) -> None:
        self._memory.max()
        sleep(_REST_S)

    async def sweep_async(self) -> None:
        for piece in np.array_split(self._memory, self._memory.nbytes // _TURN_BYTES):
            piece.max()
            await asyncio.sleep(0)
        await asyncio.sleep(_REST_S)

"""Every backend that runs on this machine, and the CPU backend at every feature level, by names for test ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llamaclust.kernels._native import available_levels
from llamaclust.kernels.backend import Backend
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend

all_threads = partial(CpuBackend, yields=False)
"""Makes a CPU backend that uses all its threads even on a busy machine."""

BACKENDS: dict[str, Callable[[], Backend]] = {"reference": ReferenceBackend}
for level in available_levels():
    BACKENDS[f"cpu-{level}"] = partial(all_threads, 2, level)
BACKENDS["cpu-1-thread"] = partial(all_threads, 1)
BACKENDS["cpu-3-threads"] = partial(all_threads, 3)

"""Every backend that runs on this machine, the CPU at every feature level, by a name for test ids."""

from __future__ import annotations

from collections.abc import Callable

from llamaclust.kernels.backend import Backend
from llamaclust.kernels.reference.backend import ReferenceBackend

BACKENDS: dict[str, Callable[[], Backend]] = {"reference": ReferenceBackend}

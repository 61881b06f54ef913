from __future__ import annotations

from collections.abc import Iterable

from llamaclust.cluster.front.text.image_rows import RowLimits
from llamaclust.model.loader import Model
from llamaclust.worker.devices.system_info import available_memory_bytes


def row_limits(taken_bytes: int = 0) -> RowLimits:
    """Returns the limits of rows of images on this machine, of whose free memory `taken_bytes` are reserved."""
    return RowLimits.of(max(0, available_memory_bytes() - taken_bytes))


def row_bytes(limits: RowLimits, models: Iterable[Model]) -> int:
    """Returns the most memory for rows of images of these models, which share it."""
    return limits.held_bytes if any(model.projector is not None for model in models) else 0

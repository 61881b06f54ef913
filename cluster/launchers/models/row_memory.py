from __future__ import annotations

from collections.abc import Iterable

from llamaclust.cluster.front.text.image_rows import RowLimits
from llamaclust.model.loader import Model
from llamaclust.worker.devices.system_info import available_memory_bytes


def row_limits(taken_bytes: int = 0) -> RowLimits:
    """Returns limits for image embeddings in this machine's RAM. `taken_bytes` of free RAM are left for other uses."""
    return RowLimits.of(max(0, available_memory_bytes() - taken_bytes))


def row_bytes(limits: RowLimits, models: Iterable[Model]) -> int:
    return limits.held_bytes if any(model.projector is not None for model in models) else 0

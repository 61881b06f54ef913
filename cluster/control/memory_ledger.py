"""The memory that the plans of each model take of workers' devices, so that each is planned beside the others."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from llamaclust.cluster.planner.plan import Plan

MemoryUse = Counter[tuple[str, str]]
"""Bytes by worker and device."""


class MemoryLedger:
    """Of one cluster. `lock` is held from the look at it to the entry of a plan."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._held: dict[str, MemoryUse] = {}  # by model id

    def enter(self, model_id: str, plans: Iterable[Plan]) -> None:
        """All that a model holds from now on, loaded or to be loaded; nothing without plans."""
        self._held[model_id] = sum(map(_memory_use, plans), MemoryUse())

    def beside(self, model_id: str) -> MemoryUse:
        """What the other models hold."""
        return sum((held for name, held in self._held.items() if name != model_id), MemoryUse())


def _memory_use(plan: Plan) -> MemoryUse:
    use = MemoryUse()
    for stage in plan.stages:
        for part in stage.devices:
            use[stage.worker, part.device] += part.bytes
        if not stage.devices:
            use[stage.worker, "cpu"] += stage.bytes
    return use

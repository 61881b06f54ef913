"""The memory that the plans of each model take of workers' devices, so that each is planned beside the others."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from llamaclust.cluster.planner.plan import Plan

MemoryUse = Counter[tuple[str, str]]
"""Bytes by worker and device."""


class MemoryLedger:
    """Of one cluster. `lock` is held while a plan is made, up to its entry if it is to be loaded next."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._held: dict[str, MemoryUse] = {}  # by model id
        self._beside: dict[str, MemoryUse] = {}  # likewise, what others held when it was planned last

    def enter(self, model_id: str, plans: Iterable[Plan]) -> None:
        """All that a model holds from now on, loaded or to be loaded; nothing without plans."""
        self._held[model_id] = _total(plans)

    def copy(self) -> MemoryLedger:
        """For plans that are not to be loaded."""
        scratch = MemoryLedger()
        scratch._held = dict(self._held)
        return scratch

    def planned(self, model_id: str) -> None:
        """A plan was made beside what the others hold now."""
        self._beside[model_id] = self.beside(model_id)

    def reserve(self, model_id: str, plans: Iterable[Plan]) -> bool:
        """Enters plans before they are loaded. False where other models have taken memory since the newest one was
        made: it may not fit beside them."""
        use, held = _total(plans), self._held.get(model_id, MemoryUse())
        fits = use <= held or self.beside(model_id) <= self._beside.get(model_id, MemoryUse())
        if fits:
            self._held[model_id] = use
        return fits

    def beside(self, model_id: str) -> MemoryUse:
        """What the other models hold."""
        return sum((held for name, held in self._held.items() if name != model_id), MemoryUse())


def _total(plans: Iterable[Plan]) -> MemoryUse:
    return sum(map(_memory_use, plans), MemoryUse())


def _memory_use(plan: Plan) -> MemoryUse:
    use = MemoryUse()
    for stage in plan.stages:
        for part in stage.devices:
            use[stage.worker, part.device] += part.bytes
        if not stage.devices:
            use[stage.worker, "cpu"] += stage.bytes
    return use

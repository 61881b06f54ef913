"""Records how much of the workers' memory each model's plans use. A new plan can only use the rest."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import Plan, StagePlan
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.limits import StageLimits
from llamaclust.wire.control.messages import Load

MemoryUse = Counter[tuple[str, str]]
"""Bytes of memory by (worker, device)."""


class ModelLimitError(InsufficientMemoryError):
    """A model cannot be planned because the number of other loaded models has reached `max_loaded_models`."""

    def __init__(self, most: int) -> None:
        loaded = "1 model is" if most == 1 else f"{most} models are"
        super().__init__(f"at most {loaded} loaded at a time (max_loaded_models)")


class MemoryLedger:
    """The memory that the models' plans use. Callers hold `lock` while they plan or reserve memory."""

    def __init__(self, max_models: int | None = None) -> None:
        self.lock = asyncio.Lock()
        self._max_models = max_models
        self._plans: dict[str, tuple[Plan, ...]] = {}  # Plans by model id.
        # Memory of other models when the newest plan of a model was made, by model id.
        self._beside: dict[str, MemoryUse] = {}

    def enter(self, model_id: str, plans: Iterable[Plan]) -> None:
        """Records a model's plans that are loaded or will be loaded next. Without plans, the model uses no memory."""
        self._plans[model_id] = tuple(plans)

    def holds(self, model_id: str) -> bool:
        return bool(self._plans.get(model_id))

    def copy(self) -> MemoryLedger:
        scratch = MemoryLedger()
        scratch._plans = dict(self._plans)
        return scratch

    def check_count(self, model_id: str) -> None:
        count = sum(bool(plans) for name, plans in self._plans.items() if name != model_id)
        if self._max_models is not None and count >= self._max_models:
            raise ModelLimitError(self._max_models)

    def planned(self, model_id: str) -> None:
        """Records how much memory other models use when this model is planned. `reserve` checks this value."""
        self._beside[model_id] = self.beside(model_id)

    def reserve(self, model_id: str, plans: tuple[Plan, ...]) -> bool:
        """Records plans before a load. Returns False if other models have taken memory since the model was planned."""
        is_entered = _total(plans) <= _total(self._plans.get(model_id, ()))
        fits = is_entered or self.beside(model_id) <= self._beside.get(model_id, MemoryUse())
        if fits:
            self.enter(model_id, plans)
        return fits

    def beside(self, model_id: str) -> MemoryUse:
        return _total(plan for name, plans in self._plans.items() if name != model_id for plan in plans)

    def loaded(self, worker: WorkerHandle) -> dict[str, int]:
        """Returns the number of bytes planned for the loaded stages of a worker, by device."""
        held = [order for order, _ in worker.stages.values()]
        orders = {
            (o.model_id, _way(o.limits), o.start, o.end, o.devices, _portion(o), o.encoder is not None) for o in held
        }
        use = MemoryUse()
        for model_id, plans in self._plans.items():
            for plan in plans:
                for stage in (stage for stage in plan.stages if stage.worker == worker.name):
                    layers = (stage.start, stage.end, stage.device_layers, (stage.shares, stage.member))
                    if (model_id, _way(plan), *layers, stage.encoder_bytes > 0) in orders:
                        use += _stage_use(stage)
        return {device: n_bytes for (_, device), n_bytes in use.items()}


def _way(held: StageLimits | Plan) -> tuple[int, bool]:
    return held.expert_shards, held.wide_tiles


def _portion(order: Load) -> tuple[tuple[int, ...], int]:
    return ((), 0) if order.group is None else (order.group.shares, order.group.member)


def _total(plans: Iterable[Plan]) -> MemoryUse:
    return sum(map(_memory_use, plans), MemoryUse())


def _memory_use(plan: Plan) -> MemoryUse:
    return sum(map(_stage_use, plan.stages), MemoryUse())


def _stage_use(stage: StagePlan) -> MemoryUse:
    use = MemoryUse()
    for part in stage.devices:
        use[stage.worker, part.device] += part.bytes
    if stage.devices:
        use[stage.worker, "cpu"] += stage.encoder_bytes
    else:
        use[stage.worker, "cpu"] += stage.bytes
    return use

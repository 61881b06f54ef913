"""Loads a cluster's draft model. All models with the draft model's vocabulary share it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import CONTEXT_TOKENS, speculation_settings, unused_mtp
from llamaclust.cluster.launchers.models.draft_model import (
    DraftModelPlan,
    SharedDraftModel,
    loaded_draft_model,
    of_draft_model,
    plan_draft_model,
)
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.sizes import mib
from llamaclust.model.loader import Model

Models = Sequence[tuple[ClusterConfig, Model]]
_SMALL = 2
"""Minimum ratio of a model's size to its draft model's size. A larger draft model would hardly make answers faster."""


@dataclass(frozen=True, slots=True)
class DraftModelMemory:
    name: str  # Name of the draft model's file.
    bytes: int
    models: tuple[str, ...]
    others: tuple[str, ...]  # Names of models with other vocabularies, which cannot use the draft model.
    remarks: tuple[str, ...]  # Remarks on settings that have only a part of their effect, or that are hardly useful.

    @property
    def text(self) -> str:
        text = f"draft model {self.name}: {mib(self.bytes)} MiB of this machine"
        if len(self.models) + len(self.others) > 1:
            text += f", for {', '.join(self.models)}"
        return text + (f" (not for {', '.join(self.others)}: another vocabulary)" if self.others else "")


def draft_model_memory(models: Models) -> DraftModelMemory | None:
    """Returns the draft model's memory, or None if there is none. Raises the errors of `plan_draft_model`."""
    plan = _planned(models)
    return None if plan is None else _memory(plan, models)


@dataclass(frozen=True, slots=True)
class Drafting:
    settings: Sequence[SpeculationSettings | None]  # Settings of each model.
    unused_bytes: int = 0  # Bytes of this machine's memory that the draft model has allocated but not written yet.


async def drafting(stack: AsyncExitStack, models: Models, report: Report) -> Drafting:
    """Loads the draft model. `stack` closes it. Raises the errors of `plan_draft_model` and `open_draft_model`."""
    for line in filter(None, (unused_mtp(*of) for of in models)):
        report(Notice(line))
    plan = await asyncio.to_thread(_planned, models)
    if plan is None:
        return Drafting([speculation_settings(config, None) for config, _ in models])
    loaded = await stack.enter_async_context(loaded_draft_model(plan))
    memory = _memory(plan, models)
    for remark in memory.remarks:
        report(Notice(remark))
    report(Notice(f"{memory.text}, {loaded.times.draft_ns(1, 1, 1) / 1e6:.1f} ms a token"))
    shares = {index: SharedDraftModel(loaded, index, len(models)) for index in plan.targets}
    settings = [speculation_settings(config, shares.get(index)) for index, (config, _) in enumerate(models)]
    return Drafting(settings, loaded.kv_bytes)


def _remarks(plan: DraftModelPlan, models: Models) -> Iterator[str]:
    own = models[0][0].speculative
    wanted = None if own is None else own.threads
    if wanted is not None and wanted > plan.device.threads:
        yield f"draft model: {plan.device.threads} threads instead of {wanted}: this process can use no more cores"
    target = max((models[at][1] for at in plan.targets), key=_bytes)
    if _bytes(plan.model) * _SMALL > _bytes(target):
        why = f"{mib(_bytes(plan.model))} MiB, and the model has {mib(_bytes(target))} MiB, so drafts hardly save time"
        yield f"draft model {plan.path.name} is not small: {why}; use a smaller model of the same family"


def _bytes(model: Model) -> int:
    return sum(tensor.n_bytes for tensor in model.file.tensors.values())


def _planned(models: Models) -> DraftModelPlan | None:
    own = models[0][0].speculative
    if own is None or own.model is None:
        return None
    context = max(config.context_length or CONTEXT_TOKENS for config, _ in models)
    with of_draft_model():
        path = resolve_model(own.model)
    return plan_draft_model(path, [model for _, model in models], own.threads, context)


def _memory(plan: DraftModelPlan, models: Models) -> DraftModelMemory:
    names = [config.model_name for config, _ in models]
    others = tuple(name for index, name in enumerate(names) if index not in plan.targets)
    drafted = tuple(names[index] for index in plan.targets)
    return DraftModelMemory(plan.path.name, plan.memory.total_bytes, drafted, others, tuple(_remarks(plan, models)))

"""Chooses the context lengths of several models, so that models that fit into memory together stay together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from llamaclust.cluster.control.limits import context_bounds
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import LlamaclustError


def keep_contexts(planners: Sequence[ClusterPlanner], contexts: Mapping[str, int]) -> None:
    """Makes plans keep context lengths that an earlier coordinator chose, by model id."""
    for planner in planners:
        planner.kept_context = contexts.get(planner.model.model_id)


async def choose_contexts(planners: Sequence[ClusterPlanner], workers: Mapping[str, WorkerHandle]) -> None:
    """Chooses the context length of each model that has none. Models that fit into memory together with their shortest
    contexts still do so afterwards. Leaves the choice to the first plan of a model that does not fit."""
    together = MemoryLedger()
    if planners[0].config.max_loaded_models != 1:
        for planner in planners:
            least = context_bounds(planner.config, planner.model).least
            await _add(together, planner, workers, planner.kept_context or least)
    for planner in planners:
        if planner.kept_context is None:
            is_beside = together.holds(planner.model.model_id)
            plan = await _planned(planner, workers, together if is_beside else MemoryLedger(), None)
            if plan is not None and is_beside:
                together.enter(planner.model.model_id, (plan,))
            planner.kept_context = None if plan is None else plan.context_length


async def _add(
    together: MemoryLedger, planner: ClusterPlanner, workers: Mapping[str, WorkerHandle], context: int
) -> None:
    plan = await _planned(planner, workers, together, context)
    if plan is not None:
        together.enter(planner.model.model_id, (plan,))


async def _planned(
    planner: ClusterPlanner, workers: Mapping[str, WorkerHandle], beside: MemoryLedger, context: int | None
) -> Plan | None:
    before, planner.kept_context = planner.kept_context, context
    try:
        with suppress(LlamaclustError):  # The start of the model reports these errors.
            return await planner.plan(workers, beside=beside, needs_images=planner.config.mmproj is not None)
        return None
    finally:
        planner.kept_context = before

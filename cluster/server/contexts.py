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
    together, takes_turns = MemoryLedger(), planners[0].config.max_loaded_models == 1
    for planner in planners if not takes_turns else ():
        await _add(together, planner, workers, planner.kept_context or _least(planner))
    for planner in planners:
        if planner.kept_context is not None:
            continue
        if together.holds(planner.model.model_id):
            planner.kept_context = await _add(together, planner, workers, None)
        elif takes_turns or await _fits_only_alone(planner, planners, workers):
            planner.kept_context = await _add(MemoryLedger(), planner, workers, None)
        else:
            planner.kept_context = _least(planner)


def _least(planner: ClusterPlanner) -> int:
    return context_bounds(planner.config, planner.model).least


async def _fits_only_alone(
    planner: ClusterPlanner, planners: Sequence[ClusterPlanner], workers: Mapping[str, WorkerHandle]
) -> bool:
    for other in planners:
        beside = MemoryLedger()
        fit = [await _add(beside, each, workers, _least(each)) for each in (other, planner) if other is not planner]
        if fit and None not in fit:
            return False
    return True


async def _add(
    ledger: MemoryLedger, planner: ClusterPlanner, workers: Mapping[str, WorkerHandle], context: int | None
) -> int | None:
    """Adds the plan of a model to the ledger, and returns the plan's context length, or None if it does not fit."""
    plan = await _planned(planner, workers, ledger, context)
    if plan is None:
        return None
    ledger.enter(planner.model.model_id, (plan,))
    return plan.context_length


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

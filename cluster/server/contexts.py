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
    contexts, as many as may be loaded at once, still do so afterwards. Leaves the choice to the first plan of a model
    that does not fit."""
    limit = planners[0].config.max_loaded_models or len(planners)
    together: dict[ClusterPlanner, Plan] = {}
    alone: dict[ClusterPlanner, Plan] = {}  # Models that do not fit beside those in `together`.
    for planner in planners:
        beside = _largest(together, planner, limit - 1)
        if plan := await _planned(planner, workers, beside, _least(planner)):
            together[planner] = plan
        elif plan := await _planned(planner, workers, {}, _least(planner)):
            alone[planner] = plan
    for planner in planners:
        if planner.kept_context is not None:
            continue
        if planner in together:
            beside = _largest(together, planner, limit - 1)
            together[planner] = await _planned(planner, workers, beside) or together[planner]
            planner.kept_context = together[planner].context_length
        elif planner in alone:
            planner.kept_context = await _context_of_large(planner, workers, together | alone)


async def _context_of_large(
    planner: ClusterPlanner, workers: Mapping[str, WorkerHandle], plans: Mapping[ClusterPlanner, Plan]
) -> int:
    """Returns the context length of a model that does not fit beside all others: the shortest one if it fits beside the
    smallest, and otherwise the longest one, because the model is never loaded beside another."""
    least = plans[planner].context_length
    smallest = min((other for other in plans if other is not planner), key=lambda other: _bytes(plans[other]))
    if await _planned(planner, workers, {smallest: plans[smallest]}, least):
        return least
    longest = await _planned(planner, workers, {})
    return least if longest is None else longest.context_length


def _least(planner: ClusterPlanner) -> int:
    return planner.kept_context or context_bounds(planner.config, planner.model).least


def _bytes(plan: Plan) -> int:
    return sum(stage.bytes for stage in plan.stages)


def _largest(plans: Mapping[ClusterPlanner, Plan], but: ClusterPlanner, count: int) -> dict[ClusterPlanner, Plan]:
    others = sorted((planner for planner in plans if planner is not but), key=lambda each: -_bytes(plans[each]))
    return {planner: plans[planner] for planner in others[:count]}


async def _planned(
    planner: ClusterPlanner,
    workers: Mapping[str, WorkerHandle],
    beside: Mapping[ClusterPlanner, Plan],
    context: int | None = None,
) -> Plan | None:
    ledger, needs_images = MemoryLedger(), planner.config.mmproj is not None
    for other, plan in beside.items():
        ledger.enter(other.model.model_id, (plan,))
    with suppress(LlamaclustError):  # The start of the model reports these errors.
        return await planner.plan(workers, beside=ledger, needs_images=needs_images, context=context)
    return None

"""Layers move to other workers, while their pipeline serves, for a clear gain alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.control.cluster_state import ClusterState, Planning, PoolState, Serving, Waits
from llamaclust.cluster.control.observations import Tick
from llamaclust.cluster.control.reconcile import Action, LoadEpoch, Wait, reconcile
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from support.plans.plan_inputs import REQUEST, SMALL, worker

STAYS = Wait(None, is_settled=True)
PRESENT = {"a": 1, "b": 2, "c": 3}


def plan_of(*names: str) -> Plan:
    return make_plan(SMALL, [worker(name) for name in names], replace(REQUEST, objective="throughput"))


def action_for(plan: Plan, pool: PoolState | None = None) -> Action | None:
    """Of a cluster whose stages are on a and b."""
    pool = pool or PoolState(PRESENT)
    serving = Serving(plan_of("a", "b"), (("a", 1), ("b", 2)))
    planning = Planning(pool.inputs(0.0), plan)
    waits = Waits(recovery_s=120.0, start_s=600.0)
    return reconcile(ClusterState(waits, 3, Tick(0.0), loss=None, pool=pool, planning=planning, serving=serving))


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({}, False),
        ({"token_s": 0.96}, False),
        ({"token_s": 0.9}, True),
        ({"tokens_per_s": 1.04}, False),
        ({"tokens_per_s": 1.1}, True),
    ],
)
def test_equal_workers_are_measured_as_nearly_equal(change: dict[str, float], moves: bool) -> None:
    plan = plan_of("a", "c")
    changed: dict[str, Any] = {name: getattr(plan.prediction, name) * factor for name, factor in change.items()}
    assert plan.prediction is not None
    plan = replace(plan, prediction=replace(plan.prediction, **changed))
    assert action_for(plan) == (LoadEpoch(plan, is_exclusive=False) if moves else STAYS)


def test_more_room_other_stages_and_unknown_speeds_are_reasons_to_move() -> None:
    plan = plan_of("a", "c")
    for better in (replace(plan, kv_blocks=2 * plan.kv_blocks), replace(plan, prediction=None), plan_of("c")):
        assert action_for(better) == LoadEpoch(better, is_exclusive=False)


def test_layers_move_off_drained_disconnected_and_lost_workers() -> None:
    plan, whole = plan_of("a", "c"), PoolState(PRESENT)
    for pool in (
        replace(whole, drained=frozenset("b")),
        replace(whole, partitions=frozenset({frozenset("ab")})),
        replace(whole, present={**PRESENT, "b": 4}),
    ):
        assert action_for(plan, pool) == LoadEpoch(plan, is_exclusive=False)

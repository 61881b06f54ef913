"""Checks that layers of a serving pipeline move only for a clear gain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.control.cluster_state import ClusterState, Planning, PoolState, Waits
from llamaclust.cluster.control.observations import Planned, Tick
from llamaclust.cluster.control.reconcile import Action, LoadEpoch, Wait, reconcile
from llamaclust.cluster.control.serving import Serving
from llamaclust.cluster.control.state_changes import observe
from llamaclust.cluster.planner.costs import StageCosts
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.predict import predict_again
from support.plans.plan_inputs import REQUEST, SMALL, link, worker

STAYS = Wait(None, is_settled=True)
PRESENT = {"a": 1, "b": 2, "c": 3}
NEAR = Links({frozenset("ab"): link(0.3), frozenset("ac"): link(0.3)})
FAR = Links({frozenset("ab"): link(20.0), frozenset("ac"): link(0.3)})


def plan_of(*names: str, links: Links = UNKNOWN) -> Plan:
    return make_plan(SMALL, [worker(name) for name in names], replace(REQUEST, objective="throughput", links=links))


def serving_cluster(pool: PoolState) -> ClusterState:
    """Returns a cluster whose stages are on a and b."""
    serving = Serving(plan_of("a", "b"), (("a", 1), ("b", 2)))
    waits = Waits(recovery_s=120.0, start_s=600.0)
    return ClusterState(waits, 3, Tick(0.0), loss=None, pool=pool, serving=serving)


def action_for(plan: Plan, pool: PoolState | None = None) -> Action | None:
    pool = pool or PoolState(PRESENT)
    return reconcile(replace(serving_cluster(pool), planning=Planning(pool.inputs(0.0), plan)))


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


@pytest.mark.parametrize(("links", "moves"), [(NEAR, False), (FAR, True)])
def test_a_link_that_turns_out_to_be_slow_is_a_reason_to_move(links: Links, moves: bool) -> None:
    """The serving pipeline was planned before its link was measured."""
    state, plan = serving_cluster(PoolState(PRESENT)), plan_of("a", "c", links=links)
    assert state.serving is not None
    workers = {name: worker(name) for name in PRESENT}
    served = predict_again(StageCosts.of(SMALL), state.serving.plan, workers, REQUEST.max_sequences, links)
    action = reconcile(observe(state, Planned(state.inputs, plan, served=served)))
    assert action == (LoadEpoch(plan, is_exclusive=False) if moves else STAYS)

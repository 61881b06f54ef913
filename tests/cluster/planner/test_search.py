"""Compares plans with every possible plan, on clusters small enough to try all sets, orders and splits."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.format import plan_lines
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.splits import orders
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.profile import StepTimes
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import LayerCost, ModelCosts
from support.plans.plan_inputs import profile, reach, step_time
from support.plans.random_plans import GB, MODELS, REQUEST, SIMPLER, WORKERS, Every, large, named


def planned(costs: ModelCosts, workers: Sequence[WorkerFacts], objective: str) -> Plan | None:
    try:
        return make_plan(costs, workers, replace(REQUEST, objective=objective))
    except InsufficientMemoryError:
        return None


@settings(max_examples=120, deadline=None)
@given(
    costs=MODELS,
    workers=st.lists(WORKERS, min_size=1, max_size=4),
    objective=st.sampled_from(["latency", "throughput"]),
    draw=st.randoms(use_true_random=False),
)
def test_no_plan_is_clearly_better_in_whatever_order_workers_stand(
    costs: ModelCosts, workers: list[WorkerFacts], objective: str, draw: random.Random
) -> None:
    workers = named(workers)
    every = Every(costs, workers)
    scores = every.scores()
    for order in (workers, workers[::-1], draw.sample(workers, len(workers))):
        plan = planned(costs, order, objective)
        assert (plan is not None) == bool(scores)
        if plan is None:
            continue
        assert plan.optimality_gap is None
        best = min(score.of(objective) for score in every.scores_beside(plan))
        assert every.score_of(plan).of(objective) * SIMPLER <= best * 1.0001


@settings(max_examples=80, deadline=None)
@given(
    costs=MODELS,
    workers=st.lists(WORKERS, min_size=2, max_size=4),
    objective=st.sampled_from(["latency", "throughput"]),
)
def test_where_not_all_orders_are_tried_the_bound_holds(
    costs: ModelCosts, workers: list[WorkerFacts], objective: str
) -> None:
    workers = named(workers)
    every = Every(costs, workers)
    scores = every.scores()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "_MOST_STEPS", 0)
        plan = planned(costs, workers, objective)
    alike = len(set(costs.layers)) == 1
    assert plan is not None or not scores or not alike
    if plan is None or not scores or plan.optimality_gap is None:
        return
    found, best = every.score_of(plan).of(objective), min(score.of(objective) for score in scores)
    assert found / (1 + plan.optimality_gap) <= best * 1.0001
    if objective == "throughput":
        assert not alike or found * SIMPLER <= best * 1.02


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_the_best_of_more_workers_than_layers_are_taken(objective: str) -> None:
    facts = [("a", 1.0), ("b", 1.0), ("c", 100.0)]
    workers = [WorkerFacts(name, 6 * GB, profile(read, 20 * read)) for name, read in facts]
    for order in permutations(workers):
        plan = make_plan(large(2), order, replace(REQUEST, objective=objective))
        assert [stage.worker for stage in plan.stages] == ["c"]


def test_the_one_worker_with_room_for_the_head_is_the_last_wherever_it_stands() -> None:
    small = [WorkerFacts(f"w{index}", 1_900_000_000, profile(1, 20)) for index in range(9)]
    big = WorkerFacts("big", 2_500_000_000, profile(1.1, 20))
    for workers in ([*small, big], [big, *small], [*small[:4], big, *small[4:]]):
        for objective in ("latency", "throughput"):
            plan = make_plan(large(10), workers, replace(REQUEST, objective=objective))
            assert plan.stages[-1].worker == "big" and len(plan.stages) == 10


def test_both_ends_are_found_among_many_workers_that_are_all_different() -> None:
    """Two workers have room for more than layers: the first must have the embedding, the last the head."""
    shuffled = random.Random(3)
    inner = [WorkerFacts(f"w{index}", 1_200_000_000 + index, profile(1 + index / 100, 20)) for index in range(18)]
    ends = [WorkerFacts("first", 1_650_000_000, profile(1, 20)), WorkerFacts("last", 2_250_000_000, profile(1, 20))]
    for objective in ("latency", "throughput"):
        workers = [*inner, *ends]
        shuffled.shuffle(workers)
        plan = make_plan(large(20), workers, replace(REQUEST, objective=objective))
        assert (plan.stages[0].worker, plan.stages[-1].worker) == ("first", "last")


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_many_different_workers_are_planned_with_a_bound(objective: str) -> None:
    drawn = random.Random(7)
    workers = [
        WorkerFacts(
            f"w{index}", int(drawn.uniform(2, 6) * GB), profile(drawn.uniform(5, 100), drawn.uniform(100, 1000))
        )
        for index in range(64)
    ]
    begun = time.process_time()
    plan = make_plan(large(126), workers, replace(REQUEST, objective=objective))
    assert time.process_time() - begun < 60.0
    assert plan.optimality_gap is not None and plan.optimality_gap < (0.25 if objective == "latency" else 0.05)
    assert "of the best possible" in plan_lines(plan)[-1]
    assert not any("of the best possible" in line for line in plan_lines(make_plan(large(3), workers[:2], REQUEST)))


def step_times(drawn: random.Random) -> StepTimes:
    return tuple(
        step_time(rows, drawn.uniform(0.1, 0.5), drawn.uniform(10, 200) * slower, drawn.uniform(1, 10) * slower)
        for rows, slower in ((1, 1), (8, 2), (128, 20))
    )


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_64_workers_126_layers_and_their_2080_links_are_planned(objective: str) -> None:
    drawn = random.Random(7)
    names = [COORDINATOR, *(f"w{index}" for index in range(64))]
    reaches_of = {name: reach(drawn.uniform(0.05, 10), drawn.uniform(0.2, 80)) for name in names}
    known = {
        frozenset((one, two)): Link(
            reaches_of[one].one_way_s + reaches_of[two].one_way_s + drawn.uniform(0, 3e-4),
            reaches_of[one].byte_s + reaches_of[two].byte_s,
        )
        for one, two in combinations(names, 2)
    }
    memory = [int(drawn.uniform(2, 6) * GB) for _ in names[1:]]
    profiles = [profile(20, 300, step_times(drawn), step_times(drawn)) for _ in names[1:]]
    begun = time.process_time()
    links = Links(known)
    reaches = links.reaches(names[1:])
    workers = [
        WorkerFacts(name, memory_bytes, measured, 1, reaches[name])
        for name, memory_bytes, measured in zip(names[1:], memory, profiles, strict=True)
    ]
    model = replace(large(126), hidden_bytes=65_536)
    plan = make_plan(model, workers, replace(REQUEST, objective=objective, links=links))
    taken_s = time.process_time() - begun
    print(f"{objective}: {taken_s:.2f} s of one core")
    assert taken_s < 30, "0.5 to 0.8 s on a fast machine"
    assert plan.optimality_gap is not None and plan.optimality_gap < (0.25 if objective == "latency" else 0.05)


@pytest.mark.parametrize("seed", [15, 20, 21, 46])
def test_workers_that_hold_unlike_layers_only_in_some_orders_are_planned(seed: int) -> None:
    drawn = random.Random(seed)
    layers = tuple(LayerCost(drawn.choice((500, 565)) * MIB, 100_000_000, 0) for _ in range(32))
    shares = [drawn.uniform(0.7, 1.4) for _ in range(9)]
    unit = 1.13 * sum(layer.weight_bytes for layer in layers) / sum(shares)
    workers = [
        WorkerFacts(f"w{index}", int(unit * share), profile(1 + index / 100)) for index, share in enumerate(shares)
    ]
    drawn.shuffle(workers)
    for objective in ("latency", "throughput"):
        plan = planned(ModelCosts(1, 1, 1, layers), workers, objective)
        assert plan is not None and len(plan.stages) == 9

"""Compares plans for workers of which some cannot reach each other with every possible plan."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.links import Pairs, violated_pair
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.splits import orders
from llamaclust.core.errors import InsufficientMemoryError, NetworkPartitionError
from llamaclust.model.costs import ModelCosts
from support.plans.plan_inputs import profile, split_by_hand
from support.plans.random_plans import GB, MODELS, REQUEST, SIMPLER, WORKERS, Every, Split, large, named


def pairs(*names: str) -> Pairs:
    return frozenset(map(frozenset, names))


@dataclass(frozen=True)
class EveryApart(Every):
    """All plans in which no such pair is adjacent."""

    partitions: Pairs

    def _splits(self) -> Iterator[Split]:
        for split in super()._splits():
            if violated_pair([(worker.name,) for worker, _, _ in split], self.partitions) is None:
                yield split


def planned(
    costs: ModelCosts, workers: Sequence[WorkerFacts], partitions: Pairs, objective: str
) -> Plan | type[Exception]:
    try:
        return make_plan(costs, workers, replace(REQUEST, objective=objective, partitions=partitions))
    except (NetworkPartitionError, InsufficientMemoryError) as error:
        return type(error)


CASES = given(
    costs=MODELS,
    workers=st.lists(WORKERS, min_size=2, max_size=4).map(named),
    split=st.sets(st.sampled_from(range(6)), min_size=1, max_size=4),
    objective=st.sampled_from(["latency", "throughput"]),
)


def apart_of(workers: Sequence[WorkerFacts], split: set[int]) -> Pairs:
    every = list(combinations([worker.name for worker in workers], 2))
    return frozenset(frozenset(every[number % len(every)]) for number in split)


@settings(max_examples=100, deadline=None)
@CASES
def test_no_plan_that_keeps_pairs_apart_is_clearly_better(
    costs: ModelCosts, workers: list[WorkerFacts], split: set[int], objective: str
) -> None:
    partitions = apart_of(workers, split)
    every = EveryApart(costs, workers, partitions)
    plan = planned(costs, workers, partitions, objective)
    if not isinstance(plan, Plan):
        assert not every.scores()
        assert plan is (NetworkPartitionError if Every(costs, workers).scores() else InsufficientMemoryError)
        return
    assert violated_pair(plan.chain, partitions) is None
    best = min(score.of(objective) for score in every.scores_beside(plan))
    assert every.score_of(plan).of(objective) * SIMPLER <= best * 1.0001


@settings(max_examples=60, deadline=None)
@CASES
def test_where_not_all_orders_are_tried_pairs_are_kept_apart_too(
    costs: ModelCosts, workers: list[WorkerFacts], split: set[int], objective: str
) -> None:
    partitions = apart_of(workers, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "_MOST_STEPS", 0)
        plan = planned(costs, workers, partitions, objective)
    if isinstance(plan, Plan):
        assert violated_pair(plan.chain, partitions) is None


@pytest.mark.parametrize("most_steps", [1024, 0])
def test_workers_that_are_all_needed_stand_in_another_order(most_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_MOST_STEPS", most_steps)
    workers = [WorkerFacts(name, 3 * GB, profile(10, 200)) for name in "abcd"]
    plan = make_plan(large(6), workers, replace(REQUEST, partitions=pairs("ab")))
    ring = [stage.worker for stage in plan.stages]
    assert sorted(ring) == list("abcd") and violated_pair(plan.chain, pairs("ab")) is None


def test_a_worker_apart_is_a_spare_and_the_reason_is_said() -> None:
    workers = [WorkerFacts(name, 9 * GB, profile(10, 200)) for name in "abc"]
    plan = make_plan(large(6), workers, replace(REQUEST, objective="throughput", partitions=pairs("ab")))
    assert [stage.worker for stage in plan.stages] == ["a", "c"]
    assert [(idle.worker, idle.reason) for idle in plan.idle_workers] == [("b", "it and a cannot reach each other")]


def test_a_plan_by_hand_with_the_pair_is_refused() -> None:
    workers = [WorkerFacts(name, 9 * GB, profile(10, 200)) for name in "abc"]
    by_hand = split_by_hand(("a", 0, 2), ("b", 2, 4), ("c", 4, 6))
    for pair in ("ab", "bc", "ac"):  # tokens go from the last stage to the first
        with pytest.raises(NetworkPartitionError, match=f"workers {pair[0]} and {pair[1]} cannot reach each other"):
            make_plan(large(6), workers, replace(REQUEST, manual=by_hand, partitions=pairs(pair)))


def test_many_workers_are_planned_apart_without_trying_every_order() -> None:
    drawn = random.Random(11)
    workers = named(
        [
            WorkerFacts("", int(drawn.uniform(2, 6) * GB), profile(drawn.uniform(5, 100), drawn.uniform(100, 1000)))
            for _ in range(64)
        ]
    )
    partitions = pairs_of_numbers([(0, 1), (2, 3), (40, 41), (0, 63)])
    begun = time.process_time()
    plan = make_plan(large(126), workers, replace(REQUEST, objective="throughput", partitions=partitions))
    assert time.process_time() - begun < 60.0
    assert violated_pair(plan.chain, partitions) is None
    free = make_plan(large(126), workers, replace(REQUEST, objective="throughput"))
    assert plan.optimality_gap is not None and plan.optimality_gap < 0.1 and len(free.stages) - len(plan.stages) < 5


def pairs_of_numbers(numbers: Sequence[tuple[int, int]]) -> Pairs:
    return frozenset(frozenset(f"w{number}" for number in pair) for pair in numbers)

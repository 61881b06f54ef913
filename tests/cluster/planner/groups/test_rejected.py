"""Checks that automatic plans of stages say how fast a group would be, or why none is possible."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.planner.costs import GpuFacts, WorkerFacts
from llamaclust.cluster.planner.format import choice_lines, plan_json, plan_lines
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.sizes import MIB
from support.plans.group_inputs import LARGE, able, network, planned
from support.plans.plan_inputs import profile

LAYERS = len(LARGE.layers)


def line_of(plan: Plan, begin: str) -> str:
    (line,) = (line for line in plan_lines(plan) if line.startswith(f"  {begin}"))
    return line


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("speeds", [(20, 20), (40, 20, 20), (20, 30, 40, 50), (20, 25, 30, 35, 40)])
def test_a_plan_of_stages_tells_what_a_group_would_bring(objective: str, speeds: tuple[int, ...]) -> None:
    workers = [able(name, speed) for name, speed in zip("abcde", speeds, strict=False)]
    links = network([each.name for each in workers], 400, byte_s=20e-9)
    plan = planned(workers, links=links, objective=objective)
    rejected, prediction = plan.rejected_group, plan.prediction
    assert rejected is not None and prediction is not None and plan.no_group == ""
    by_hand = planned(workers, links=links, manual=(Assignment(rejected.workers, 0, LAYERS, rejected.shares),))
    assert rejected.prediction == by_hand.prediction
    if objective == "latency":
        assert rejected.prediction.answer_s > 0.98 * prediction.answer_s
    line = line_of(plan, "not as a group (")
    assert f"{1 / rejected.prediction.token_s:.2g}"[:2] in line and "+".join(rejected.workers) in line
    assert line.endswith(f"): {rejected.reason}") and " with this plan " in rejected.reason
    values = json.loads(json.dumps(plan_json(plan)))["rejected_group"]
    assert values["token_ms"] == pytest.approx(1e3 * rejected.prediction.token_s)
    assert values["workers"] == [*rejected.workers] and values["shares"] == [*rejected.shares]


@pytest.mark.parametrize("seed", range(6))
def test_no_other_group_of_all_layers_is_clearly_better_than_the_one_shown(seed: int) -> None:
    source = random.Random(seed)
    workers = [able(name, speed) for speed in [source.choice((10, 20, 40))] for name in "abcd"[: source.randint(2, 4)]]
    names = [each.name for each in workers]
    links = network(names, source.choice((200, 500, 1000)), source.choice((4e-9, 20e-9)))
    plan = planned(workers, links=links)
    rejected = plan.rejected_group
    if rejected is None:
        assert any(stage.shares for stage in plan.stages), (seed, plan.no_group)
        return
    for count in range(2, len(names) + 1):
        for some in itertools.permutations(names, count):
            other = planned(workers, links=links, manual=(Assignment(some, 0, LAYERS, (1,) * count),)).prediction
            assert other is not None and other.answer_s > 0.99 * rejected.prediction.answer_s, (seed, some)


def without_links(workers: Sequence[WorkerFacts]) -> dict[str, Any]:
    names = [each.name for each in workers]
    pairs = {pair: link for pair, link in network(names, 5).measured.items() if not pair <= {*names}}
    return {"links": Links(pairs)}


def cut(workers: Sequence[WorkerFacts]) -> dict[str, Any]:
    return {"partitions": frozenset(map(frozenset, itertools.combinations([each.name for each in workers], 2)))}


def off(workers: Sequence[WorkerFacts]) -> dict[str, Any]:
    return {"largest_group": 1, "no_groups": "`groups` is off"}


OBSTACLES: dict[str, Callable[[Sequence[WorkerFacts]], dict[str, Any]]] = {
    "the link between a and b is not measured": without_links,
    "a and b accuse each other": lambda workers: {"disputes": cut(workers)["partitions"]},
    "`groups` is off": off,
}


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("why", OBSTACLES)
def test_a_plan_says_why_no_group_is_possible(why: str, count: int) -> None:
    workers = [able(name) for name in "abcd"[:count]]
    plan = planned(workers, **OBSTACLES[why](workers))
    assert (plan.rejected_group, plan.no_group) == (None, why)
    assert line_of(plan, "no group is possible: ").endswith(why)
    assert plan_json(plan)["no_group"] == why


@pytest.mark.parametrize(("count", "able_count"), [(3, 0), (3, 1), (2, 1)])
def test_workers_that_join_no_group_are_named(count: int, able_count: int) -> None:
    workers = [replace(able(name), joins_groups=number < able_count) for number, name in enumerate("abc"[:count])]
    names, are_several = ", ".join("abc"[able_count:count]), able_count < count - 1
    assert planned(workers).no_group == f"{names} {'accept' if are_several else 'accepts'} no links from other members"
    gpu = GpuFacts("cuda:0", 100 * MIB, profile())
    with_gpus = [worker if worker.joins_groups else replace(worker, gpus=(gpu,)) for worker in workers]
    assert planned(with_gpus).no_group == f"{names} {'have' if are_several else 'has'} a GPU"


def test_pairs_that_cannot_reach_each_other_are_named() -> None:
    workers = [able(name, memory_mib=10_000) for name in "ab"]
    plan = planned(workers, **cut(workers))
    assert plan.no_group == "a and b cannot reach each other" and len(plan.stages) == 1


@pytest.mark.parametrize("memory_mib", [1, 4])
def test_groups_without_room_are_not_shown(memory_mib: int) -> None:
    workers = [able("a"), able("b", memory_mib=memory_mib)]
    assert planned(workers).no_group == "no group has enough memory"


def test_plans_with_groups_of_one_worker_or_by_hand_have_no_line() -> None:
    grouped, alone = planned([able("a"), able("b")]), planned([able("a")])
    by_hand = planned([able("a"), able("b")], manual=(Assignment(("a",), 0, LAYERS),))
    unmeasured = planned([replace(able(name), profile=None) for name in "ab"])
    for plan in (grouped, alone, by_hand, unmeasured):
        assert (plan.rejected_group, plan.no_group) == (None, "")
        assert len([*choice_lines(plan_json(plan))]) == 2, "the objective and the context"
    assert (grouped.objective, by_hand.objective) == ("latency", None)


@pytest.mark.parametrize(("context", "prompt"), [(128, 128), (512, 512), (4096, 512)])
def test_the_objective_is_told_with_its_work(context: int, prompt: int) -> None:
    workers = [able(name) for name in "ab"]
    latency, throughput = (
        line_of(planned(workers, context_length=context, objective=objective), "objective: ")
        for objective in ("latency", "throughput")
    )
    assert latency == f"  objective: latency (a request alone: {prompt} tokens of prompt, 128 of answer)"
    assert throughput == (
        f"  objective: throughput (8 requests at once, each {prompt} tokens of prompt, 128 of answer)"
    )
    by_hand = planned(workers, manual=(Assignment(("a",), 0, LAYERS),))
    assert line_of(by_hand, "objective: ") == "  objective: none (the plan is by hand)"

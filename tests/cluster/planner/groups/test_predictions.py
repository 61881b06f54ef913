"""Tests what gathers add to a group's steps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest

from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.gathers import GATHER_S, HIDDEN_SHARE, GroupLinks
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.predict import predict_again
from support.plans.plan_inputs import REQUEST, SMALL, group_costs, profile, step_time, worker

NAMES = "abcd"
COSTS = partial(group_costs, SMALL)
READ_S = 20e9
"""Bytes a second that each worker reads."""


def links(one_way_s: float = 250e-6, byte_s: float = 8e-9, **others: Link) -> Links:
    """Returns links of all pairs; `others` has links by pairs of names."""
    pairs = {
        frozenset(pair): Link(one_way_s, byte_s, 100e-6) for pair in itertools.combinations((COORDINATOR, *NAMES), 2)
    }
    return Links(pairs | {frozenset(pair): link for pair, link in others.items()})


def planned(*entries: Assignment, workers: tuple[WorkerFacts, ...] = (), of: Links | None = None) -> Plan:
    known = workers or tuple(worker(name) for name in NAMES)
    request = replace(REQUEST, group_costs=COSTS, links=of or links(), manual=entries, max_window=0)
    return make_plan(SMALL, known, request)


def predicted(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (1, 1, 1), (4, 3, 2, 1)])
def test_a_token_takes_the_largest_portion_and_all_gathers(shares: tuple[int, ...]) -> None:
    plan = planned(Assignment(tuple(NAMES[: len(shares)]), 0, 12, shares))
    found, most = predicted(plan), max(shares) / sum(shares)
    row = 38_400  # bytes of a whole row
    others = 1 - min(shares) / sum(shares)
    slowest = max((len(shares) - 1) * most, others) * row * 8e-9
    logits = (1 - shares[0] / sum(shares)) * 4 * row * 8e-9
    embedding = (len(shares) - 1) * row * 8e-9  # from the leader to all others
    gathers = 48 * slowest + embedding + logits + 50 * (100e-6 + GATHER_S)
    assert found.gathers_s == pytest.approx(gathers, rel=1e-3)
    computing = most * (12 * 10 + 20) * (1 << 20) / READ_S
    assert found.token_s == pytest.approx(computing + gathers, rel=1e-3)
    assert found.links_s == 0
    assert [stage.gathers_s for stage in found.stages] == [found.gathers_s] * len(shares)
    assert found.token_s == pytest.approx(max(stage.decode_s for stage in found.stages))


def test_the_slowest_link_of_a_group_counts() -> None:
    entry = Assignment(("a", "b", "c"), 0, 12, (1, 1, 1))
    usual = predicted(planned(entry)).gathers_s
    late = predicted(planned(entry, of=links(ac=Link(3e-3, 8e-9, 2e-3)))).gathers_s
    assert late - usual == pytest.approx(50 * 1.9e-3, rel=1e-3)
    narrow = predicted(planned(entry, of=links(bc=Link(250e-6, 80e-9, 100e-6)))).gathers_s
    assert narrow - usual == pytest.approx(48 * 38_400 / 3 * 72e-9, rel=1e-2)
    outside = predicted(planned(entry, of=links(ad=Link(3e-3, 8e-9, 2e-3)))).gathers_s
    assert outside == usual


def test_a_link_whose_network_is_unknown_has_what_programs_do_not_take() -> None:
    assert GroupLinks.of(Links({frozenset("ab"): Link(350e-6, 0)}), "ab").gather_s == pytest.approx(200e-6 + GATHER_S)
    assert GroupLinks.of(Links({frozenset("ab"): Link(20e-6, 0)}), "ab").gather_s == GATHER_S
    assert GroupLinks.of(Links(), "ab").gather_s == GATHER_S, "of one machine"


def test_bytes_of_a_prompt_travel_while_others_are_computed() -> None:
    alone, slow = (planned(Assignment(("a", "b"), 0, 12, (1, 1)), of=links(byte_s=byte_s)) for byte_s in (0.0, 8e-9))
    sent = (48 * 19_200 + 38_400) * 8e-9  # seconds for each prompt token
    more = predicted(slow).stages[0].prefill_s - predicted(alone).stages[0].prefill_s
    hidden = min(HIDDEN_SHARE * sent, predicted(alone).stages[0].prefill_s - 49 * (100e-6 + GATHER_S) / 512)
    assert more == pytest.approx(sent - hidden, rel=1e-2)


def test_a_chain_of_groups_and_workers_sums_up() -> None:
    first, second = Assignment(("b", "a"), 0, 5, (2, 1)), Assignment(("c", "d"), 5, 12, (1, 1))
    found = predicted(planned(first, second))
    stages = [max(time.decode_s for time in pair) for pair in (found.stages[:2], found.stages[2:])]
    hops = 2 * 250e-6 + SMALL.hidden_bytes * 8e-9
    assert found.token_s == pytest.approx(sum(stages) + hops)
    assert found.bottleneck in "bacd"


def test_measured_steps_count_by_portion() -> None:
    steps = (step_time(1, 0.5, 100, 4.0), step_time(8, 0.5, 100, 8.0))
    workers = tuple(replace(worker(name), profile=profile(isolated=steps, concurrent=steps)) for name in NAMES)
    plan = planned(Assignment(("a", "b"), 0, 12, (3, 1)), workers=workers)
    found = predicted(plan)
    gathers = found.gathers_s
    layers = 12 * 10 * (1 << 20) * 100e-12
    assert found.stages[0].decode_s - gathers == pytest.approx(0.5e-3 + 0.75 * (layers + 4e-3), rel=1e-3)
    assert found.stages[1].decode_s - gathers == pytest.approx(0.5e-3 + 0.25 * (layers + 4e-3), rel=1e-3)


def test_predictions_of_a_plan_of_before() -> None:
    plan = planned(Assignment(("b", "a"), 0, 5, (2, 1)), Assignment(("c",), 5, 12))
    facts = {name: worker(name) for name in NAMES}
    costs = StageCosts.of(SMALL)
    again = predict_again(costs, plan, facts, REQUEST.max_sequences, links(), COSTS)
    assert again == predicted(plan)
    slower = predict_again(costs, plan, facts, REQUEST.max_sequences, links(ab=Link(2e-3, 8e-9, 2e-3)), COSTS)
    assert slower is not None and slower.gathers_s > 2 * predicted(plan).gathers_s
    del facts["a"]
    assert predict_again(costs, plan, facts, REQUEST.max_sequences, links(), COSTS) is None

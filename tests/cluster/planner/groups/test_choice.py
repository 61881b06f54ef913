"""Tests when automatic plans have groups, and which."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from llamaclust.cluster.planner.format import plan_lines
from llamaclust.cluster.planner.links import Link, Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import ANSWER_TOKENS, Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import NetworkPartitionError
from llamaclust.core.sizes import MIB
from llamaclust.model.groups.costs import GatherCost, GroupCosts
from llamaclust.model.quant_types import ActivationFormat
from support.plans.group_inputs import AUTO, LARGE, able, network, planned
from support.plans.plan_inputs import SMALL, group_costs


def token_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.token_s


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_equal_workers_near_each_other_are_a_group(count: int) -> None:
    workers = [able(name) for name in "abcdefgh"[:count]]
    plan = planned(workers)
    assert [len(members) for members in plan.chain] == [count]
    assert len({*plan.stages[0].shares}) == 1
    assert token_s(plan) < 1.4 * token_s(planned(workers, largest_group=1)) / count


@pytest.mark.parametrize("gather_us", [2_000, 10_000, 50_000])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_workers_far_apart_are_no_group(gather_us: float, objective: str) -> None:
    workers = [able(name) for name in "abc"]
    plan = planned(workers, gather_us, objective=objective)
    assert plan == planned(workers, gather_us, objective=objective, largest_group=1)


def test_workers_that_take_no_links_are_in_no_group() -> None:
    workers = [able("a"), able("b"), replace(able("c"), joins_groups=False)]
    assert planned(workers).chain == (("a", "b"),)
    alone = [replace(each, joins_groups=each.name == "a") for each in workers]
    assert planned(alone) == planned(alone, largest_group=1)


def test_links_of_a_group_are_known() -> None:
    workers = [able(name) for name in "abc"]
    known = network("abc", 5)
    without = Links({pair: link for pair, link in known.measured.items() if pair != frozenset("ab")})
    for members in planned(workers, links=without).chain:
        assert not {"a", "b"} <= {*members}
    assert planned(workers, links=Links()) == planned(workers, links=Links(), largest_group=1)


@pytest.mark.parametrize("largest", [1, 2, 3])
def test_the_user_says_how_large_groups_are(largest: int) -> None:
    plan = planned([able(name) for name in "abcd"], largest_group=largest)
    assert max(map(len, plan.chain)) == largest


@pytest.mark.parametrize("speeds", [(40, 20), (20, 40), (60, 20), (40, 20, 20), (50, 30, 20)])
def test_shares_follow_speeds(speeds: tuple[int, ...]) -> None:
    plan = planned([able(name, speed) for name, speed in zip("abc", speeds, strict=False)])
    assert len(plan.chain) == 1
    by_speed = sorted(speeds, reverse=True)
    shares = plan.stages[0].shares
    for speed, share in zip(by_speed, shares, strict=True):
        assert share / sum(shares) == pytest.approx(speed / sum(speeds), abs=0.02)


def _segmented(costs: GroupCosts) -> GroupCosts:
    """Returns the model's costs with gathered rows in int8 where portions have whole segments."""
    gathers = (GatherCost(9728, 608, form=ActivationFormat.Q8_256),) * 4
    return replace(costs, layers=tuple(replace(layer, gathers=gathers) for layer in costs.layers))


@pytest.mark.parametrize("seed", range(4))
def test_portions_are_of_whole_segments_where_bytes_count(seed: int) -> None:
    source = random.Random(seed)
    workers = [able(name, source.choice((10, 15, 20, 40))) for name in "abc"[: source.randint(2, 3)]]
    names = [each.name for each in workers]
    byte_s, context = source.choice((0.4e-9, 2e-9)), source.choice((64, 512))
    plans = partial(
        planned,
        workers,
        links=network(names, 5, byte_s),
        group_costs=lambda members: _segmented(group_costs(LARGE, members)),
        context_length=context,
    )
    chosen = plans()
    assert chosen.prediction is not None
    (members,) = chosen.chain
    drawn = ([source.randint(1, 20) for _ in members] for _ in range(40))
    others = [plans(manual=(Assignment(members, 0, 12, tuple(shares)),)).prediction for shares in drawn]
    least_s = min(other.answer_s for other in others if other is not None)
    print(f"{byte_s}: {chosen.stages[0].shares} {chosen.prediction.answer_s:.4f} s, others {least_s:.4f} s")
    assert chosen.prediction.answer_s <= 1.005 * least_s


def test_shares_end_where_memory_ends() -> None:
    plan = planned([able("a", memory_mib=1500), able("b", memory_mib=500)], max_sequences=1)
    assert plan.chain == (("a", "b"),)
    small = next(stage for stage in plan.stages if stage.worker == "b")
    assert small.bytes <= 500 * MIB
    assert small.shares[small.member] < 0.45 * sum(small.shares)


def test_a_worker_far_from_a_group_has_a_stage_of_its_own() -> None:
    far = Link(5e-3, 1e-9, 5e-3)
    workers = [able(name, memory_mib=600) for name in "abc"]
    links = network("abc", 5, ac=far, bc=far)
    plan = planned(workers, links=links)
    assert sorted(map(len, plan.chain)) == [1, 2]
    assert {*max(plan.chain, key=len)} == {"a", "b"}


@pytest.mark.parametrize("pairs", [("ab",), ("ab", "cd"), ("ab", "ac", "ad"), ("ab", "bc", "cd", "da")])
def test_pairs_that_cannot_reach_each_other_are_in_no_group_together(pairs: Sequence[str]) -> None:
    workers = [able(name) for name in "abcd"]
    plan = planned(workers, partitions=frozenset(map(frozenset, pairs)))
    largest = max(plan.chain, key=len)
    assert len(largest) == max(
        size
        for size in range(1, 5)
        for some in itertools.combinations("abcd", size)
        if not any({*pair} <= {*some} for pair in pairs)
    )
    for members in plan.chain:
        assert not any({*pair} <= {*members} for pair in pairs)


@pytest.mark.parametrize("memory_mib", [480, 500])
def test_a_worker_of_a_pair_is_in_a_group_beside_a_stage_of_the_other(memory_mib: int) -> None:
    """All three workers are needed: `c` is between the two, or in a group with one of them."""
    workers = [able(name, memory_mib=memory_mib) for name in "abc"]
    plan = planned(workers, partitions=frozenset({frozenset("ab")}), max_sequences=1)
    assert sorted(name for members in plan.chain for name in members) == ["a", "b", "c"]
    assert sorted(map(len, plan.chain)) == [1, 2] and not any({"a", "b"} <= {*members} for members in plan.chain)
    assert "c" in (plan.chain[0][0], plan.chain[1][0]), "leaders are neighbours"


def test_groups_hold_what_single_workers_cannot() -> None:
    """Layers are larger than the memory that remains of each worker."""
    huge = replace(SMALL, layers=SMALL.layers[:3], embedding_bytes=MIB, head_bytes=MIB)
    workers = [able(name, memory_mib=33) for name in "ab"]
    request = replace(AUTO, links=network("ab", 5), group_costs=partial(group_costs, huge), max_sequences=1)
    request = replace(request, workspace=lambda place: MIB, context_length=16)
    assert make_plan(huge, workers, request).chain == (("a", "b"),)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_prompt_that_takes_longer_in_a_group_counts(count: int) -> None:
    """Groups decode faster on a slow network, but take longer for a whole request."""
    workers = [able(name) for name in "abcd"[:count]]
    fast, slow = network("abcd"[:count], 5), network("abcd"[:count], 5, byte_s=20e-9)
    assert planned(workers, links=fast).chain == (tuple("abcd"[:count]),)
    plan = planned(workers, links=slow)
    assert all(len(members) == 1 for members in plan.chain)
    by_hand = planned(workers, links=slow, manual=(Assignment(tuple("abcd"[:count]), 0, 12, (1,) * count),))
    assert by_hand.prediction is not None and plan.prediction is not None
    assert by_hand.prediction.token_s < 0.97 * plan.prediction.token_s
    assert by_hand.prediction.answer_s > plan.prediction.answer_s


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_plan_with_groups_tells_what_stages_would_bring(objective: str) -> None:
    workers = [able(name, speed) for name, speed in zip("abc", (40, 20, 15), strict=True)]
    plan, stages = (planned(workers, largest_group=largest, objective=objective) for largest in (16, 1))
    assert stages.without_groups is None
    if any(stage.shares for stage in plan.stages):
        assert plan.without_groups == stages.prediction
        assert sum("without groups: " in line for line in plan_lines(plan)) == 1
    else:
        assert plan == stages


@pytest.mark.parametrize("seed", range(8))
def test_many_answers_by_a_plan_for_throughput_are_no_slower_than_by_stages(seed: int) -> None:
    source = random.Random(seed)
    workers = [able(f"w{number}", source.choice((10, 20, 40))) for number in range(source.randint(2, 4))]
    names = [each.name for each in workers]
    links = network(names, source.choice((5, 50, 200)), source.choice((0.1e-9, 1e-9, 8e-9)))
    plan, stages = (planned(workers, links=links, largest_group=largest, objective="throughput") for largest in (16, 1))
    found, least = (_requests_s(each) for each in (plan, stages))
    print(f"{plan.chain}: {found:.2f} s for eight requests, stages {least:.2f} s")
    assert found <= 1.03 * least


def _requests_s(plan: Plan) -> float:
    """Returns the time of prompts and answers of eight requests at once, by the slowest stage."""
    assert plan.prediction is not None
    prompts_s = 8 * plan.prompt_tokens * max(stage.prefill_s for stage in plan.prediction.stages)
    return prompts_s + 8 * ANSWER_TOKENS / plan.prediction.tokens_per_s


def test_throughput_keeps_stages_that_share_the_work_evenly() -> None:
    workers = [able(name) for name in "abcd"]
    plan = planned(workers, objective="throughput")
    assert plan == planned(workers, objective="throughput", largest_group=1)


@pytest.mark.parametrize("pairs", [("ab",), ("ab", "cd"), ("ab", "ac", "ad")])
def test_pairs_that_accuse_each_other_are_in_no_group_but_may_be_neighbours(pairs: Sequence[str]) -> None:
    workers, disputes = [able(name) for name in "abcd"], frozenset(map(frozenset, pairs))
    chain = planned(workers, disputes=disputes).chain
    assert not any({*pair} <= {*members} for pair in pairs for members in chain)
    assert max(map(len, chain)) == max(map(len, planned(workers, partitions=disputes).chain))
    two = [able(name, memory_mib=800) for name in "ab"]
    chain = planned(two, disputes=frozenset({frozenset("ab")})).chain
    assert sorted(map(len, chain)) == [1, 1], "each holds a stage"
    with pytest.raises(NetworkPartitionError):
        planned(two, partitions=frozenset({frozenset("ab")}))

"""Tests of workers that accuse each other: for how long plans keep them in different groups, by a moved clock."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.failures.disputes import Disputes
from llamaclust.cluster.control.reconcile import LoadEpoch, MakePlan, Notify, Wait
from llamaclust.core.errors import DisputeError
from support.plans.observed_cluster import BOTH, ONLY_A, Cluster

PAIRS = [frozenset("ab"), frozenset(("b", "worker-9")), frozenset("xa")]


def dispute(pair: frozenset[str]) -> DisputeError:
    return DisputeError("they accuse each other", pair=pair)


@pytest.mark.parametrize("pair", PAIRS)
def test_each_dispute_of_a_pair_lasts_longer(pair: frozenset[str]) -> None:
    disputes, now_s, pauses = Disputes(), 7.0, []
    for _ in range(8):
        disputes = disputes.add(pair, now_s)
        assert disputes.add(pair, now_s + 1) == disputes, "it lasts already"
        end_s = disputes.next_end_s(now_s)
        assert end_s is not None and disputes.pairs(end_s - 0.1) == {pair} and not disputes.pairs(end_s)
        assert disputes.next_end_s(end_s) is None
        pauses.append(end_s - now_s)
        now_s = end_s + 3600.0
    assert pauses[0] >= 120.0 and pauses[0] < pauses[1] < pauses[2], "minutes, and longer each time"
    assert all(before <= after for before, after in pairwise(pauses)) and pauses[-1] <= 7200.0
    other = frozenset(("c", "d"))
    assert disputes.add(other, now_s).next_end_s(now_s) == now_s + pauses[0], "pairs have times of their own"


def test_no_plan_with_the_group_is_made_before_the_dispute_ends() -> None:
    cluster, pauses = Cluster.serving(), []
    for _ in range(3):
        assert cluster.lose_pipeline(dispute(frozenset("ab"))) == MakePlan(cluster.state.inputs)
        assert cluster.state.inputs.disputes == {frozenset("ab")}
        assert not cluster.state.pool.quarantine.records and not cluster.state.pool.partitions
        assert cluster.plan(BOTH) == LoadEpoch(BOTH, is_exclusive=True), "stages of their own are allowed"
        begin_s = cluster.state.tick.now_s
        wait = cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
        assert isinstance(wait, Wait) and wait.until_s is not None
        pauses.append(wait.until_s - begin_s)
        for part in (0.1, 0.5, 0.99):
            assert cluster.at(begin_s + part * pauses[-1]) == wait, "nothing is planned again"
        assert isinstance(cluster.at(wait.until_s), MakePlan) and not cluster.state.inputs.disputes
        cluster.plan(BOTH)
    assert 120.0 <= pauses[0] < pauses[1] < pauses[2]


def test_a_group_of_the_pair_is_not_loaded_during_the_dispute() -> None:
    group = replace(
        BOTH,
        stages=tuple(
            replace(each, start=0, end=12, shares=(1, 1), member=number) for number, each in enumerate(BOTH.stages)
        ),
    )
    cluster = Cluster.serving()
    assert group.chain == (("a", "b"),) and not cluster.state.pool.forbids(group, 0.0)
    cluster.lose_pipeline(dispute(frozenset("ab")))
    pool, now_s = cluster.state.pool, cluster.state.tick.now_s
    assert pool.forbids(group, now_s) and not pool.forbids(BOTH, now_s) and not pool.forbids(ONLY_A, now_s)
    assert not pool.forbids(group, now_s + 120.0)


def test_requests_wait_for_the_end_of_a_dispute_within_a_group_of_the_plan() -> None:
    cluster = Cluster.serving()
    cluster.lose_pipeline(dispute(frozenset("ab")))
    action = cluster.plan(dispute(frozenset("ab")))
    assert isinstance(action, Notify) and action.text.startswith("waiting for the end of a dispute; requests wait ")

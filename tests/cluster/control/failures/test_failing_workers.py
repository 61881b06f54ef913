"""Tests of workers that fail while they serve: evidence, quarantine, plans without them, and release."""

from __future__ import annotations

import pytest

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.observations import Suspect
from llamaclust.cluster.control.reconcile import Abort, Expel, LoadEpoch, MakePlan, Serve, Wait
from llamaclust.core.errors import LlamaclustError, LoadCancelledError, ModelFileError, ProtocolError, UsageError
from support.plans.observed_cluster import ALL, BOTH, ONLY_A, ONLY_B, Cluster, fault_of, plan_of


def test_a_worker_that_fails_twice_is_left_out_and_tried_again_after_growing_pauses() -> None:
    cluster, pauses = Cluster.serving(), []
    assert cluster.lose_pipeline(fault_of("b")) == LoadEpoch(BOTH, is_exclusive=True), "once is no pattern"
    cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
    for failures in range(2, 6):
        action = cluster.lose_pipeline(fault_of("b"))
        assert isinstance(action, Expel)
        (excluded,) = action.expulsions
        assert excluded.stays and excluded.reason == f"it failed {failures} times, last: broken"
        pauses.append(excluded.pause_s)
        assert cluster.see(observations.Signal.WORKERS_EXPELLED) == MakePlan(cluster.state.inputs)
        assert cluster.state.inputs.quarantined == {"b"}
        assert cluster.plan(ONLY_A) == LoadEpoch(ONLY_A, is_exclusive=True)
        until_s = cluster.state.tick.now_s + excluded.pause_s
        assert cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING) == Wait(
            until_s, is_settled=True
        )
        assert isinstance(cluster.at(until_s), MakePlan) and not cluster.state.inputs.quarantined
        assert cluster.plan(BOTH) == LoadEpoch(BOTH, is_exclusive=False), "requests run meanwhile"
        cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
        cluster.see(observations.Signal.RETIRING_EMPTY, observations.Signal.RETIRING_FREED)
    assert pauses == [10, 20, 40, 80]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (fault_of("b", "worker b is lost"), True),
        (fault_of("b"), False),
        (fault_of("b", "a result has 9 bytes", ProtocolError), False),
    ],
    ids=["a loss", "a failed step", "a broken protocol"],
)
def test_a_failure_counts_also_where_the_next_plan_is_loaded_already(error: LlamaclustError, *, is_lost: bool) -> None:
    """The next plan has finished loading before the failure of the serving pipeline is processed."""
    cluster = Cluster.serving()
    cluster.see(observations.WorkerLost("b") if is_lost else observations.WorkerSeen("c", 3))
    plan = ONLY_A if is_lost else plan_of("a", "c")
    cluster.plan(plan)
    cluster.see(observations.PipelineLost(error))
    assert cluster.see(observations.Signal.EPOCH_LOADED) == Serve()
    cluster.see(observations.Signal.EPOCH_SERVING)
    assert [*cluster.state.pool.quarantine.records] == ["b"]
    assert bool(cluster.state.expulsions) == isinstance(error, ProtocolError)


@pytest.mark.parametrize("is_retiring", [False, True])
def test_requests_that_break_workers_release_them_when_they_end(*, is_retiring: bool) -> None:
    cluster = Cluster.serving()
    for _ in range(2):
        cluster.lose_pipeline(fault_of("b"), requests=frozenset({7}))
        cluster.see(observations.Signal.WORKERS_EXPELLED)
        cluster.plan(BOTH)
        cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
    assert cluster.state.inputs.quarantined == {"b"}
    if is_retiring:
        cluster.see(observations.RequestsStruckOut(frozenset({7})))
    else:
        cluster.lose_pipeline(fault_of("a"), requests=frozenset({7}), causes=frozenset({7}))
    assert not cluster.state.pool.quarantine.records, "the failure that ended the request is no worker's"


def test_a_quarantined_worker_that_serves_is_left_as_soon_as_others_suffice() -> None:
    cluster = Cluster.serving()
    for _ in range(2):
        cluster.lose_pipeline(fault_of("b"))
        cluster.see(observations.Signal.WORKERS_EXPELLED)
        cluster.plan(BOTH)
        cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
    cluster.see(observations.WorkerSeen("c", 3))
    with_c = plan_of("a", "c")
    assert cluster.plan(with_c) == LoadEpoch(with_c, is_exclusive=False), "no faster, but it does not fail"


DAMAGED = ModelFileError("b.gguf: it is damaged: replace it by a good copy")


def starting() -> Cluster:
    cluster = Cluster.starting()
    cluster.see(observations.WorkerSeen("a", 1), observations.WorkerSeen("b", 2))
    assert cluster.plan(BOTH) == LoadEpoch(BOTH, is_exclusive=True)
    return cluster


def test_a_start_does_without_a_worker_whose_copy_of_the_model_is_damaged() -> None:
    cluster = starting()
    action = cluster.load_failed(DAMAGED, Suspect("b", DAMAGED))
    assert isinstance(action, Expel)
    (excluded,) = action.expulsions
    assert excluded.stays and excluded.worker == ("b", 2) and "replace it" in excluded.reason
    assert cluster.see(observations.Signal.WORKERS_EXPELLED) == MakePlan(cluster.state.inputs)
    assert cluster.state.inputs.quarantined == {"b"}
    assert cluster.plan(ONLY_A) == LoadEpoch(ONLY_A, is_exclusive=True)
    until_s = cluster.state.tick.now_s + excluded.pause_s
    assert cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING) == Wait(
        until_s, is_settled=True
    )
    assert cluster.at(until_s) == MakePlan(cluster.state.inputs), "a good copy may be there by then"


def test_a_start_fails_where_a_damaged_copy_cannot_be_done_without() -> None:
    both = starting()
    assert both.load_failed(DAMAGED, Suspect("a", DAMAGED), Suspect("b", DAMAGED)) == Abort(DAMAGED)
    alone = Cluster.starting()
    alone.see(observations.WorkerSeen("b", 2))
    alone.plan(ONLY_B)
    assert alone.load_failed(DAMAGED, Suspect("b", DAMAGED)) == Abort(DAMAGED)
    needed = starting()
    needed.load_failed(DAMAGED, Suspect("b", DAMAGED))
    needed.see(observations.Signal.WORKERS_EXPELLED)
    needed.plan(BOTH)
    assert needed.load_failed(DAMAGED, Suspect("b", DAMAGED)) == Abort(DAMAGED), "the others do not suffice"
    other = starting()
    error = UsageError("kv_disk: not for this model")
    assert other.see(observations.EpochLoadFailed(error, True, (Suspect("b", error),))) == Abort(error)


@pytest.mark.parametrize(
    ("error", "quarantined"),
    [(fault_of("c", "worker c is lost"), {"c"}), (LoadCancelledError("its load is no longer needed"), set[str]())],
    ids=["lost", "cancelled"],
)
def test_a_worker_that_is_lost_in_each_load_is_left_out_unless_the_loads_were_cancelled(
    error: LlamaclustError, quarantined: set[str]
) -> None:
    cluster = Cluster.serving()
    for count in range(2):
        cluster.see(observations.WorkerSeen("c", 3 + count))
        cluster.plan(ALL)
        cluster.see(observations.WorkerLost("c"))
        cluster.see(observations.EpochLoadFailed(error, False, (Suspect("c", error),)))
    assert cluster.state.pool.quarantine.names(0.0) == quarantined


def test_requests_wait_where_a_failing_worker_is_the_only_one_until_another_is_there() -> None:
    cluster = Cluster.serving()
    cluster.see(observations.WorkerLost("a"))
    cluster.plan(ONLY_B)
    for _ in range(2):
        cluster.lose_pipeline(fault_of("b"))
        cluster.see(observations.Signal.WORKERS_EXPELLED)
        assert cluster.plan(ONLY_B) == LoadEpoch(ONLY_B, is_exclusive=True)
        cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
    assert cluster.lose_pipeline(fault_of("b")) == Wait(0.25)
    assert cluster.at(0.25) == LoadEpoch(ONLY_B, is_exclusive=True)
    cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
    assert cluster.lose_pipeline(fault_of("b")) == Wait(0.75)
    cluster.see(observations.WorkerSeen("a", 3))
    assert cluster.plan(ONLY_A) == LoadEpoch(ONLY_A, is_exclusive=True), "at once"

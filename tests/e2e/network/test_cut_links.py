"""Tests of workers that reach the coordinator but not each other: requests continue with another plan and the bits of
one worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.clusters.command_line import eventually
from support.network.box import Box
from support.network.distant_cluster import (
    COORDINATOR,
    Answer,
    DistantCluster,
    distant_cluster,
    eight,
    undisturbed,
)
from support.network.link import Link

GENERATIONS = eight(max_tokens=96)
WORKER_S = 6.0  # The key timeouts.worker. A worker that answers no ping for half of it counts as unreachable.
WITHIN_S = WORKER_S + 20.0  # On an idle machine, WORKER_S and less than a second.
BEFORE_TOKENS = 60  # Tokens of 768 at which the link is cut. Requests last longer, even on a busy machine.

Strike = Callable[[Box], None]


@pytest.fixture(scope="module")
def small_answers(small_model: Path) -> list[Answer]:
    return undisturbed(small_model, GENERATIONS)


@contextmanager
def workers(model: Path, names: str, **keys: Any) -> Iterator[DistantCluster]:
    """Runs a cluster with a round trip of 20 ms. A token takes 40 ms or more, so that requests last until a fault."""
    with (
        Box((COORDINATOR, *names), delays=True) as box,
        distant_cluster(box, model, timeouts={"worker": f"{WORKER_S:g}s"}, **keys) as cluster,
    ):
        box.set_link(Link.of_round_trip(0.02))
        yield cluster


def cut(cluster: DistantCluster, strike: Strike) -> Future[list[Answer]]:
    """Sends eight requests, and cuts a link while they run."""
    asked = cluster.asked(GENERATIONS)
    eventually(lambda: cluster.metric("llamaclust_generated_tokens_total") > BEFORE_TOKENS, 60.0, "some tokens")
    strike(cluster.box)
    return asked


def goes_on(cluster: DistantCluster, strike: Strike) -> list[Answer]:
    """Cuts a link while requests run. Checks that they continue in time, and returns their answers."""
    asked, begun = cut(cluster, strike), time.monotonic()
    eventually(lambda: changes(cluster) >= 1, 60.0, "another plan")
    pause_s = time.monotonic() - begun
    print(f"requests went on after {pause_s:.2f} s")
    assert pause_s < WITHIN_S
    answers = asked.result(240.0)
    assert changes(cluster) == 1
    return answers


def changes(cluster: DistantCluster) -> int:
    """Returns the number of recoveries and of pipelines that broke after a new plan had replaced them. A worker may
    report a cut link so early that the new plan is served before the pipeline breaks."""
    broke = cluster.coordinator.err.read_text().count("requests of the previous epoch are computed again")
    return int(cluster.status["recoveries"]) + broke


def holding(cluster: DistantCluster) -> set[str]:
    """Returns the workers that have layers. Checks that no worker is lost."""
    found = cluster.status["workers"]
    assert all(worker["state"] != "lost" for worker in found)
    return {worker["name"] for worker in found if worker["layers"]}


CUTS: dict[str, tuple[str, Strike]] = {
    "nothing of the last reaches the first": ("ca", lambda box: box.black_hole("c", "a")),
    "the second refuses the first": ("ab", lambda box: box.refuse("a", "b")),
}


@pytest.mark.parametrize(("pair", "strike"), CUTS.values(), ids=CUTS.keys())
def test_the_third_takes_the_place_of_one(
    small_model: Path, small_answers: list[Answer], pair: str, strike: Strike
) -> None:
    with workers(small_model, "abc") as cluster:
        assert goes_on(cluster, strike) == small_answers
        assert len(holding(cluster)) == 2 and not holding(cluster) >= set(pair)
        assert cluster.coordinator.err.read_text().count("cannot reach each other") == 1


def test_of_two_one_serves_alone(small_model: Path, small_answers: list[Answer]) -> None:
    with workers(small_model, "ab") as cluster:
        assert goes_on(cluster, lambda box: box.black_hole("a", "b")) == small_answers
        assert holding(cluster) == {"a"}
        cluster.box.heal()
        eventually(lambda: holding(cluster) == set("ab"), 60.0, "both at work again")
        assert cluster.answers(GENERATIONS[:2]) == small_answers[:2]


def test_where_it_takes_both_requests_wait_for_the_link(small_model: Path, small_answers: list[Answer]) -> None:
    by_hand = [{"worker": "a", "layers": [0, 3]}, {"worker": "b", "layers": [3, 6]}]
    with workers(small_model, "ab", plan=by_hand) as cluster:
        asked = cut(cluster, lambda box: box.black_hole("a", "b"))
        why = "workers a and b cannot reach each other, but are neighbours in every plan"
        cluster.coordinator.says(f"waiting for a link; requests wait 120 s at most: {why}")
        assert cluster.get("/health").json()["status"] == "recovering"
        cluster.box.heal()
        assert asked.result(240.0) == small_answers


GROUPS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "a follower from the leader": ("ab", [{"workers": ["a", "b"], "layers": [0, 6]}]),
    "two followers from each other": ("bc", [{"workers": ["a", "b", "c"], "shares": [2, 1, 1], "layers": [0, 6]}]),
    "two members before another stage": (
        "ba",
        [{"workers": ["b", "a"], "layers": [0, 4]}, {"worker": "c", "layers": [4, 6]}],
    ),
}


@pytest.mark.parametrize(("pair", "by_hand"), GROUPS.values(), ids=GROUPS.keys())
def test_members_of_a_group_are_cut_off(
    small_model: Path, small_answers: list[Answer], pair: str, by_hand: list[dict[str, Any]]
) -> None:
    """The cut is detected as fast as between stages, long before the deadline of a gather (30 s). No worker gets a
    strike."""
    names = "ab" if by_hand[-1].get("workers") == ["a", "b"] else "abc"
    with workers(small_model, names, plan=by_hand) as cluster:
        asked, begun = cut(cluster, lambda box: box.black_hole(*pair)), time.monotonic()
        cluster.coordinator.says("waiting for a link; requests wait 120 s at most")
        pause_s = time.monotonic() - begun
        print(f"noticed after {pause_s:.2f} s")
        assert pause_s < WITHIN_S
        cluster.box.heal()
        assert asked.result(240.0) == small_answers
        assert all(worker["state"] != "lost" and worker["quarantine"] is None for worker in cluster.status["workers"])

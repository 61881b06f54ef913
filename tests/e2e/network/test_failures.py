"""Tests of a host that is killed, hangs or is cut off while eight requests run: answers have the bits of one worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.clusters.command_line import eventually
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, TOKENS, Answer, DistantCluster, distant_cluster, eight
from support.network.link import Link

GENERATIONS = eight(max_tokens=TOKENS)
WORKERS = ("a", "b", "c")
HEARTBEAT_TIMEOUT_S = 2.0
DEAD_S = 60.0  # Less than a second on an idle machine.
SILENT_S = HEARTBEAT_TIMEOUT_S + DEAD_S
BEFORE_TOKENS = 60  # Tokens of 192 at which the fault begins.


@pytest.fixture
def cluster(small_model: Path) -> Iterator[DistantCluster]:
    """Runs a cluster with a round trip of 20 ms. A token takes 40 ms or more, so that requests last until a fault."""
    with (
        Box((COORDINATOR, *WORKERS), delays=True) as box,
        distant_cluster(box, small_model, timeouts={"worker": f"{HEARTBEAT_TIMEOUT_S:g}s"}) as cluster,
    ):
        box.set_link(Link.of_round_trip(0.02))
        yield cluster


def kill(cluster: DistantCluster, name: str) -> None:
    cluster.workers[name].process.kill()


def stop(cluster: DistantCluster, name: str) -> None:
    os.kill(cluster.workers[name].process.pid, signal.SIGSTOP)


def unplug(cluster: DistantCluster, name: str) -> None:
    cluster.box.unplug(name)


def hole(source: str, target: str) -> Callable[[DistantCluster, str], None]:
    return lambda cluster, name: cluster.box.black_hole(source, target)


@dataclass(frozen=True, slots=True)
class Fault:
    lost: str
    strike: Callable[[DistantCluster, str], None]
    within_s: float  # Maximum time from the fault until requests continue.


FAULTS = {
    "the last is killed": Fault("c", kill, DEAD_S),
    "the first stands still": Fault("a", stop, SILENT_S),
    "nothing reaches one": Fault("b", hole(COORDINATOR, "b"), SILENT_S),
    "nothing comes from one": Fault("b", hole("b", COORDINATOR), SILENT_S),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_requests_go_on_with_the_same_bits(cluster: DistantCluster, small_answers: list[Answer], fault: Fault) -> None:
    eventually(lambda: states(cluster) == dict.fromkeys(WORKERS, "ready"), 60.0, "all workers are ready")
    asked = interrupted(cluster, fault)
    assert asked.result(240.0) == small_answers
    expected = dict.fromkeys(WORKERS, "ready") | {fault.lost: "lost"}
    eventually(lambda: states(cluster) == expected, 60.0, "the loss of one worker alone")


def interrupted(cluster: DistantCluster, fault: Fault) -> Future[list[Answer]]:
    """Sends eight requests, and waits until they continue after a fault."""
    asked = cluster.asked(GENERATIONS)
    eventually(lambda: cluster.metric("llamaclust_generated_tokens_total") > BEFORE_TOKENS, 60.0, "some tokens")
    recoveries, begun = cluster.status["recoveries"], time.monotonic()
    fault.strike(cluster, fault.lost)
    eventually(lambda: cluster.status["recoveries"] > recoveries, 120.0, "a recovery")
    pause_s = time.monotonic() - begun
    print(f"worker {fault.lost}: requests went on after {pause_s:.2f} s")
    assert pause_s < fault.within_s
    return asked


def states(cluster: DistantCluster) -> dict[str, str]:
    return {worker["name"]: worker["state"] for worker in cluster.status["workers"]}


def test_a_worker_that_was_cut_off_comes_back(cluster: DistantCluster, small_answers: list[Answer]) -> None:
    asked = interrupted(cluster, Fault("b", unplug, SILENT_S))
    cluster.box.heal()
    assert asked.result(240.0) == small_answers
    eventually(lambda: states(cluster) == dict.fromkeys(WORKERS, "ready"), 60.0, "its return")
    assert cluster.answers(GENERATIONS) == small_answers

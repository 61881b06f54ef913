"""Tests of machines that change their address or sleep: they get layers again without a restart, and answers have the
same bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.clusters.command_line import eventually
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, TOKENS, Answer, DistantCluster, distant_cluster, eight

GENERATIONS = eight(TOKENS)
WORKERS = ("a", "b", "c")
START_S = 120.0
BACK_S = 120.0
"""Maximum time until a machine with a new address has layers again."""
SLEEP_S = 8.0
"""A time that is longer than the heartbeat timeout."""
HEARTBEAT_S = 1.5
"""A time that is longer than the interval between heartbeats."""
ANYWHERE = {"listen": "0.0.0.0:7100", "members": "0.0.0.0:7101"}


def other_lease(box: Box, name: str) -> None:
    box.configure(name, f"addr del {box[name].address}/24 dev eth0", "addr add 10.77.0.77/24 dev eth0")


def other_interface(box: Box, name: str) -> None:
    box.add_device(name, "eth1")
    box.configure(name, f"addr del {box[name].address}/24 dev eth0", "link set eth0 down")
    box.configure(name, "addr add 10.77.0.78/24 dev eth1", "link set eth1 up")


def cable_beside_wireless(box: Box, name: str) -> None:
    """Gives both devices addresses. Routes to other hosts use the cable."""
    box.add_device(name, "eth1")
    box.configure(name, "link set eth1 up", "addr add 10.77.0.79/24 dev eth1 noprefixroute")
    box.configure(name, "route add 10.77.0.0/25 dev eth1 src 10.77.0.79")


def no_network_for_a_while(box: Box, name: str) -> None:
    box.unplug(name)
    time.sleep(SLEEP_S)
    other_lease(box, name)
    box.plug(name)


CHANGES = {
    "another lease": other_lease,
    "another card": other_interface,
    "a cable beside Wi-Fi": cable_beside_wireless,
    "another network later": no_network_for_a_while,
}


def all_ready(cluster: DistantCluster) -> bool:
    status = cluster.status
    held = [worker for worker in status["workers"] if worker["state"] == "ready" and worker["layers"] is not None]
    return status["state"] == "ready" and {worker["name"] for worker in held} == {*WORKERS}


def computed(cluster: DistantCluster) -> dict[str, int]:
    """Returns the number of tokens that each worker has computed since it joined."""
    return {each["name"]: (each["heartbeat"] or {"tokens": 0})["tokens"] for each in cluster.status["workers"]}


def all_compute(cluster: DistantCluster, answers: list[Answer]) -> bool:
    """Returns True if requests use all workers. A worker with a wrong address may be ready but get no requests."""
    before = computed(cluster)
    assert cluster.answers(GENERATIONS) == answers
    time.sleep(HEARTBEAT_S)
    return all_ready(cluster) and all(tokens > before[name] for name, tokens in computed(cluster).items())


def comes_back(cluster: DistantCluster, change: Callable[[], None], answers: list[Answer]) -> None:
    """Checks that all workers have layers again in time, that no process has restarted, and that answers are
    correct."""
    eventually(lambda: all_ready(cluster), START_S, "layers at all workers")
    before = {name: worker.process.pid for name, worker in cluster.workers.items()}
    recoveries = cluster.status["recoveries"]
    asked = cluster.asked(GENERATIONS)
    change()
    begun = time.monotonic()
    eventually(lambda: cluster.status["recoveries"] > recoveries, BACK_S, "the loss of the old address")
    eventually(lambda: all_ready(cluster) and all_compute(cluster, answers), BACK_S, "layers at all workers again")
    print(f"layers are back after {time.monotonic() - begun:.1f} s")
    assert asked.result(240.0) == answers
    assert {name: worker.process.pid for name, worker in cluster.workers.items()} == before
    assert all(worker.process.poll() is None for worker in cluster.workers.values())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_layers_return_to_a_worker_at_another_address(
    small_model: Path, small_answers: list[Answer], change: Callable[[Box, str], None]
) -> None:
    with Box((COORDINATOR, *WORKERS)) as box:
        join = ("--join", f"{box[COORDINATOR].address}:7100")
        with distant_cluster(box, small_model, join, timeouts={"worker": "2s"}) as cluster:
            comes_back(cluster, lambda: change(box, "b"), small_answers)


def test_layers_return_to_a_worker_that_slept_and_woke_at_another_address(
    small_model: Path, small_answers: list[Answer]
) -> None:
    with Box((COORDINATOR, *WORKERS)) as box:
        join = ("--join", f"{box[COORDINATOR].address}:7100")
        with distant_cluster(box, small_model, join, timeouts={"worker": "2s"}) as cluster:

            def sleep_and_wake() -> None:
                pid = cluster.workers["c"].process.pid
                os.kill(pid, signal.SIGSTOP)
                no_network_for_a_while(box, "c")
                os.kill(pid, signal.SIGCONT)

            comes_back(cluster, sleep_and_wake, small_answers)


def test_workers_find_a_coordinator_at_another_address(small_model: Path, small_answers: list[Answer]) -> None:
    """The coordinator announces its new address, and workers listen for multicast on all network devices."""
    with Box((COORDINATOR, *WORKERS)) as box:
        keys = {"join": {**ANYWHERE, "discover": True}, "timeouts": {"worker": "2s"}}
        with distant_cluster(box, small_model, ("--discover",), **keys) as cluster:
            comes_back(cluster, lambda: other_lease(box, COORDINATOR), small_answers)

"""Tests of firewalls that block only the port for group links: one line names the port, and groups return when it is
open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.clusters.command_line import eventually
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, TOKENS, Answer, DistantCluster, distant_cluster, eight
from support.wire.group_links import needs_tls

pytestmark = needs_tls

GENERATIONS = eight(max_tokens=TOKENS)
PORT = 8102  # 1000 above the port for stages.
SLOW = {"memory_bandwidth_gb_s": 0.01, "int8_gmac_s": 0.2}  # Values with which a group is faster than one worker.
TRIES = 3
"""Number of connection attempts, during which the partition prober would have probed twice."""


@contextmanager
def workers(box: Box, model: Path, **keys: Any) -> Iterator[DistantCluster]:
    with distant_cluster(box, model, timeouts={"worker": "6s"}, **keys) as cluster:
        yield cluster


def said(cluster: DistantCluster, text: str) -> int:
    return cluster.coordinator.err.read_text().count(text)


def names_the_port_once(cluster: DistantCluster, box: Box, closed: str, refuses: bool) -> None:
    """Waits for more attempts to connect, and checks that the log has one line. An attempt sends one packet if it is
    refused, and several packets if they are dropped. Each end of a link that was open when the port was closed may
    report it first as a link that is broken."""
    line = f"cannot connect to worker {closed} at {box[closed].address}:{PORT}, its port for group links: open"
    cluster.coordinator.says(line, 60.0)
    cluster.coordinator.says(f"until then, plans put worker {closed} in no group")
    before = box.filtered(closed)
    packets = TRIES if refuses else 3 * TRIES
    eventually(lambda: box.filtered(closed) >= before + packets, 120.0, "more tries")
    assert said(cluster, f"until then, plans put worker {closed} in no group") == 1
    ends = 2 * (len(cluster.workers) - 1)
    assert said(cluster, "plans do not make them neighbours until the link works") <= ends
    assert said(cluster, "reach each other again") <= ends


@pytest.mark.parametrize("refuses", [False, True], ids=["dropped", "refused"])
@pytest.mark.parametrize(("names", "closed"), [("ab", "a"), ("abc", "b")])
def test_requests_of_a_group_by_hand_wait_for_the_port(
    small_model: Path, small_answers: list[Answer], names: str, closed: str, refuses: bool
) -> None:
    plan = [{"workers": [*names], "layers": [0, 6]}]
    with Box((COORDINATOR, *names)) as box, workers(box, small_model, plan=plan) as cluster:
        assert cluster.answers(GENERATIONS[:2]) == small_answers[:2]
        box.close_port(closed, PORT, refuses=refuses)
        asked = cluster.asked(GENERATIONS)
        names_the_port_once(cluster, box, closed, refuses)
        cluster.coordinator.says("waiting for a link; requests wait 120 s at most")
        box.heal()
        assert asked.result(120.0) == small_answers
        assert said(cluster, f"the port for group links of worker {closed} is open again") == 1
        assert all(worker["state"] != "lost" and worker["quarantine"] is None for worker in cluster.status["workers"])


def has_group(cluster: DistantCluster) -> bool:
    return any(worker["share"] is not None for worker in cluster.status["workers"])


@pytest.mark.parametrize("refuses", [False, True], ids=["dropped", "refused"])
def test_an_automatic_plan_has_no_group_until_the_port_is_open(
    small_model: Path, small_answers: list[Answer], refuses: bool
) -> None:
    keys: dict[str, Any] = {
        "objective": "latency",
        "groups": "auto",
        "workers": [{"name": name, **SLOW} for name in "ab"],
    }
    with Box((COORDINATOR, *"ab")) as box:
        box.close_port("a", PORT, refuses=refuses)
        with workers(box, small_model, **keys) as cluster:
            assert not has_group(cluster)
            assert cluster.answers(GENERATIONS[:4]) == small_answers[:4]
            names_the_port_once(cluster, box, "a", refuses)
            box.heal()
            eventually(lambda: has_group(cluster), 60.0, "a group")
            assert cluster.answers(GENERATIONS[:4]) == small_answers[:4]

"""Checks that a group's reported time in gathers is the time that the network adds to a token, over TLS between two
hosts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.clusters.command_line import eventually
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, Answer, DistantCluster, distant_cluster, eight
from support.network.link import Link

ROUND_TRIPS_MS = (2.0, 10.0, 30.0)
GENERATION = eight(max_tokens=24)[:1]
KEYS: dict[str, Any] = {"plan": [{"workers": ["a", "b"], "layers": [0, 6], "shares": [2, 1]}], "speculative": "off"}


@dataclass(frozen=True, slots=True)
class Counted:
    """Counters of one-row steps and gathers, and their total times."""

    steps: int
    gathers: int
    computed_s: float
    gathers_s: float

    @classmethod
    def of(cls, cluster: DistantCluster) -> Counted:
        group = stages_of_leader(cluster)[0]["group"]
        (stage,) = cluster.get("/cluster").json()["stages"]
        computed_s = stage["compute_ms"] * stage["microbatches"] / 1e3
        return cls(group["one_row_steps"], group["gathers"], computed_s, group["waited_s"])

    def __sub__(self, before: Counted) -> Counted:
        return Counted(
            self.steps - before.steps,
            self.gathers - before.gathers,
            self.computed_s - before.computed_s,
            self.gathers_s - before.gathers_s,
        )


def stages_of_leader(cluster: DistantCluster) -> list[dict[str, Any]]:
    """Returns the leader's stages from its last heartbeat."""
    leader = next(worker for worker in cluster.status["workers"] if worker["name"] == "a")
    found: list[dict[str, Any]] = (leader["heartbeat"] or {"stages": []})["stages"]
    return found


def has_counters(cluster: DistantCluster) -> bool:
    return any(stage["group"] for stage in stages_of_leader(cluster))


def answered(cluster: DistantCluster) -> tuple[Counted, list[Answer]]:
    """Returns the answer to one request, and the increase of the counters."""
    before = Counted.of(cluster)
    answers = cluster.answers(GENERATION)
    steps = GENERATION[0].max_tokens - 1
    eventually(lambda: (Counted.of(cluster) - before).steps == steps, 60.0, "a heartbeat with all steps")
    return Counted.of(cluster) - before, answers


def test_time_in_gathers_is_what_the_network_adds(small_model: Path, small_answers: list[Answer]) -> None:
    with Box((COORDINATOR, "a", "b"), delays=True) as box, distant_cluster(box, small_model, **KEYS) as cluster:
        eventually(lambda: has_counters(cluster), 60.0, "a heartbeat with the links' counters")
        none, answers = answered(cluster)
        assert answers == small_answers[:1]
        for round_trip_ms in ROUND_TRIPS_MS:
            link = Link.of_round_trip(round_trip_ms / 1e3)
            box.set_link(link)
            counted, answers = answered(cluster)
            assert answers == small_answers[:1]
            waited = counted.gathers - counted.steps  # The leader has the embedding's rows and does not wait for them.
            assert counted.gathers_s >= waited * link.delay_s, "rows of the other member are on the way so long"
            added_s, shown_s = counted.computed_s - none.computed_s, counted.gathers_s - none.gathers_s
            print(f"{round_trip_ms:g} ms: {1e3 * added_s:.1f} ms more in all, {1e3 * shown_s:.1f} of it in gathers")
        for _ in range(5):  # A pause of the machine falsifies a measurement. The slowest link is affected least.
            if shown_s == pytest.approx(added_s, rel=0.1):
                return
            box.set_link(Link())
            none, _ = answered(cluster)
            box.set_link(link)
            counted, _ = answered(cluster)
            added_s, shown_s = counted.computed_s - none.computed_s, counted.gathers_s - none.gathers_s
        raise AssertionError(f"{added_s:.3f} s more in all, {shown_s:.3f} of it in gathers")

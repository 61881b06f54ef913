"""Tests promise 1 over a network: a coordinator and three workers on separate hosts give the bits of one worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.clusters.command_line import eventually
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, Answer, DistantCluster, distant_cluster, eight, undisturbed
from support.network.link import Link

pytestmark = pytest.mark.model

GENERATIONS = eight(max_tokens=12)
HOSTS = (COORDINATOR, "a", "b", "c")


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> list[Answer]:
    """Returns one worker's answers."""
    return undisturbed(demo_model, GENERATIONS)


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[DistantCluster]:
    with Box(HOSTS, delays=True) as box, distant_cluster(box, demo_model) as cluster:
        yield cluster


LINKS = {
    "0 ms": Link(),
    "0.5 ms": Link.of_round_trip(0.0005),
    "20 ms": Link.of_round_trip(0.02),
    "100 ms": Link.of_round_trip(0.1),
    "100 Mbit/s": Link(rate_bit_s=100_000_000),
    "1 % loss": Link(loss=0.01),
    "5 % loss": Link(loss=0.05),
    "all of them": Link.of_round_trip(0.02, 100_000_000, 0.01),
}


@pytest.mark.promise
@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS.keys())
def test_same_tokens_and_bits(cluster: DistantCluster, expected: list[Answer], link: Link) -> None:
    cluster.box.set_link(link)
    begun = time.monotonic()
    try:
        assert cluster.answers(GENERATIONS) == expected
    finally:
        cluster.box.set_link(Link())
    rounds = GENERATIONS[0].max_tokens
    assert time.monotonic() - begun >= rounds * len(HOSTS) * link.delay_s, "every token goes through all links"


def test_all_workers_take_part_from_hosts_of_their_own(cluster: DistantCluster) -> None:
    workers = {worker["name"]: worker for worker in cluster.status["workers"]}
    assert {name: worker["address"] for name, worker in workers.items()} == {
        name: f"{cluster.box[name].address}:7102" for name in ("a", "b", "c")
    }
    # A worker that was cut off by a bad link gets layers again.
    eventually(lambda: all(worker["layers"] for worker in cluster.status["workers"]), 60, "layers on all workers")

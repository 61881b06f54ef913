"""Checks that a cluster measures the delay and rate of its network's links at its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, distant_cluster
from support.network.link import Link

pytestmark = [pytest.mark.model, pytest.mark.alone]


def test_delays_and_rates_are_found_and_predicted(demo_model: Path) -> None:
    with Box((COORDINATOR, "a", "b"), delays=True) as box:
        box.set_link(Link.of_round_trip(0.02, rate_bit_s=100_000_000))
        with distant_cluster(box, demo_model) as cluster:
            plan = cluster.get("/cluster").json()["plan"]
            found = json.loads((cluster.line.cluster_dir("distant").parent / ".links.json").read_text())
    assert len(found) == 3
    for key, link in found.items():
        assert 9.5e-3 <= link["one_way_s"] <= 15e-3, key
        assert 60e-9 <= link["byte_s"] <= 120e-9, key  # The rate alone gives 80e-9.
    assert plan["links_ms"] == pytest.approx(2 * 10, rel=0.3)
    assert plan["token_ms"] > plan["links_ms"]

"""Clusters whose plans change between stages and groups when links get faster or slower."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.observations import Signal
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from support.clusters.recovering import Recovering, config

NAMES = "abc"
NEAR_S, FAR_S = 1e-6, 0.05
_SLOW = {"threads": 1, "memory_bandwidth_gb_s": 0.01, "int8_gmac_s": 0.2}
"""Speeds of workers so low that a gather over a near network is short beside their products."""


def automatic(model: Path, folder: Path) -> ClusterConfig:
    """Returns a configuration whose first plan has stages, since no link is measured at the start."""
    return config(model, folder, workers=[{"name": name, **_SLOW} for name in NAMES], objective="latency")


def measured(run: Recovering, one_way_s: float) -> None:
    """Reports that all links have this one-way latency."""
    link, supervisor = Link(one_way_s + 1.5e-4, 1e-10, one_way_s), run.cluster.supervisor
    supervisor.planner.update(Links({frozenset(pair): link for pair in combinations((COORDINATOR, *NAMES), 2)}))
    supervisor.store.post(Signal.LINKS_CHANGED)


async def grouped(run: Recovering) -> None:
    """Waits until all workers are members of groups and hold layers of one epoch."""
    await run.until("groups", lambda: sorted("".join(map("".join, run.groups))) == [*NAMES])
    await run.whole()

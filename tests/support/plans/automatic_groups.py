"""Clusters whose plans change between stages and groups, as their network gets faster and slower."""

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
"""A gather over a near network takes little beside such a worker's products."""


def automatic(model: Path, folder: Path) -> ClusterConfig:
    """Nothing is known of the network at the start, so there are stages."""
    return config(model, folder, workers=[{"name": name, **_SLOW} for name in NAMES], objective="latency")


def measured(run: Recovering, one_way_s: float) -> None:
    """All links are found to be so long."""
    link, supervisor = Link(one_way_s + 1.5e-4, 1e-10, one_way_s), run.cluster.supervisor
    supervisor.planner.update(Links({frozenset(pair): link for pair in combinations((COORDINATOR, *NAMES), 2)}))
    supervisor.store.post(Signal.LINKS_CHANGED)


async def grouped(run: Recovering) -> None:
    """Returns when all workers are members of groups, and no other epoch is there."""
    await run.until("groups", lambda: sorted("".join(map("".join, run.groups))) == [*NAMES])
    await run.whole()

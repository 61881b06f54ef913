"""Checks that groups release the threads and file descriptors of their members."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path

import psutil
import pytest

from llamaclust.cluster.control.epochs import load_stages, unload_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.model.loader import Model
from support.clusters.real_cluster import LIMITS, RealCluster, real_cluster

ROUNDS = 20
POOL = 8
"""Threads that an event loop's pool may add, fewer than one per round."""
_GROUP = [StageInfo(name, 0, 4, shares=(2, 1, 1), member=member) for member, name in enumerate("abc")]
CHAINS = {
    "a group alone": _GROUP,
    "a stage behind it": [*_GROUP, StageInfo("d", 4, 6)],
    "a stage before it": [
        StageInfo("d", 0, 2),
        *(StageInfo(name, 2, 6, shares=(1, 1), member=member) for member, name in enumerate("ab")),
    ],
}


def held(cluster: RealCluster) -> list[tuple[int, int]]:
    """Returns the numbers of threads and descriptors of each worker."""
    processes = [psutil.Process(handle.registration.pid) for handle in cluster.registry.workers.values()]
    return [(process.num_threads(), process.num_fds()) for process in processes]


async def settled(cluster: RealCluster, before: list[tuple[int, int]]) -> None:
    """Waits until no worker has more than before; the test has a deadline of its own."""
    while any(now > then + POOL for old, new in zip(before, held(cluster), strict=True) for then, now in zip(old, new)):  # noqa: ASYNC110, B905
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("stages", CHAINS.values(), ids=CHAINS.keys())
async def test_twenty_epochs_leave_no_thread_and_no_descriptor(
    stages: list[StageInfo], model: Path, tmp_path: Path
) -> None:
    """Every second epoch's pipeline is opened; every other round loads two epochs side by side."""
    async with asyncio.timeout(120), real_cluster(tmp_path, 4) as cluster:
        numbers, reference = count(1), ModelReference(str(model), Model.open(model).model_id)

        async def load() -> int:
            number = next(numbers)
            handles = await load_stages(StageLoads(number, stages, reference, LIMITS), cluster.registry.workers)
            if number % 2:
                await (await RemotePipeline.open(number, handles, cluster.run.token)).close()
            return number

        async def unload(*epochs: int) -> None:
            for epoch in epochs:
                await unload_stages(epoch, cluster.registry.workers.values())

        await unload(await load(), await load())  # workers keep some resources of their first loads
        before = held(cluster)
        for round_ in range(ROUNDS):
            await unload(*[await load() for _ in range(1 + round_ % 2)])
        await settled(cluster, before)

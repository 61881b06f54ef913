"""What a cluster that is ready tells whoever watches it: workers that are lost, requests that hold up its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llamaclust.cluster.events import Draining, Watch, WorkerLost
from llamaclust.cluster.last_words import last_words
from llamaclust.cluster.registry import Registry
from llamaclust.cluster.state import ClusterDir
from llamaclust.cluster.text import TextService
from llamaclust.cluster.worker_handle import WorkerHandle

_LOOK_S = 0.2


@asynccontextmanager
async def losses_told(registry: Registry, folder: ClusterDir, watch: Watch) -> AsyncIterator[None]:
    """Meanwhile, every worker that is lost is told of."""
    waits = [asyncio.create_task(_tell_loss(worker, folder, watch)) for worker in registry.workers.values()]
    try:
        yield
    finally:
        for wait in waits:
            wait.cancel()


async def _tell_loss(worker: WorkerHandle, folder: ClusterDir, watch: Watch) -> None:
    await worker.lost.wait()  # for as long as the cluster lives
    start, end = worker.layers or (0, 0)
    words = last_words(folder.log_file(worker.name))
    watch(WorkerLost(worker.name, start, end, worker.loss or "no reason is known", words))


@asynccontextmanager
async def requests_told(service: TextService, limit_s: float, watch: Watch) -> AsyncIterator[None]:
    """Meanwhile, it is told how many requests are left, as often as that changes."""
    telling = asyncio.create_task(_tell_left(service, limit_s, watch))
    try:
        yield
    finally:
        telling.cancel()


async def _tell_left(service: TextService, limit_s: float, watch: Watch) -> None:
    told = 0
    while True:
        left = service.active_requests
        if left not in (0, told):
            watch(Draining(left, limit_s))
            told = left
        await asyncio.sleep(_LOOK_S)

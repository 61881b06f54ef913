"""Clusters whose coordinator is in this process, and requests to such clusters."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir


@asynccontextmanager
async def cluster_of(workers: int, model: Path, *more: str) -> AsyncIterator[Cluster]:
    names = ", ".join(f"{{name: w{index}, threads: 1}}" for index in range(workers))
    keys = [f"model={model}", f"workers=[{names}]", "context_length=1024", "objective=throughput", *more]
    with tempfile.TemporaryDirectory() as folder:
        directory = ClusterDir(Path(folder) / f"{workers}")
        directory.create()
        async with open_cluster(load_config(None, keys), [model], directory) as cluster:
            yield cluster


def prompts(source: random.Random, count: int, tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    return [tuple(source.randrange(3, vocabulary) for _ in range(tokens)) for _ in range(count)]


async def run(cluster: Cluster, prompt: tuple[int, ...], tokens: int) -> Finished:
    request = GenerationRequest("benchmark", prompt, tokens, min_tokens=tokens, max_drafted=0)
    async for event in cluster.engine.submit(request):
        if isinstance(event, Finished):
            return event
    raise AssertionError("a request ends with Finished")


@contextmanager
def pinned_to_cores(cluster: Cluster) -> Iterator[None]:
    """Pins each one-thread worker to a core, in the order of stages."""
    cores = sorted(os.sched_getaffinity(0))
    present = cluster.registry.present
    workers = [str(present[stage.worker].registration.pid) for stage in cluster.engine.metrics.stage_report()]
    threads = [Path("/proc/self/task"), *(Path(f"/proc/{worker}/task") for worker in workers)]
    before = {int(each.name): os.sched_getaffinity(int(each.name)) for folder in threads for each in folder.iterdir()}
    for folder, core in zip(threads, [*cores[1:2], *cores], strict=False):
        _pin((int(each.name) for each in folder.iterdir()), {core})
    try:
        yield
    finally:
        for thread, allowed in before.items():
            _pin([thread], allowed)


def pin_process(pid: int, core: int) -> None:
    """Pins the current threads of a process to a core. Threads that they start later inherit the core."""
    _pin((int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()), {core})


def _pin(threads: Iterable[int], cores: Collection[int]) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):  # The thread has just ended.
            os.sched_setaffinity(thread, cores)

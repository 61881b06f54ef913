"""Speed of a cluster, measured at its engine."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster

if TYPE_CHECKING:
    from llamaclust.tools.bench.bench import BenchTask

_SEED = 20_240_601


class ClusterRunner:
    """See `tools.bench.Runner`. Prompts are random tokens, new ones each time."""

    def __init__(self, cluster: Cluster, task: BenchTask) -> None:
        self._engine = cluster.engine
        self._vocabulary = cluster.model.hyperparameters.vocabulary_size
        self._task = task
        self._random = np.random.default_rng(_SEED)

    async def prefill(self) -> float:
        """Seconds from the requests' arrival until each has its first token."""
        started_ns = perf_counter_ns()
        await asyncio.gather(*(self._token_times(self._task.prompt, 1) for _ in range(self._task.batch)))
        return (perf_counter_ns() - started_ns) / 1e9

    async def decode(self) -> float:
        """Seconds from the moment when all have their first token to the last one's end, for as many tokens as the
        task requests for: those that were early count less."""
        requests = (self._token_times(self._task.depth + 1, self._task.generate + 1) for _ in range(self._task.batch))
        times = await asyncio.gather(*requests)
        start_ns, end_ns = max(each[0] for each in times), max(each[-1] for each in times)
        within = sum(time_ns > start_ns for each in times for time_ns in each)
        return (end_ns - start_ns) / 1e9 * self._task.generate * self._task.batch / within

    async def _token_times(self, prompt: int, generate: int) -> list[int]:
        """When each token of one request came, in nanoseconds. Nothing ends it early."""
        tokens = tuple(map(int, self._random.integers(0, self._vocabulary, prompt)))
        number = int(self._random.integers(1 << 62))
        async with self._engine.submit(GenerationRequest(f"bench-{number:x}", tokens, generate)) as events:
            return [perf_counter_ns() async for event in events if isinstance(event, TokenSampled)]

"""Starts a temporary cluster of local workers, and measures its speed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from llamaclust.cluster.client.local import OpenService
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.errors import UsageError
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.tools.bench.even_split import even_split

if TYPE_CHECKING:
    from llamaclust.tools.bench.bench import BenchTask

_SEED = 20_240_601
_ALIKE = {"memory_bandwidth_gb_s": 20.0, "int8_gmac_s": 300.0}
"""Assumed speeds of each worker, with which the cluster starts without measurements."""


@asynccontextmanager
async def temporary_cluster(
    model: Path, workers: int, threads: int | None, context_length: int, max_sequences: int, kv_type: KvType
) -> AsyncIterator[Cluster]:
    """Runs the model on `workers` workers with `threads` threads each. Raises UsageError if there are more workers than
    layers."""
    names = [f"w{index}" for index in range(1, workers + 1)]
    with closing(Model.open(model)) as opened:
        if workers > opened.layer_count:
            raise UsageError(
                f"{model} has {opened.layer_count} layers, too few for {workers} workers; give fewer workers"
            )
        cut = even_split(opened.costs(kv_type), workers)
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        values = {
            "name": "measurement",
            "model": str(model),
            "context_length": context_length,
            "workers": [{"name": name, "threads": threads, **_ALIKE} for name in names],
            "plan": [{"worker": name, "layers": list(layers)} for name, layers in zip(names, cut, strict=True)],
            "max_sequences": max_sequences,
            "kv_type": kv_type,
            "prefix_cache": False,
            "speculative": False,
            "state_dir": folder,
        }
        config = ClusterConfig.model_validate(values)
        directory = ClusterDir(config.state_dir / config.name)
        with directory.locked():
            async with open_cluster(config, [model], directory) as cluster:
                yield cluster


def cluster_service(
    model: Path, workers: int, threads: int | None, context_length: int, kv_type: KvType
) -> OpenService:

    @asynccontextmanager
    async def open_service() -> AsyncIterator[TextService]:
        async with temporary_cluster(model, workers, threads, context_length, 8, kv_type) as cluster:
            settings = TextSettings(model.stem, cluster.plan.context_length)
            service = TextService(cluster.engine, cluster.model.tokenizer, cluster.model.chat_template, settings)
            async with aclosing(service):
                yield service

    return open_service


class ClusterRunner:
    def __init__(self, cluster: Cluster, task: BenchTask) -> None:
        self._engine = cluster.engine
        self._vocabulary = cluster.model.hyperparameters.vocabulary_size
        self._task = task
        self._random = np.random.default_rng(_SEED)

    async def prefill(self) -> float:
        """Returns the seconds from the arrival of the requests until each has its first token."""
        started_ns = perf_counter_ns()
        await asyncio.gather(*(self._token_times(self._task.prompt, 1) for _ in range(self._task.batch)))
        return (perf_counter_ns() - started_ns) / 1e9

    async def decode(self) -> float:
        """Measures the speed after every sequence has a token. Returns the seconds for all tokens at this speed."""
        requests = (self._token_times(self._task.depth + 1, self._task.generate + 1) for _ in range(self._task.batch))
        times = await asyncio.gather(*requests)
        start_ns, end_ns = max(each[0] for each in times), max(each[-1] for each in times)
        within = sum(time_ns > start_ns for each in times for time_ns in each)
        return (end_ns - start_ns) / 1e9 * self._task.generate * self._task.batch / within

    async def _token_times(self, prompt: int, generate: int) -> list[int]:
        tokens = tuple(map(int, self._random.integers(0, self._vocabulary, prompt)))
        number = int(self._random.integers(1 << 62))
        async with self._engine.submit(GenerationRequest(f"bench-{number:x}", tokens, generate)) as events:
            return [perf_counter_ns() async for event in events if isinstance(event, TokenSampled)]

"""A temporary cluster of local worker processes for one measurement."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from tempfile import TemporaryDirectory

from llamaclust.cluster.client.in_process import OpenService
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.text.service import TextService, TextSettings
from llamaclust.core.errors import UsageError
from llamaclust.model.loader import Model
from llamaclust.model.program import KvType
from llamaclust.tools.bench.even_split import even_split

_ALIKE = {"memory_bandwidth_gb_s": 20.0, "int8_gmac_s": 300.0}
"""The workers share one machine: nothing is measured when they start."""


@asynccontextmanager
async def temporary_cluster(
    model: Path, workers: int, threads: int | None, context_length: int, max_sequences: int, kv_type: KvType
) -> AsyncIterator[Cluster]:
    """The model cut over exactly that many workers, each with `threads`. UsageError where it has fewer layers."""
    names = [f"w{index}" for index in range(1, workers + 1)]
    with closing(Model.open(model)) as opened:
        if workers > opened.layer_count:
            raise UsageError(f"{model} has {opened.layer_count} layers, too few for {workers} workers; give fewer")
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
            "state_dir": folder,
        }
        config = ClusterConfig.model_validate(values)
        directory = ClusterDir(config.state_dir / config.name)
        with directory.locked():
            async with open_cluster(config, model, directory) as cluster:
                yield cluster


def cluster_service(
    model: Path, workers: int, threads: int | None, context_length: int, kv_type: KvType
) -> OpenService:
    """What opens such a cluster's text service, for a ServiceClient."""

    @asynccontextmanager
    async def open_service() -> AsyncIterator[TextService]:
        async with temporary_cluster(model, workers, threads, context_length, 8, kv_type) as cluster:
            settings = TextSettings(model.stem, cluster.plan.context_length)
            yield TextService(cluster.engine, cluster.model.tokenizer, cluster.model.chat_template, settings)

    return open_service

"""What `open_cluster` asks of workers and of the machine, on clusters of real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from served import run_async
from tiny_model import build_tiny_model

from llamaclust.cluster.config import ClusterConfig
from llamaclust.cluster.coordinator import Cluster, open_cluster
from llamaclust.cluster.state import ClusterDir


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=4, context=256)


@asynccontextmanager
async def opened(model: Path, folder: Path, **values: object) -> AsyncIterator[Cluster]:
    speeds = {"bandwidth": 20.0, "int8": 300.0}
    workers = [{"name": "a", "threads": 1, **speeds}, {"name": "b", "threads": 1, **speeds}]
    base = {"model": str(model), "workers": workers, "objective": "throughput", "context_length": 256}
    config = ClusterConfig.model_validate({**base, "state_dir": folder, **values})
    directory = ClusterDir(folder / config.name)
    with directory.locked():
        async with open_cluster(config, model, directory) as cluster:
            yield cluster


@run_async
async def test_heartbeats_keep_up_with_a_short_timeout(tiny: Path, tmp_path: Path) -> None:
    async with opened(tiny, tmp_path, timeouts={"worker": 0.6}) as cluster:
        await asyncio.sleep(1.0)
        assert cluster.engine.error is None
        assert all(worker.heartbeat is not None for worker in cluster.registry.workers.values())

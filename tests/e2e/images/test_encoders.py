"""A worker is killed while it encodes an image: the next epoch's encoder returns the same bits."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.control.epochs import load_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.encoder import Encoder
from llamaclust.cluster.engine.pipeline import StageInfo, TileEncoder, TileTask
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import open_projector
from support.clusters.real_cluster import LIMITS, RealCluster, real_cluster
from support.file_members import projector_at
from support.models.tiny_model import build_tiny_model
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import build_projector
from support.seed import SEED

NAME = "qwen2.5vl_merger"
TILES = 3


@dataclass(frozen=True, slots=True)
class Watched:
    """An encoder whose first rows are told of. The next tile is being computed then."""

    encoder: TileEncoder
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def rows(self, tasks: Sequence[TileTask]) -> AsyncGenerator[NDArray[np.float32]]:
        async with aclosing(self.encoder.rows(tasks)) as found:
            async for rows in found:
                self.begun.set()
                yield rows


async def opened(cluster: RealCluster, folder: Path, worker: str, epoch: int) -> RemotePipeline:
    """All layers and the encoder on one worker."""
    model, path = folder / "m.gguf", folder / "mmproj-m.gguf"
    reference = ModelReference(str(model), Model.open(model).model_id)
    stages, encoder = [StageInfo(worker, 0, 2, encoder_bytes=1)], projector_at(str(path), path, model)
    handles = await load_stages(StageLoads(epoch, stages, reference, LIMITS, encoder=encoder), cluster.registry.workers)
    return await RemotePipeline.open(epoch, handles, cluster.run.token)


async def test_a_worker_is_killed_in_mid_encode(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "m.gguf", layers=2)
    path = build_projector(tmp_path / "mmproj-m.gguf", NAME)
    random = np.random.default_rng(SEED)
    tiles = [random.integers(0, 256, (160, 160, 3), np.uint8) for _ in range(TILES)]
    wanted = [encoded(CpuBackend(1), path, tile) for tile in tiles]
    run = tmp_path / "run"
    run.mkdir()
    async with asyncio.timeout(120), real_cluster(run, 2) as cluster:
        encoder = Encoder(open_projector(path), 100.0)
        first, second = await opened(cluster, tmp_path, "a", 1), await opened(cluster, tmp_path, "b", 2)
        assert first.encoder is not None
        watched = Watched(first.encoder)
        encoder.serve(watched)
        encoding = asyncio.create_task(encoder.encode(tiles))
        await watched.begun.wait()
        assert not encoding.done()
        os.kill(cluster.pids["a"], signal.SIGKILL)
        encoder.serve(None)
        encoder.serve(second.encoder)
        for found, rows in zip(await encoding, wanted, strict=True):
            np.testing.assert_array_equal(found.view("u4"), rows.view("u4"))
        await asyncio.gather(first.close(), second.close())

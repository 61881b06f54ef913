"""Tests of a worker that is killed while it encodes an image: the next epoch's encoder gives the same bits, and text
requests continue."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.control.epochs import load_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.encoder import Encoder
from llamaclust.cluster.engine.pipeline import PipelineEncoder, StageInfo, TileTask
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import open_projector
from support.clusters.real_cluster import LIMITS, RealCluster, real_cluster
from support.clusters.recovering import CONTEXT, config, generations, recovering, undisturbed
from support.file_members import projector_at
from support.models.tiny_model import build_tiny_model
from support.models.vision.encoded_tiles import encoded
from support.models.vision.served_tiles import encode
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector
from support.seed import SEED

NAME = "pixtral"
TILES = 3


@dataclass(frozen=True, slots=True)
class Watched:
    """An encoder that sets `begun` when it computes its second tile."""

    encoder: PipelineEncoder
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    tiles: list[TileTask] = field(default_factory=list)

    @property
    def worker(self) -> str | None:
        return self.encoder.worker

    async def rows(self, task: TileTask) -> NDArray[np.float32]:
        self.tiles.append(task)
        if len(self.tiles) > 1:
            self.begun.set()
        return await self.encoder.rows(task)


async def opened(cluster: RealCluster, folder: Path, worker: str, epoch: int) -> RemotePipeline:
    """Loads all layers and the encoder on one worker."""
    model, path = folder / "m.gguf", folder / "mmproj-m.gguf"
    reference = ModelReference(str(model), Model.open(model).model_id)
    stages, encoder = [StageInfo(worker, 0, 4, encoder_bytes=1)], projector_at(str(path), path, model)
    handles = await load_stages(StageLoads(epoch, stages, reference, LIMITS, encoder=encoder), cluster.registry.workers)
    return await RemotePipeline.open(epoch, handles, cluster.run.token)


def files(folder: Path) -> tuple[Path, list[NDArray[np.uint8]], list[Float32]]:
    """Builds a model and its projector. Returns the projector's path, tiles, and their expected rows."""
    build_tiny_model(folder / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=4, context=CONTEXT)
    path = build_projector(folder / "mmproj-m.gguf", NAME)
    random = np.random.default_rng(SEED)
    tiles = [random.integers(0, 256, (160, 160, 3), np.uint8) for _ in range(TILES)]
    return path, tiles, [encoded(CpuBackend(1), path, tile) for tile in tiles]


def check(found: Sequence[Float32], wanted: Sequence[Float32]) -> None:
    for rows, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(rows.view("u4"), expected.view("u4"))


async def test_a_worker_is_killed_in_mid_encode(tmp_path: Path) -> None:
    path, tiles, wanted = files(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    async with asyncio.timeout(120), real_cluster(run, 2) as cluster:
        encoder = Encoder(open_projector(path), 100.0, nullcontext)
        first, second = await opened(cluster, tmp_path, "a", 1), await opened(cluster, tmp_path, "b", 2)
        assert first.encoder is not None
        watched = Watched(first.encoder)
        encoder.serve(watched)
        encoding = asyncio.create_task(encode(encoder, tiles))
        await watched.begun.wait()
        assert not encoding.done()
        os.kill(cluster.pids["a"], signal.SIGKILL)
        encoder.lose(None)
        assert second.encoder is not None
        encoder.serve(second.encoder)
        check(await encoding, wanted)
        await asyncio.gather(first.close(), second.close())


def test_a_cluster_loses_the_worker_that_encodes(tmp_path: Path) -> None:
    """Other workers complete the text requests and the tiles."""
    _, tiles, wanted = files(tmp_path)
    requests = generations(SEED, 40, 60)
    expected = undisturbed(tmp_path / "m.gguf", requests)

    async def run() -> None:
        async with recovering(config(tmp_path / "m.gguf", tmp_path / "state", timeouts={"worker": "60s"})) as run:
            engine, epoch = run.cluster.engine, run.cluster.supervisor.epoch
            assert engine.encoder is not None and epoch.pipeline.encoder is not None
            (holder,) = [worker for worker in epoch.workers if worker.stages[epoch.number][0].encoder is not None]
            assert holder.stages[epoch.number][1].encoder_bytes > 0
            watched = Watched(epoch.pipeline.encoder)
            engine.encoder.serve(watched)
            answers = run.start(requests)
            encoding = asyncio.create_task(encode(engine.encoder, tiles))
            await watched.begun.wait()
            assert not encoding.done()
            run.hurt(holder.name)
            check(await encoding, wanted)
            assert await asyncio.gather(*answers) == expected
            assert run.cluster.supervisor.recoveries == 1
            check(await encode(engine.encoder, tiles[:1]), wanted[:1])

    asyncio.run(run())

"""Tests of vision models that take turns: a tile that takes longer than a turn is completed, and images keep a model
awake."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.cluster.control import model_lifecycle
from llamaclust.cluster.engine import encoder as encoder_module
from llamaclust.cluster.engine.pipeline import PipelineEncoder, TileTask
from support.clusters.recovering import generations, undisturbed
from support.models.vision.served_tiles import check_rows, encode, random_tiles, seeing_model
from support.seed import SEED
from support.several_models.cluster import ASLEEP, AWAKE, model_files, models


@dataclass(frozen=True, slots=True)
class Held:
    """An encoder that waits for `gate` before each tile."""

    encoder: PipelineEncoder
    begun: list[TileTask] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def worker(self) -> str | None:
        return self.encoder.worker

    async def rows(self, task: TileTask) -> NDArray[np.float32]:
        self.begun.append(task)
        await self.gate.wait()
        return await self.encoder.rows(task)


async def test_images_wake_a_model_that_is_not_unloaded_before_their_end(tmp_path: Path) -> None:
    (seeing, path), other, tiles = seeing_model(tmp_path), model_files(tmp_path)[1], random_tiles()
    async with models([other, seeing], tmp_path, tight=False, keys={"max_loaded_models": 1}) as found:
        served, lifecycle = found.cluster.models[1], found.cluster.rotation.lifecycles["a"]
        encoder = served.engine.encoder
        assert encoder is not None and found.states == [AWAKE, ASLEEP]
        check_rows(path, tiles, await encode(encoder, tiles))
        assert found.states == [ASLEEP, AWAKE]
        pipeline = served.supervisor.epoch.pipeline
        assert pipeline.encoder is not None
        held = Held(pipeline.encoder)
        encoder.serve(held)
        encoding = asyncio.create_task(encode(encoder, tiles))
        await found.run.until("a tile", lambda: len(held.begun) == 1)
        assert not lifecycle.is_idle
        await lifecycle.sleep()
        assert not lifecycle.is_asleep
        held.gate.set()
        check_rows(path, tiles, await encoding)
        assert lifecycle.is_idle
        lifecycle.enter()
        await lifecycle.sleep()
        assert not lifecycle.is_asleep, "a request may be on its way"
        lifecycle.leave()
        await lifecycle.sleep()
        assert lifecycle.is_asleep


async def test_a_tile_longer_than_a_turn_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_lifecycle, "_TURN_S", 0.1)
    (seeing, path), tiles = seeing_model(tmp_path), random_tiles()
    other, (request, *_) = model_files(tmp_path)[1], generations(SEED, 12, 40)
    (expected,) = await asyncio.to_thread(undisturbed, other, (request,))
    async with models([seeing, other], tmp_path, tight=False, keys={"max_loaded_models": 1}) as found:
        served, lifecycle = found.cluster.models[0], found.cluster.rotation.lifecycles["a"]
        encoder, pipeline = served.engine.encoder, served.supervisor.epoch.pipeline
        assert encoder is not None and pipeline.encoder is not None
        held = Held(pipeline.encoder)
        encoder.serve(held)
        encoding = asyncio.create_task(encode(encoder, tiles))
        await found.run.until("a tile", lambda: len(held.begun) == 1)
        answering = asyncio.create_task(found.answer(1, request))
        await found.run.until("the end of the turn", lambda: lifecycle.is_preempted)
        await asyncio.sleep(0.2)
        assert found.states == [AWAKE, ASLEEP] and not answering.done(), "the tile is waited for"
        held.gate.set()
        assert await answering == expected
        check_rows(path, tiles, await encoding)
        assert len(held.begun) == 1, "no other tile began in this turn"
        assert any("a sleeps: it is another model's turn" in text for text in found.run.told)


async def test_a_tile_that_never_ends_holds_up_another_model_only_for_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lifecycle, "_TURN_S", 0.1)
    monkeypatch.setattr(encoder_module, "_LAST_TILE_S", 0.2)
    (seeing, path), tiles = seeing_model(tmp_path), random_tiles()
    other, (request, *_) = model_files(tmp_path)[1], generations(SEED, 12, 40)
    (expected,) = await asyncio.to_thread(undisturbed, other, (request,))
    async with models([seeing, other], tmp_path, tight=False, keys={"max_loaded_models": 1}) as found:
        served = found.cluster.models[0]
        encoder, pipeline = served.engine.encoder, served.supervisor.epoch.pipeline
        assert encoder is not None and pipeline.encoder is not None
        held = Held(pipeline.encoder)
        encoder.serve(held)
        encoding = asyncio.create_task(encode(encoder, tiles))
        await found.run.until("a tile", lambda: len(held.begun) == 1)
        async with asyncio.timeout(100):
            assert await found.answer(1, request) == expected
            assert not held.gate.is_set()
            check_rows(path, tiles, await encoding)

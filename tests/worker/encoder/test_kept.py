"""Tests of encoders between two memberships of a worker: kept with their stages for another load of the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import open_projector
from llamaclust.wire.control.weights import EncoderFile, WeightSources
from llamaclust.worker.devices.encoder_memory import encoder_bytes
from llamaclust.worker.encoder.streams import EncoderStreams
from llamaclust.worker.encoder.tile_encoder import TileEncoder
from llamaclust.worker.service import StageService
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.loop import StageContext
from llamaclust.worker.stage.streams import StageStreams
from support.clusters.stage_chain import DEADLINES, neighbours, runner_of
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import build_projector, tile_of

NAME = "idefics3"
MANIFEST = WeightSources("ab" * 32, 1, ())


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("manifest", [None, MANIFEST])
async def test_a_kept_encoder_serves_the_same_file_alone(
    fits: bool, manifest: WeightSources | None, tmp_path: Path
) -> None:
    projector = open_projector(build_projector(tmp_path / "p.gguf", NAME))
    known = None if manifest is None else manifest.manifest
    encoder = TileEncoder(CpuBackend(1), projector, encoder_bytes(projector, 1), known, lambda done_bytes: None)
    rows = encoder.rows(tile_of(NAME))
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", layers=2))
    service, compute = StageService("w0"), Compute()
    context = StageContext("w0", compute, Counters())
    streams = EncoderStreams(encoder, compute.apart())
    around = neighbours(["unix:none"], 0, None)
    service.add(StageStreams(1, runner_of(model, 0, 2), context, DEADLINES, around), streams)
    service.keep()
    assert service.has_kept and service.kept_bytes["cpu"] > encoder.memory.total_bytes
    other = WeightSources("cd" * 32, 1, ())
    wanted = EncoderFile("p.gguf", projector.identity, manifest if fits or manifest is None else other)
    version = encoder.file_version if fits else "another"
    found = await service.take_kept_encoder(wanted, version)
    if fits:
        assert found is streams
        assert (encoder.rows(tile_of(NAME)) == rows).all()
        await found.close()
    else:
        assert found is None
    with pytest.raises(AssertionError, match="closed"):
        encoder.rows(tile_of(NAME))
    await service.free()
    assert not service.has_kept
    compute.close()


async def test_a_kept_encoder_that_no_load_wants_is_freed(tmp_path: Path) -> None:
    projector = open_projector(build_projector(tmp_path / "p.gguf", NAME))
    encoder = TileEncoder(CpuBackend(1), projector, encoder_bytes(projector, 1), None, lambda done_bytes: None)
    service, compute = StageService("w0"), Compute()
    service._kept_encoders.append(EncoderStreams(encoder, compute.apart()))
    assert await service.take_kept_encoder(None, None) is None
    with pytest.raises(AssertionError, match="closed"):
        encoder.rows(tile_of(NAME))
    compute.close()
